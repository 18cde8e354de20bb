"""What a folder holds: the planned runs of a sweep, or of a single run, and what became of them.

sweep.json says what each planned run is; of a run's own files only summary.json is read, and of
that what the report shows, so that 10,000 runs fit in memory. `rows` reads the rounds of a run.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from noisefl.errors import refuse

Row = dict[str, Any]
Frame = Any  # a pandas DataFrame: what pandas says of its own types is too wide to be checked

NUMBERS = (  # of summary.json
    "owner_accuracy_final", "shared_accuracy_max_test", "rounds_over_cap_test",
    "protected_rounds", "infeasible_rounds", "calibration_samples",
)  # fmt: skip
DAMAGED = (  # by what a file of another shape, or nested too deep, is told
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip
FILES = ("config.json", "metrics.jsonl", "summary.json")  # of a complete run

# Of metrics.jsonl, what pictures need; of a pair there is plus_accuracy and minus_accuracy besides.
SWITCHES = ("protected", "feasible", "shipped", "finite")
MEASURED = (
    "round", "owner_accuracy", "base_accuracy", "shared_accuracy", "strength", "calibration_tries",
)  # fmt: skip


class Sweep(NamedTuple):
    """A folder's worth.

    Attributes:
      folder: of the sweep or the run.
      grid: the values of each flag, as given; empty of a single run.
      runs: a row a planned run by its path, in the order of the grid. Columns: run ("noise" or
        "fedavg"), seed, cap (share of 1; NaN of FedAvg), grid (flags that it depends on), baseline
        (path of its FedAvg run), folder, configuration (all but the seed), label, complete, failed,
        round and cause (of a failure), and `NUMBERS`, NaN unless it is complete and sound.
    """

    folder: Path
    grid: dict[str, list[Any]]
    runs: Frame

    @property
    def flags(self) -> list[str]:
        """Of the grid, without the seed."""
        return [flag for flag in self.grid if flag != "seed"]

    @property
    def noise(self) -> Frame:
        return self.runs[self.runs["run"] == "noise"]

    @property
    def sound(self) -> Frame:
        """Runs that are complete and did not fail."""
        return self.runs[self.runs["complete"] & ~self.runs["failed"]]


def read(folder: Path) -> Sweep:
    """The sweep, or the single run as a sweep of one configuration and one seed.

    Raises:
      ValueError: the folder holds neither, or a run in it is damaged.
    """
    try:
        single = not (folder / "sweep.json").exists() and (folder / "config.json").exists()
        plan = json.loads((folder / ("config.json" if single else "sweep.json")).read_text())
        grid, runs = dict({} if single else plan["grid"]), plan["runs"]
        if not all(isinstance(values, list) for values in grid.values()):
            raise TypeError("a flag of the grid has no list of values")
        if not all(isinstance(run["grid"], dict) for run in runs.values()):
            raise TypeError("a run has no values by flag")
        places = {  # FedAvg has not all flags
            path: [values.index(run["grid"].get(flag, values[0])) for flag, values in grid.items()]
            for path, run in runs.items()
        }
        columns = ["run", "seed", "cap", "grid", "baseline"]
        table: Frame = pd.DataFrame(
            [[runs[path][name] for name in columns] for path in places], list(places), columns
        ).loc[sorted(places, key=lambda path: places[path])]
        table = table.astype({"cap": float, "baseline": object, "grid": object})
    except FileNotFoundError:
        what = "holds no sweep and no run" if folder.is_dir() else "is no folder"
        raise refuse("out", str(folder), what) from None
    except DAMAGED as error:
        raise refuse("out", str(folder), f"holds no sweep and no run ({error!r})") from None
    table["folder"] = [folder if single else folder / path for path in table.index]
    table["configuration"] = [Path(path).parent.name or path for path in table.index]
    table["label"] = [
        describe(run["grid"], "seed") or f"cap={run['cap']:g}".replace("cap=nan", "no cap")
        for _, run in table.iterrows()
    ]
    outcomes = [_outcome(run["folder"], run["run"], single) for _, run in table.iterrows()]
    columns = ["complete", "failed", "round", "cause", *NUMBERS]
    found: Frame = pd.DataFrame(outcomes, table.index, columns)
    types = {"complete": bool, "failed": bool, **dict.fromkeys(NUMBERS, float)}
    return Sweep(folder, grid, table.join(found.astype(types)))


def _outcome(folder: Path, kind: str, single: bool) -> Row:
    """What became of a run. A single run's summary is of the noise run, and has what its FedAvg
    came to under names of their own."""
    if not all((folder / name).exists() for name in FILES):
        return {"complete": False, "failed": False}
    try:
        summary = json.loads((folder / "summary.json").read_text())
        if single and kind == "fedavg":
            owner, failed = summary["baseline_accuracy_final"], summary["baseline_failed"]
            summary = {**dict.fromkeys(NUMBERS), "owner_accuracy_final": owner, "failed": failed}
        failed = summary["failed"]
        if failed:
            return {"complete": True, "failed": True} | {n: failed[n] for n in ("round", "cause")}
        numbers = {n: None if summary[n] is None else float(summary[n]) for n in NUMBERS}
        return {"complete": True, "failed": False, **numbers}
    except DAMAGED as error:
        allowed = f"is a damaged run ({error!r}); remove it and let the driver do it again"
        raise refuse("out", str(folder), allowed) from None


def rows(folder: Path, kind: str) -> Iterator[Row]:
    """The rows of one kind of run in metrics.jsonl, rounds 1, 2, …

    Raises:
      ValueError: the file is missing or damaged.
    """
    number = 0
    try:
        with open(folder / "metrics.jsonl") as file:
            for row in map(json.loads, file):
                if row["run"] == kind:
                    number += 1
                    if row["round"] != number:
                        raise ValueError(f"round {row['round']} stands where {number} should")
                    yield row
        if number == 0:
            raise ValueError(f"no round of {kind}")
    except DAMAGED as error:
        raise refuse("out", str(folder), f"metrics.jsonl: {error!r}") from None


def rounds(rows: Sequence[Row]) -> Frame:
    """Rows as columns: run, `SWITCHES` as bool, the others of a picture as float, NaN for null.

    Raises:
      ValueError: rows without one of them.
    """
    table: Frame = pd.DataFrame(rows)
    if missing := [name for name in ("run", *MEASURED, *SWITCHES) if name not in table]:
        raise refuse("rows", list(table), f"lack {', '.join(missing)}")
    numbers = [*MEASURED, "plus_accuracy", "minus_accuracy"]
    table = table.reindex(columns=["run", *numbers, *SWITCHES])
    switches = {name: table[name].eq(True) for name in SWITCHES}
    try:
        return table.assign(**switches).astype(dict.fromkeys(numbers, float))
    except (ValueError, TypeError) as error:
        raise refuse("rows", len(rows), f"have what is no number ({error})") from None


def option(options: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A flag's value by its last part: "cap" finds "scheme.calibrator.cap"."""
    found = [value for flag, value in options.items() if last_part(flag) == name]
    return options.get(name, found[0] if found else default)


def last_part(flag: str) -> str:
    return flag.rpartition(".")[2]


def describe(values: Mapping[str, Any], *but: str) -> str:
    """`cap=0.4, calibrator=sequential`, but for some flags by their last part."""
    kept = {flag: value for flag, value in values.items() if last_part(flag) not in but}
    return ", ".join(f"{flag}={shown(value)}" for flag, value in kept.items())


def shown(value: Any) -> str:
    """A flag's value as the command line takes it."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
