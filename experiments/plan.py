"""From flags and a grid to the runs of a sweep, and to groups of them that share a program."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from experiments import helppage
from experiments.grid import Axis, combinations
from experiments.options import Options, from_flags
from noisefl.config import Config, Hyper, fedavg
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


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that one compiled program can hold."""

    config: Config
    lowering: Lowering
    model: str
    dataset: str
    runs: tuple[Run, ...]


def plan(given: dict[str, Any], axes: Sequence[Axis], baseline: bool) -> list[Run]:
    """Every run of a sweep, in grid order, each FedAvg run before the first that needs it.

    Args:
      given: values of all flags of `experiments.run`.
      axes: the grid.
      baseline: whether FedAvg is run as well, once for all runs that differ in the noise alone.

    Raises:
      ValueError: a combination of flags that `experiments.run` would refuse.
    """
    runs: dict[str, Run] = {}
    for values in combinations(axes):
        try:
            options = from_flags({**given, **values})
        except OverflowError as error:  # a whole number beyond any integer type
            raise ValueError(f"grid={values!r}: {error}") from None
        reference = None
        if baseline:
            flags = {name: v for name, v in options.flags.items() if name not in NOISE_ALONE}
            grid = {name: v for name, v in values.items() if name not in NOISE_ALONE}
            reference = path("fedavg", flags)
            one = Run("fedavg", options, flags, grid, reference, None)
            runs.setdefault(reference, one)
        where = path("noise", options.flags)
        runs.setdefault(where, Run("noise", options, options.flags, values, where, reference))
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
    return [
        Group(config, lowering, model, dataset, tuple(members))
        for (config, lowering, model, dataset, _), members in found.items()
    ]


def batches(runs: Sequence[Run], width: int) -> list[list[Run]]:
    """At most `width` runs each, in order."""
    return [list(runs[start : start + width]) for start in range(0, len(runs), width)]


def batch_name(runs: Sequence[Run]) -> str:
    """The same runs in the same order are the same batch."""
    return hashlib.sha256("\n".join(run.path for run in runs).encode()).hexdigest()[:12]
