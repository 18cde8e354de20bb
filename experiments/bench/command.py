"""How a benchmark's command line begins and ends."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from experiments.command import BAD_INPUT, complain

T = TypeVar("T")


def checked(name: str, argv: list[str], check: Callable[[], T], file: str | None = None) -> T:
    """What `check` returns. Wrong flags end the process with one line, before any work.

    Args:
      name: of the module.
      argv: what flags left over.
      check: raises ValueError, OSError or ImportError about the first flag that is wrong.
      file: that will be written.
    """
    try:
        if argv[1:]:
            raise ValueError(f"unexpected argument {argv[1]!r}: flags begin with --")
        found = check()
        if file:
            Path(file).touch()
        return found
    except (ValueError, OSError, ImportError) as error:
        complain(str(error), f"experiments.{name}")
        sys.exit(BAD_INPUT)


def write(file: str | None, results: Any) -> None:
    """As JSON, if a file is asked for."""
    if file:
        Path(file).write_text(json.dumps(results, indent=1) + "\n")


def table(title: str, rows: Sequence[Mapping[str, str]]) -> Table:
    """Rows of texts by column, the first column to the left."""
    shown = Table(title=title, title_justify="left")
    for place, column in enumerate(rows[0]):
        shown.add_column(column, justify="right" if place else "left")
    for row in rows:
        shown.add_row(*row.values())
    return shown
