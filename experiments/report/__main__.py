"""`python -m experiments.report OUT`: the table and the pictures of a sweep, done or not.

Writes report.csv, report.md, report.parquet and pictures into its folder, with --html also
report.html, which has them all in one file. The folder of a single run gets the table of one line
beside the picture that it has. Exit codes: 0 done, 2 bad input.
"""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags
from rich.console import Console

from experiments.command import BAD_INPUT, complain, end, helped
from experiments.report import figures, page, results, table, tensorboard

WIDE = 500  # of a line for other programs, in which no cell is folded
USAGE = "usage: python -m experiments.report OUT [--html] [--tensorboard=DIR]"


def main(argv: list[str]) -> int:
    """Runs one command line; returns the exit code."""
    values = flags.FlagValues()
    flags.DEFINE_string("tensorboard", "", "folder for event files", flag_values=values)
    flags.DEFINE_bool("html", False, "one page with everything in it", flag_values=values)
    values.set_gnu_getopt()  # flags may follow the folder
    if helped(argv, __doc__, values):
        return 0
    try:
        folders = values(argv)[1:]
        if len(folders) != 1:
            raise ValueError(USAGE)
        command = shlex.join(["python", "-m", "experiments.report", *argv[1:]])
        wanted = command if values["html"].value else ""
        return report(Path(folders[0]), str(values["tensorboard"].value), wanted)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, flags.Error) as error:
        complain(str(error), "experiments.report")
        return BAD_INPUT


def report(folder: Path, event_folder: str = "", command: str = "") -> int:
    """Writes all that there is to write, and prints the table.

    Args:
      folder: of a sweep or of a run.
      event_folder: for event files, if there are to be any.
      command: the command line that asks for report.html, if there is to be one.

    Raises:
      ValueError: the folder holds no sweep and no run, a run in it is damaged, or event files are
        asked for and tensorboardX is not installed.
      OSError: a folder is not writable.
    """
    if event_folder:
        tensorboard.writer_of(event_folder)  # refuses before the work, not after it
    sweep = results.read(folder)
    found = table.statistics(sweep)
    writers: dict[str, Callable[[Path], object]] = {
        "report.csv": lambda new: new.write_text(table.csv_text(sweep, found), "utf-8"),
        "report.md": lambda new: new.write_text(table.markdown(sweep, found), "utf-8"),
        "report.parquet": lambda new: table.write_parquet(new, sweep, found),
    }
    for name, draw in figures.PICTURES.items() if sweep.grid else ():
        if figure := draw(sweep, found):
            writers[name] = lambda new, figure=figure: figure.savefig(new, format="png")
        else:  # nothing to draw; nor must an older grid's picture stay
            (folder / name).unlink(missing_ok=True)
    if command:  # last: it has the pictures in it
        writers["report.html"] = lambda new: new.write_text(
            page.of_sweep(sweep, found, command), "utf-8"
        )
    for name, write in writers.items():
        replace(folder / name, write)
    written = list(writers)
    if event_folder:
        tensorboard.export(sweep, event_folder)
        written.append(f"event files of {sum(sweep.runs.complete)} runs in {event_folder}")
    told = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(highlight=False, width=None if told else WIDE)
    table.show(console, sweep, found)
    for line in table.failures(sweep):
        console.print(f"failed: {line}", soft_wrap=True, markup=False)
    holds = f"{folder} holds: {', '.join(written)}"
    holds = holds.encode("utf-8", "backslashreplace").decode()  # paths are bytes
    console.print(holds, soft_wrap=True, markup=False)
    return 0


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file in one step: a reader, or a kill, sees the old one or the new one."""
    new = path.with_name(f".{path.name}.new")
    try:
        write(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)  # of a disk that is full


if __name__ == "__main__":
    end(main)
