"""From a command line to the runs of a sweep, and to groups of them that share a program."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax

from experiments.flags.fields import listed, plain
from experiments.sweep.options import CommandLine, Setup
from noisefl.errors import refuse
from noisefl.experiment import Experiment, fedavg

# What FedAvg does not depend on: nothing is protected, and then G = W.
PROTECTION = ("scheme", "owner", "accuracy_on")


@dataclasses.dataclass(frozen=True)
class Run:
    """One lane of a sweep.

    Attributes:
      kind: "noise" or "fedavg".
      setup: what it is run with.
      flags: those that its result depends on, JSON values by name.
      grid: its values of the grid's flags, as far as it depends on them, as JSON.
      path: of its folder, below that of the sweep; of a single run its name.
      baseline: path of its FedAvg run; None without, or of one.
    """

    kind: str
    setup: Setup
    flags: dict[str, Any]
    grid: dict[str, Any]
    path: str
    baseline: str | None

    @property
    def experiment(self) -> Experiment:
        """Numbers []."""
        return fedavg(self.setup.experiment) if self.kind == "fedavg" else self.setup.experiment

    @property
    def seed(self) -> int:
        return self.setup.driver.seed

    @property
    def cap(self) -> float | None:
        """As the shortest decimal of its float32, as accuracies are; FedAvg has none."""
        cap = self.setup.experiment.scheme.cap
        return None if self.kind == "fedavg" else plain(cap)

    @property
    def entry(self) -> dict[str, Any]:
        """What the sweep's own file says of it."""
        return {
            "run": self.kind,
            "seed": self.seed,
            "cap": self.cap,
            "grid": self.grid,
            "baseline": self.baseline,
        }


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that one compiled program can hold."""

    runs: tuple[Run, ...]
    title: str


def plan(command: CommandLine) -> list[Run]:
    """Every run of a sweep, in grid order, each FedAvg run before the first that needs it.

    Raises:
      ValueError: a combination of flags that does not go together, or two that are the same run.
    """
    runs: dict[str, Run] = {}
    for values, setup in command.setups():
        reference = None
        if command.driver.baseline:
            flags, own = (
                {n: v for n, v in some.items() if command.path_of(n)[0] not in PROTECTION}
                for some in (setup.flags, values)
            )
            reference = "fedavg" if command.single else path("fedavg", flags)
            runs.setdefault(reference, Run("fedavg", setup, flags, own, reference, None))
        where = "noise" if command.single else path("noise", setup.flags)
        if where not in runs:
            runs[where] = Run("noise", setup, setup.flags, values, where, reference)
        elif runs[where].grid != values:  # owner=keep_best and keep_best+server_clients
            same = listed(runs[where].grid)
            raise refuse("grid", listed(values), f"is the same run as {same}: leave one out")
        # Else they differ in an axis that this run does not have, such as another rule's step.
    return list(runs.values())


def path(kind: str, flags: dict[str, Any]) -> str:
    """`runs/<digest of the configuration>/seed=<n>`."""
    kept = {name: v for name, v in flags.items() if name != "seed"}
    text = json.dumps([kind, kept], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"runs/{digest}/seed={flags['seed']}"


def groups(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in numbers, seeds and partitions alone share a program.

    So do tables of other widths; a validation split of another size does not fit.
    """
    found: dict[Any, list[Run]] = {}
    structures: dict[Any, Any] = {}  # runs that differ in the seed alone hold the same experiment
    for run in runs:
        setup = run.setup
        same = run.kind, id(setup.experiment), id(setup.measures)
        if same not in structures:
            structures[same] = jax.tree.structure((run.experiment, setup.measures))
        deal = setup.deal.num_clients, setup.deal.validation_size
        key = structures[same], setup.driver.dataset, *deal
        found.setdefault(key, []).append(run)
    varied = _varied(runs)
    return [Group(tuple(members), _title(members, varied)) for members in found.values()]


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
    first, flags = members[0].grid, members[0].flags
    rule = "calibrator" if "calibrator" in flags else "scheme"
    named = [str(flags[name]) for name in ("model", "dataset", rule) if name in flags]
    common = {
        flag: first[flag]
        for flag in varied
        if flag not in ("model", "dataset", rule)
        and all(flag in run.grid and run.grid[flag] == first.get(flag) for run in members)
    }
    return ", ".join([*named, *([listed(common)] if common else [])])


def batches(runs: Sequence[Run], width: int) -> list[list[Run]]:
    """At most `width` runs each, in order."""
    return [list(runs[start : start + width]) for start in range(0, len(runs), width)]


def batch_name(runs: Sequence[Run]) -> str:
    """The same runs in the same order are the same batch."""
    return hashlib.sha256("\n".join(run.path for run in runs).encode()).hexdigest()[:12]
