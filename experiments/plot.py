"""`python -m experiments.plot FOLDER … --out=both.png`: several runs side by side."""

import sys
from pathlib import Path

from absl import flags
from matplotlib.figure import Figure

from experiments.report.figure1 import draw, read_panel
from noisefl.errors import refuse

USAGE = "usage: python -m experiments.plot FOLDER … [--out=figure.png]"


def main(argv: list[str]) -> int:
    """Runs one command line; returns the exit code."""
    values = flags.FlagValues()
    flags.DEFINE_string("out", "figure.png", "the picture to write", flag_values=values)
    values.set_gnu_getopt()  # flags may follow the folders
    try:
        folders = values(argv)[1:]
        if not folders:
            raise ValueError(USAGE)
        write(draw([read_panel(Path(folder)) for folder in folders]), str(values["out"].value))
    except (ValueError, OSError, flags.Error) as error:
        print("experiments.plot:", " ".join(str(error).split()), file=sys.stderr)
        return 2
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
    sys.exit(main(sys.argv))
