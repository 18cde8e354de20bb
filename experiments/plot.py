"""`python -m experiments.plot FOLDER … [--out=both.png]`: several runs side by side."""

from pathlib import Path

from absl import flags
from matplotlib.figure import Figure

from experiments.command import BAD_INPUT, complain, end, helped
from experiments.report.figure1 import draw, read_panel
from noisefl.errors import refuse

USAGE = "usage: python -m experiments.plot FOLDER … [--out=figure.png]"


def main(argv: list[str]) -> int:
    """Runs one command line; returns the exit code."""
    values = flags.FlagValues()
    flags.DEFINE_string("out", "figure.png", "the picture to write", flag_values=values)
    values.set_gnu_getopt()  # flags may follow the folders
    if helped(argv, __doc__, values):
        return 0
    try:
        folders = values(argv)[1:]
        if not folders:
            raise ValueError(USAGE)
        out = str(values["out"].value)
        write(draw([read_panel(Path(folder)) for folder in folders]), out)
        print(f"{out} shows {len(folders)} run{'s' * (len(folders) > 1)}")
    except BrokenPipeError:
        raise
    except (ValueError, OSError, flags.Error) as error:
        complain(str(error), "experiments.plot")
        return BAD_INPUT
    return 0


def write(figure: Figure, out: str) -> None:
    """Into a file of any kind that matplotlib knows by its ending.

    Raises:
      ValueError: it knows no such kind, or the file cannot be written.
    """
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise refuse("out", out, f"cannot be written ({error})") from None


if __name__ == "__main__":
    end(main)
