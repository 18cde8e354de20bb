"""What a sweep has left in its folder: its grid, its complete runs, and what is unfinished.

sweep.json says what each planned run is; of a run's own files only summary.json is read, and of
that what the report shows, so that 10,000 runs fit in memory. `rounds` reads the rounds of a run.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from noisefl.config import refuse

Row = dict[str, Any]

SUMMARY = (
    *("owner_accuracy", "max_shared_accuracy", "rounds_over_cap", "protected_rounds"),
    *("infeasible_rounds", "calibration_samples"),
)


FILES = ("config.json", "metrics.jsonl", "summary.json")


def is_complete(folder: Path) -> bool:
    """Whether the folder of a run holds all that it should; it comes into being at once."""
    return all((folder / name).exists() for name in FILES)


class Run(NamedTuple):
    """One complete run.

    Attributes:
      path: of its folder, as sweep.json has it.
      kind: "noise" or "fedavg".
      seed: of its data and keys.
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
      cap: as a share of 1.
      runs: the complete ones.
      unfinished: how many are still to be done.
    """

    values: dict[str, Any]
    cap: float
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
        planned = {path: _planned(path, entry) for path, entry in plan["runs"].items()}
        if not all(isinstance(values, list) for values in grid.values()):
            raise ValueError("sweep.json: a flag of the grid has no list of values")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise refuse("out", str(folder), f"holds no sweep ({error})") from None
    there = {path: run for path, run in planned.items() if is_complete(folder / path)}
    runs = {path: _with_summary(folder, run) for path, run in there.items()}
    return Sweep(folder, grid, len(planned), runs, _configurations(grid, planned, runs))


def rounds(folder: Path, run: Run) -> Iterator[Row]:
    """The rows of a run's metrics.jsonl, rounds 1, 2, …

    Raises:
      ValueError: the file is missing or damaged.
    """
    number = 0
    try:
        with open(folder / run.path / "metrics.jsonl") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if row["round"] != number:
                    raise ValueError(f"line {number} is of round {row['round']}")
                yield row
        if number == 0:
            raise ValueError("it is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
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


def _planned(path: str, entry: Mapping[str, Any]) -> Run:
    """A run as sweep.json has it."""
    cap = math.nan if entry["cap"] is None else entry["cap"]
    values = dict(entry["grid"])
    return Run(path, entry["run"], entry["seed"], cap, values, entry["baseline"], None, {})


def _with_summary(folder: Path, run: Run) -> Run:
    try:
        summary = json.loads((folder / run.path / "summary.json").read_text())
        if failed := summary["failed"]:
            return run._replace(failed={"round": failed["round"], "cause": failed["cause"]})
        return run._replace(summary={name: summary[name] for name in SUMMARY})
    except (ValueError, KeyError, TypeError) as error:
        allowed = f"is a damaged run ({error}); remove it and let the sweep do it again"
        raise refuse("out", str(folder / run.path), allowed) from None


def _configurations(
    grid: dict[str, list[Any]], planned: Mapping[str, Run], runs: Mapping[str, Run]
) -> list[Configuration]:
    """A row each of the report, in the order of the grid."""
    flags = [flag for flag in grid if flag != "seed"]
    members: dict[str, list[Run]] = {}
    for run in planned.values():
        if run.kind == "noise":
            members.setdefault(digest(run.path), []).append(run)
    found = []
    for group in members.values():
        complete = [runs[run.path] for run in group if run.path in runs]
        values = {flag: group[0].values[flag] for flag in flags}
        found.append(Configuration(values, group[0].cap, complete, len(group) - len(complete)))
    return sorted(found, key=lambda one: [grid[flag].index(one.values[flag]) for flag in flags])
