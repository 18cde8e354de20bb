"""What a person sees while a run goes on: a bar in a terminal, now and then a line elsewhere."""

from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

LINES_A_RUN = 12  # outside of a terminal


class RunProgress:
    """Use as a context manager.

    Args:
      rounds: of each run.
      runs: number of runs.
      console: where to write; standard error if None, so that output can be piped.
    """

    def __init__(self, rounds: int, runs: int, console: Console | None = None):
        self._console = console or Console(stderr=True, highlight=False)
        self._rounds = rounds
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:.0f}/{task.total:.0f} rounds"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=300,  # a round of a large model may take a minute
        )
        self._task = self._bar.add_task("compiling", total=runs * rounds)
        self._values = Text()
        self._live = Live(Group(self._bar, self._values), console=self._console)
        self._printed: dict[str, int] = {}

    def __enter__(self):
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception):
        self.stop()

    def stop(self) -> None:
        """Leaves the terminal as it was; safe to call twice."""
        self._live.stop()

    def skip(self, rounds: int) -> None:
        """Rounds that an earlier process has done."""
        done = int(self._bar.tasks[0].completed)
        # Not an update: that would count as speed and spoil the time left.
        self._bar.reset(self._task, completed=done + rounds)

    def update(self, rows: list[dict[str, Any]]) -> None:
        """Shows the rows of a chunk: the last of them."""
        row = rows[-1]
        self._bar.update(self._task, advance=len(rows), description=row["run"])
        line = values(row, self._rounds)
        if self._console.is_terminal:
            self._values.plain = line
            return
        due = self._printed.get(row["run"], -self._rounds) + max(self._rounds // LINES_A_RUN, 1)
        if row["round"] >= due or row["round"] == self._rounds:
            self._printed[row["run"]] = row["round"]
            self._console.print(line, soft_wrap=True)


def values(row: dict[str, Any], rounds: int) -> str:
    """One row in one line of less than 80 columns."""
    # Nobody holds a degraded copy in a round without noise.
    names = ("owner", "base", "plus", "minus") if row["protected"] else ("owner",)
    accuracies = [f"{name} {_number(row[f'{name}_accuracy'], '.3f')}" for name in names]
    line = f"{row['run']} {row['round']}/{rounds} {' '.join(accuracies)}"
    if not row["protected"]:
        return line
    line += f" σ {_number(row['strength'], '.3g')} tries {row['calibration_tries']}"
    return line if row["feasible"] else f"{line} infeasible"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
