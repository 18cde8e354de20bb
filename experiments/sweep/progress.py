"""What a person sees while runs go on: bars in a terminal, now and then a line elsewhere."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

EVERY = 5  # seconds between two lines outside of a terminal, of a single run; six times of a sweep


class Progress:
    """Use as a context manager.

    Args:
      runs: of the sweep; 2 of a single run and its FedAvg.
      groups: of the sweep.
      rounds: of each run.
      quiet: shows nothing, as all processes but the first.
      console: where to write; standard error if None, so that output can be piped.
    """

    def __init__(
        self, runs: int, groups: int, rounds: int, quiet: bool, console: Console | None = None
    ):
        self._console = console or Console(stderr=True, highlight=False, quiet=quiet)
        self._rounds, self._groups = rounds, groups
        self._done, self._runs = 0, runs
        self._every = EVERY if runs <= 2 else 6 * EVERY
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=600,  # a round of a large model may take a minute
        )
        # Counted in rounds of all runs, so that time left moves before the first run is done.
        self._all = self._bars.add_task("compiling", total=runs * rounds, unit="rounds in all")
        self._group = self._bars.add_task("group", total=None, unit="runs", visible=False)
        self._batch = self._bars.add_task("batch", total=rounds, unit="rounds", visible=False)
        self._values = Text()
        self._live = Live(Group(self._bars, self._values), console=self._console)
        self._animated = self._console.is_terminal and not self._console.is_dumb_terminal
        self._size, self._at, self._printed = 0, 0, 0.0

    def __enter__(self):
        if self._animated:
            self._live.start()
        return self

    def __exit__(self, *exception):
        self.stop()

    @property
    def tasks(self) -> list[Task]:
        """The bars: of all, of the group, of the batch."""
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
        if self._groups > 1 or runs > 2:
            description = f"group {number}/{self._groups}"
            self._bars.reset(
                self._group, description=description, total=runs, completed=done, visible=True
            )
            title = f"{description}: {title}"
        self._show(f"{title}; compiling", now=True)

    def batch(self, runs: int, done: int) -> None:
        """Begins a batch, by the number of its runs that are not done, of which rounds may be."""
        self._size, self._at = runs, done
        if self._runs > 2:
            description = f"{runs} side by side"
            self._bars.reset(self._batch, description=description, completed=done, visible=True)
        self._bars.update(self._all, advance=runs * done, description="running")

    def rounds(self, number: int, kinds: Sequence[str], columns: Mapping[str, Any]) -> None:
        """The batch has come to a round; arguments as of `values`."""
        self._bars.update(self._batch, completed=number)
        self._bars.update(self._all, advance=self._size * (number - self._at))
        self._at = number
        line = values(number, self._rounds, kinds, columns)
        self._show(line if self._runs <= 2 else f"{self._done}/{self._runs} runs done; {line}")

    def concluding(self, lanes: int, width: int) -> None:
        """The rounds of the batch are done, and its measures look back: thieves of so many of its
        lanes are through."""
        at = f"of {lanes}/{width} lanes done" if lanes else "at work on what they have seen"
        if lanes < width:
            self._show(f"round {self._rounds}/{self._rounds}; thieves {at}", now=True)

    def finished(self, runs: int) -> None:
        """The batch's runs are on disk."""
        self._done += runs
        self._bars.update(self._group, advance=runs)

    def _show(self, line: str, now: bool = False) -> None:
        if self._animated:
            self._values.plain = line
            return
        due = time.monotonic() - self._printed >= self._every
        if now or self._at == self._rounds or due:
            self._printed = time.monotonic()
            self._console.print(line, soft_wrap=True, markup=False)  # of paths with brackets


def values(number: int, rounds: int, kinds: Sequence[str], columns: Mapping[str, Any]) -> str:
    """The figures that matter of runs side by side, now and so far, in one line.

    Args:
      number: round that they have come to.
      rounds: of each run.
      kinds: "noise" or "fedavg", of each lane that is filled.
      columns: arrays [L, t] of their rounds; "round" is 0 where there was none.
    """
    own = {name: np.asarray(column)[: len(kinds)] for name, column in columns.items()}
    lanes, at = np.arange(len(kinds)), np.argmax(own["round"], axis=1)
    noise, sound = np.array(kinds) == "noise", own["finite"][lanes, at]
    owners = own["owner_accuracy"][lanes, at]
    words = [
        f"{label} {_span(some)}"
        for label, some in (("owner", owners[sound & noise]), ("FedAvg", owners[sound & ~noise]))
        if len(some)
    ]
    protected = own["protected"] & (own["round"] > 0)
    shared = own["shared_accuracy"][protected & own["shipped"] & own["finite"]]
    if len(shared):
        words.append(f"highest copy {np.max(shared):.3f}")
    if noise.sum() == 1 and protected[noise, at[noise]].all():
        words.append(f"σ {own['strength'][noise, at[noise]][0]:.3g}")
    counts = (
        (np.sum(protected & ~own["feasible"]), "rounds infeasible"),
        (np.sum(~sound), "runs broke down"),
    )
    words += [f"{count} {what}" for count, what in counts if count]
    return f"round {number}/{rounds}: {', '.join(words)}"


def _span(accuracies: Any) -> str:
    low, high = np.min(accuracies), np.max(accuracies)
    return f"{low:.3f}" if len(accuracies) == 1 else f"{low:.3f} to {high:.3f}"
