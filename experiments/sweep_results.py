"""What a sweep has left in its folder: its grid, its complete runs, and what is unfinished.

Of a run only config.json and summary.json are read, and of those only what the report shows, so
that 10,000 runs fit in memory; `rounds` reads the rounds of one run.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from noisefl.config import refuse

Row = dict[str, Any]

SUMMARY = (
    *("owner_accuracy", "max_shared_accuracy", "rounds_over_cap", "protected_rounds"),
    *("infeasible_rounds", "calibration_samples"),
)


class Run(NamedTuple):
    """One complete run.

    Attributes:
      path: of its folder, as sweep.json has it.
      kind: "noise" or "fedavg".
      seed: of its options, as is the cap.
      cap: as a share of 1; NaN of a FedAvg run, which has none.
      values: of the grid's flags that it depends on.
      baseline: path of its FedAvg run; None without, or of one.
      failed: the "round" and "cause" at which it broke down, else None.
      summary: `SUMMARY` by name; empty if it failed, because none of it counts then.
    """

    path: str
    kind: str
    seed: int
    cap: float
    values: dict[str, Any]
    baseline: str | None
    failed: Row | None
    summary: Row


class Configuration(NamedTuple):
    """The noise runs that differ in nothing but the seed.

    Attributes:
      values: of the grid's flags, without the seed.
      cap: as a share of 1; None where no run is there to say.
      runs: the complete ones.
      unfinished: how many are still to be done.
    """

    values: dict[str, Any]
    cap: float | None
    runs: list[Run]
    unfinished: int

    @property
    def sound(self) -> list[Run]:
        """The runs that did not fail."""
        return [run for run in self.runs if run.failed is None]

    @property
    def label(self) -> str:
        return describe(self.values or {"cap": self.cap})


class Sweep(NamedTuple):
    """A folder's worth.

    Attributes:
      folder: of the sweep.
      grid: the values of each flag, as given.
      planned: how many runs, noise and FedAvg.
      runs: the complete ones by path.
      configurations: in the order of the grid, its first flag the slowest.
    """

    folder: Path
    grid: dict[str, list[Any]]
    planned: int
    runs: dict[str, Run]
    configurations: list[Configuration]

    @property
    def failed(self) -> list[Run]:
        return [run for run in self.runs.values() if run.failed is not None]

    @property
    def unfinished(self) -> int:
        return self.planned - len(self.runs)

    def baseline(self, run: Run) -> Run | None:
        """The FedAvg run beside a noise run, if it is complete and did not fail."""
        found = self.runs.get(run.baseline or "")
        return None if found is None or found.failed is not None else found


def read(folder: Path) -> Sweep:
    """The sweep in a folder.

    Raises:
      ValueError: the folder holds no sweep, or a run in it is damaged.
    """
    try:
        plan = json.loads((folder / "sweep.json").read_text())
        grid: dict[str, list[Any]] = dict(plan["grid"])
        planned = list(dict.fromkeys(map(str, plan["runs"])))
        if not all(isinstance(values, list) for values in grid.values()):
            raise ValueError("sweep.json: a flag of the grid has no list of values")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise refuse("out", str(folder), f"holds no sweep ({error})") from None
    found = ((path, _read_run(folder, path)) for path in planned)
    runs = {path: run for path, run in found if run is not None}
    return Sweep(folder, grid, len(planned), runs, _configurations(grid, planned, runs))


def rounds(folder: Path, run: Run) -> Iterator[Row]:
    """The rows of a run's metrics.jsonl, in order.

    Raises:
      ValueError: the file is missing or damaged.
    """
    try:
        with open(folder / run.path / "metrics.jsonl") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise refuse("out", str(folder / run.path), f"metrics.jsonl: {error}") from None


def describe(values: dict[str, Any]) -> str:
    """`cap=0.4, calibrator=sequential`."""
    return ", ".join(f"{flag}={shown(value)}" for flag, value in values.items())


def shown(value: Any) -> str:
    """A flag's value as the command line takes it."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def digest(path: str) -> str:
    """The name of a configuration: runs/3f2a/seed=0 → 3f2a."""
    return PurePosixPath(path).parent.name


def _read_run(folder: Path, path: str) -> Run | None:
    """None if it is unfinished; ValueError if it is there and cannot be read."""
    try:
        config = json.loads((folder / path / "config.json").read_text())
        summary = json.loads((folder / path / "summary.json").read_text())
        failed = summary["failed"]
        return Run(
            path,
            config["run"],
            config["options"]["seed"],
            config["options"]["cap"] if config["run"] == "noise" else math.nan,
            dict(config["grid"]),
            config["baseline"],
            failed and {"round": failed["round"], "cause": failed["cause"]},
            {} if failed else {name: summary[name] for name in SUMMARY},
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        allowed = f"is a damaged run ({error}); remove it and let the sweep do it again"
        raise refuse("out", str(folder / path), allowed) from None


def _configurations(
    grid: dict[str, list[Any]], planned: Sequence[str], runs: dict[str, Run]
) -> list[Configuration]:
    """A row each of the report, in the order of the grid."""
    flags = [flag for flag in grid if flag != "seed"]
    groups: dict[str, list[Run]] = {}
    for path, run in runs.items():
        groups.setdefault(digest(path), []).append(run)
    unfinished = Counter(digest(path) for path in planned if path not in runs)
    placed = []
    for name, group in groups.items():
        if group[0].kind == "noise":
            values = {flag: group[0].values.get(flag) for flag in flags}
            one = Configuration(values, group[0].cap, group, unfinished[name])
            placed.append((_place(grid, values), one))

    # A configuration of which no run is complete has left no file that gives its values: it is
    # one of the grid's that are not there, unless the plan lacks some of these.
    baselines = {digest(run.baseline) for run in runs.values() if run.baseline}
    unknown = len(set(unfinished) - set(groups) - baselines)
    there = {place for place, _ in placed}
    places = itertools.product(*(range(len(grid[flag])) for flag in flags))
    absent = [place for place in places if place not in there]
    if len(absent) <= unknown:
        for place in absent:
            values = {flag: grid[flag][at] for flag, at in zip(flags, place, strict=True)}
            one = Configuration(values, values.get("cap"), [], len(grid.get("seed", [0])))
            placed.append((place, one))
    return [one for _, one in sorted(placed, key=lambda pair: pair[0])]


def _place(grid: dict[str, list[Any]], values: dict[str, Any]) -> tuple[int, ...]:
    """Where in the grid a configuration stands; after all others what the grid does not have."""
    return tuple(
        grid[flag].index(value) if value in grid[flag] else len(grid[flag])
        for flag, value in values.items()
    )
