"""What a person sees while a sweep goes on: bars in a terminal, now and then a line elsewhere."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

EVERY = 30  # seconds between two lines outside of a terminal


class SweepProgress:
    """Use as a context manager.

    Args:
      runs: of the sweep.
      groups: of the sweep.
      rounds: of each run.
      quiet: shows nothing, as all processes but the first.
      console: where to write; standard error if None.
    """

    def __init__(
        self, runs: int, groups: int, rounds: int, quiet: bool, console: Console | None = None
    ):
        self._console = console or Console(stderr=True, highlight=False, quiet=quiet)
        self._rounds, self._groups = rounds, groups
        self._done, self._runs = 0, runs  # runs
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=600,
        )
        # Counted in rounds of runs, so that time left moves before the first run is done.
        self._all = self._bars.add_task("sweep", total=runs * rounds, unit="rounds of runs")
        self._group = self._bars.add_task("group", total=None, unit="runs", visible=False)
        self._batch = self._bars.add_task("batch", total=rounds, unit="rounds", visible=False)
        self._values = Text()
        self._live = Live(Group(self._bars, self._values), console=self._console)
        self._size, self._at, self._printed = 0, 0, 0.0

    def __enter__(self):
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception):
        self.stop()

    @property
    def tasks(self) -> list[Task]:
        """The bars: of the sweep, of the group, of the batch."""
        return self._bars.tasks

    def stop(self) -> None:
        """Leaves the terminal as it was; safe to call twice."""
        self._live.stop()

    def skip(self, runs: int) -> None:
        """Runs that an earlier process has done."""
        self._done += runs
        self._bars.reset(self._all, completed=runs * self._rounds)
        if runs:
            self._console.print(f"{runs} of {self._runs} runs are done already")

    def group(self, number: int, title: str, runs: int, done: int) -> None:
        """Begins a group, the first of which is 1, and of which some runs are done."""
        description = f"group {number}/{self._groups}"
        self._bars.reset(
            self._group, description=description, total=runs, completed=done, visible=True
        )
        self._show(f"{description}: {title}; compiling", now=True)

    def batch(self, runs: int, done: int) -> None:
        """Begins a batch, by the number of its runs that are not done, of which rounds may be."""
        self._size, self._at = runs, done
        description = f"{runs} side by side"
        self._bars.reset(self._batch, description=description, completed=done, visible=True)
        self._bars.update(self._all, advance=runs * done)

    def rounds(self, number: int, lanes: Sequence[Sequence[dict[str, Any]]]) -> None:
        """The batch has come to a round; `lanes` are the rows of its runs so far."""
        self._bars.update(self._batch, completed=number)
        self._bars.update(self._all, advance=self._size * (number - self._at))
        self._at = number
        self._show(f"{self._done}/{self._runs} runs done; {values(number, self._rounds, lanes)}")

    def finished(self, runs: int) -> None:
        """The batch's runs are on disk."""
        self._done += runs
        self._bars.update(self._group, advance=runs)

    def _show(self, line: str, now: bool = False) -> None:
        if self._console.is_terminal:
            self._values.plain = line
            return
        if now or self._at == self._rounds or time.monotonic() - self._printed >= EVERY:
            self._printed = time.monotonic()
            self._console.print(line, soft_wrap=True)


def values(number: int, rounds: int, lanes: Sequence[Sequence[dict[str, Any]]]) -> str:
    """The figures that matter of runs side by side: owners now, copies and rounds so far."""
    noise = [rows for rows in lanes if any(row["protected"] for row in rows)]
    owners = [rows[-1]["owner_accuracy"] for rows in noise or lanes if rows[-1]["finite"]]
    line = f"round {number}/{rounds}: owners "
    line += f"{min(owners):.3f} to {max(owners):.3f}" if owners else "–"
    shared = [r for rows in noise for r in rows if r["protected"] and r["shipped"] and r["finite"]]
    if shared:
        highest = max(max(row["plus_accuracy"], row["minus_accuracy"]) for row in shared)
        line += f", highest copy {highest:.3f}"
    infeasible = sum(not r["feasible"] for rows in noise for r in rows if r["protected"])
    broken = sum(not rows[-1]["finite"] for rows in lanes)
    line += f", {infeasible} rounds infeasible" if infeasible else ""
    return line + (f", {broken} runs broke down" if broken else "")


def complain(message: str) -> None:
    """One line on standard error, in one piece: other threads write there as well."""
    sys.stderr.write(f"experiments.sweep: {' '.join(message.split())}\n")
    sys.stderr.flush()
