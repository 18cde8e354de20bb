"""`python -m experiments.report OUT`: the table and the pictures of a sweep.

Writes report.csv, report.md, report.parquet and pictures into the sweep's folder, whether or not
all of its runs are done. Exit codes: 0 done, 2 bad input.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags
from rich.console import Console

from experiments import plot_sweep, sweep_results, sweep_statistics, sweep_table, tensorboard

USAGE = "usage: python -m experiments.report OUT [--tensorboard=DIR]"


def main(argv: list[str]) -> int:
    """Runs one command line; returns the exit code."""
    values = flags.FlagValues()
    flags.DEFINE_string("tensorboard", "", "folder for event files", flag_values=values)
    values.set_gnu_getopt()  # flags may follow the folder
    try:
        folders = values(argv)[1:]
        if len(folders) != 1:
            raise ValueError(USAGE)
        return report(Path(folders[0]), str(values["tensorboard"].value))
    except (ValueError, OSError, flags.Error) as error:
        print("experiments.report:", " ".join(str(error).split()), file=sys.stderr)
        return 2


def report(folder: Path, event_folder: str = "") -> int:
    """Writes all that there is to write, and prints the table.

    Raises:
      ValueError: the folder holds no sweep, a run in it is damaged, or event files are asked for
        and tensorboardX is not installed.
      OSError: a folder is not writable.
    """
    if event_folder:
        tensorboard.writer_of(event_folder)  # refuses before the work, not after it
    sweep = sweep_results.read(folder)
    columns, rows = sweep_statistics.table(sweep)
    write_text(folder / "report.csv", sweep_table.csv_text(columns, rows))
    write_text(folder / "report.md", sweep_table.markdown(sweep, rows))
    parquet = folder / "report.parquet"
    replace(parquet, lambda path: sweep_table.write_parquet(path, columns, rows))
    written = ["report.csv", "report.md", "report.parquet"]
    for name, draw in plot_sweep.PICTURES.items():
        figure = draw(sweep)
        if figure is None:  # nothing to draw; nor must an older grid's picture stay
            (folder / name).unlink(missing_ok=True)
            continue
        replace(folder / name, lambda path, figure=figure: figure.savefig(path, format="png"))
        written.append(name)
    if event_folder:
        tensorboard.export(sweep, event_folder)
        written.append(f"event files of {len(sweep.runs)} runs in {event_folder}")
    console = Console(highlight=False)
    sweep_table.show(console, sweep, rows)
    for line in sweep_table.failures(sweep):
        console.print(f"failed: {line}", soft_wrap=True, markup=False)
    console.print(f"{folder} holds: {', '.join(written)}", soft_wrap=True, markup=False)
    return 0


def write_text(path: Path, text: str) -> None:
    replace(path, lambda new: new.write_text(text, encoding="utf-8"))


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file in one step: a reader, or a kill, sees the old one or the new one."""
    new = path.with_name(f".{path.name}.new")
    write(new)
    os.replace(new, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
