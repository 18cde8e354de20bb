"""From flags and a grid to the runs of a sweep, and to groups of them that share a program."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from experiments import helppage
from experiments.grid import Axis, combinations
from experiments.options import Options, from_flags
from experiments.sweep_results import describe
from noisefl.config import Config, Hyper, fedavg, refuse
from noisefl.models import Lowering

# What FedAvg does not depend on: the noise is off, and then G = W.
NOISE_ALONE = {
    *helppage.GROUPS["Noise"],
    *helppage.GROUPS["Calibration"],
    *helppage.GROUPS["Server"],
}
# No result depends on these, or (the seed) the runs of one configuration differ in it.
NOT_OF_A_CONFIGURATION = {
    *("seed", "out", "resume", "rounds_per_chunk", "checkpoint_every"),
    *("compilation_cache", "data_dir"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One lane of a sweep.

    Attributes:
      kind: "noise" or "fedavg".
      options: what it is run with.
      flags: the flags that its result depends on, JSON values by name.
      grid: its values of the grid's flags, as far as it depends on them.
      path: of its folder, below that of the sweep.
      baseline: path of its FedAvg run; None without, or of one.
    """

    kind: str
    options: Options
    flags: dict[str, Any]
    grid: dict[str, Any]
    path: str
    baseline: str | None

    @property
    def hyper(self) -> Hyper:
        return fedavg(self.options.hyper) if self.kind == "fedavg" else self.options.hyper

    @property
    def cap(self) -> float | None:
        """FedAvg has none."""
        return self.options.cap if self.kind == "noise" else None

    @property
    def entry(self) -> dict[str, Any]:
        """What sweep.json says of it."""
        return {
            "run": self.kind,
            "seed": self.options.driver.seed,
            "cap": self.cap,
            "grid": self.grid,
            "baseline": self.baseline,
        }


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that one compiled program can hold."""

    config: Config
    lowering: Lowering
    model: str
    dataset: str
    runs: tuple[Run, ...]
    title: str


def plan(given: dict[str, Any], axes: Sequence[Axis], baseline: bool) -> list[Run]:
    """Every run of a sweep, in grid order, each FedAvg run before the first that needs it.

    Args:
      given: values of all flags of `experiments.run`.
      axes: the grid.
      baseline: whether FedAvg is run as well, once for all runs that differ in the noise alone.

    Raises:
      ValueError: a combination of flags that `experiments.run` would refuse, or two that are the
        same run.
    """
    runs: dict[str, Run] = {}
    for values in combinations(axes):
        options = from_flags({**given, **values})
        reference = None
        if baseline:
            flags = {name: v for name, v in options.flags.items() if name not in NOISE_ALONE}
            grid = {name: v for name, v in values.items() if name not in NOISE_ALONE}
            reference = path("fedavg", flags)
            one = Run("fedavg", options, flags, grid, reference, None)
            runs.setdefault(reference, one)
        where = path("noise", options.flags)
        if where in runs:  # server_clients=m/2 and 5, of 10 sampled clients
            same = describe(runs[where].grid)
            raise refuse("grid", describe(values), f"is the same run as {same}: leave one out")
        runs[where] = Run("noise", options, options.flags, values, where, reference)
    return list(runs.values())


def path(kind: str, flags: dict[str, Any]) -> str:
    """`runs/<digest of the configuration>/seed=<n>`."""
    kept = {name: v for name, v in flags.items() if name not in NOT_OF_A_CONFIGURATION}
    text = json.dumps([kind, kept], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"runs/{digest}/seed={flags['seed']}"


def groups(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in numbers, seeds and partitions alone share a program.

    So do tables of other widths; a validation split of another size does not fit.
    """
    found: dict[Any, list[Run]] = {}
    for run in runs:
        o = run.options
        size = o.federation["validation_size"]
        key = (o.config, o.lowering, o.driver.model, o.driver.dataset, size)
        found.setdefault(key, []).append(run)
    varied = _varied(runs)
    return [
        Group(config, lowering, model, dataset, tuple(members), _title(members, varied))
        for (config, lowering, model, dataset, _), members in found.items()
    ]


def _varied(runs: Sequence[Run]) -> list[str]:
    """The grid's flags of more than one value."""
    values: dict[str, set[Any]] = {}
    for run in runs:
        for flag, value in run.grid.items():
            values.setdefault(flag, set()).add(value)
    return [flag for flag, some in values.items() if len(some) > 1]


def _title(members: Sequence[Run], varied: Sequence[str]) -> str:
    """`lenet5, mnist, geometric, num_clients=50`: what all runs of a group have in common."""
    members = [run for run in members if run.kind == "noise"] or members
    first, driver = members[0].grid, members[0].options.driver
    named = (driver.model, driver.dataset, members[0].options.config.calibrator)
    common = {
        flag: first[flag]
        for flag in varied
        if flag not in ("model", "dataset", "calibrator")
        and all(flag in run.grid and run.grid[flag] == first.get(flag) for run in members)
    }
    return ", ".join([*named, *([describe(common)] if common else [])])


def batches(runs: Sequence[Run], width: int) -> list[list[Run]]:
    """At most `width` runs each, in order."""
    return [list(runs[start : start + width]) for start in range(0, len(runs), width)]


def batch_name(runs: Sequence[Run]) -> str:
    """The same runs in the same order are the same batch."""
    return hashlib.sha256("\n".join(run.path for run in runs).encode()).hexdigest()[:12]
