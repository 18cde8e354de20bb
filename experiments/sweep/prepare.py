"""One group of runs: its data, experiments and program; what is wrong with them is found here."""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import Mesh

from experiments.sweep.options import Driver
from experiments.sweep.plan import Group, Run
from noisefl import keys, layout, mesh, parts, sweep
from noisefl.data import Dataset, Federation, federate, holdings, load
from noisefl.errors import refuse
from noisefl.experiment import Experiment
from noisefl.schemes import Warmup

MOST_MAPS = 30_000  # a group's two programs have some 8,000


class Inputs(NamedTuple):
    """Of one batch, on the devices."""

    seeds: jax.Array
    data: Federation
    experiments: Experiment


class Compiled(NamedTuple):
    """A program, the lanes that it has, and the seconds that its compilation took."""

    lanes: int
    program: sweep.Program
    seconds: float


@dataclasses.dataclass(frozen=True)
class Lanes:
    """A group, checked.

    Attributes:
      columns: of the widest table of clients of all runs.
      traced: programs by lanes and rounds a chunk, so that none is traced twice.
    """

    group: Group
    dataset: Dataset
    columns: int
    traced: dict[tuple[int, int], sweep.Traced] = dataclasses.field(default_factory=dict)

    def experiment(self, run: Run) -> Experiment:
        """For the classes of the data set, with everything automatic chosen for this machine."""
        experiment = run.experiment
        model = experiment.model
        if isinstance(model, nn.Module) and hasattr(model, "num_classes"):
            model = model.clone(num_classes=self.dataset.num_classes)
        if experiment.pixels == "normalised":
            experiment = experiment.normalised(self.dataset)
        return experiment.replace(model=model).resolved()

    def width(self, on: Mesh, lanes_at_once: int | None) -> int:
        """Lanes of a batch, before anyone knows whether they fit."""
        return layout.width(len(self.group.runs), on, lanes_at_once)

    def trace(self, on: Mesh, width: int, rounds_per_chunk: int) -> sweep.Traced:
        """The program of a batch of `width` lanes, before XLA sees it.

        Raises:
          ValueError: parts that do not fit each other.
        """
        key = width, rounds_per_chunk
        if key not in self.traced:
            first = self.group.runs[0]
            data = federate(self.dataset, first.setup.deal, seed=first.seed)
            self.traced[key] = sweep.trace(
                parts.lanes([self.experiment(first)]), layout.stack([data], self.columns),
                width, rounds_per_chunk, on, first.setup.measures,
            )  # fmt: skip
        return self.traced[key]

    def compile(self, on: Mesh, width: int, rounds_per_chunk: int) -> Compiled:
        """The program of a batch of `width` lanes, or of as many as fit.

        Raises:
          TooLarge: not even one lane a device does.
        """
        begin = time.perf_counter()

        def one(width: int) -> sweep.Program:
            return self.trace(on, width, rounds_per_chunk).compile()

        return Compiled(*sweep.fitting(one, width, on), time.perf_counter() - begin)

    def inputs(self, on: Mesh, runs: Sequence[Run], width: int, warmed_up: bool = False) -> Inputs:
        """Of a batch; where it has fewer runs than lanes, the first run fills them up.

        Args:
          on: the devices.
          runs: at most `width`.
          width: lanes.
          warmed_up: no round is one of warm-up, not even FedAvg's.
        """
        mine = [runs[place] for place in layout.own_places(on, width, len(runs))]
        dealt = {_dealt(run): run for run in mine}  # runs that differ in numbers share their data
        data = {key: federate(self.dataset, r.setup.deal, seed=r.seed) for key, r in dealt.items()}
        stacked = layout.stack([data[_dealt(run)] for run in mine], self.columns)
        seeds = np.stack([np.asarray(jax.random.key_data(keys.root(run.seed))) for run in mine])
        each = [self.experiment(run) for run in mine]
        if warmed_up:
            each = [parts.changed(one, Warmup, warmup_rounds=0) for one in each]
        over = mesh.over_lanes(on)
        return Inputs(
            mesh.put(seeds, over), layout.put(stacked, on), mesh.put(parts.lanes(each), over)
        )


def prepare(group: Group, driver: Driver, on: Mesh) -> Lanes:
    """Loads the data and traces the program: finds what is wrong with either, in seconds.

    Raises:
      ValueError, OSError: a model that does not take the images, a partition that cannot be made,
        parts that do not fit each other.
    """
    first = group.runs[0]
    dataset = dataset_of(first.setup.driver.dataset, driver.data_dir)
    labels = np.asarray(dataset.train_labels)
    distinct = {_dealt(run): run for run in group.runs}.values()
    held = (holdings(labels, r.setup.deal, r.seed, dataset.train_writers) for r in distinct)
    columns = max(each.clients.shape[1] for each in held)
    lanes = Lanes(group, dataset, columns)
    model, shape = lanes.experiment(first).functions, dataset.train_images.shape[1:]
    try:
        logits = model.classes(shape)
    except ValueError as error:  # by the name of its class
        raise refuse("model", first.flags["model"], str(error).partition(": ")[2]) from None
    if logits < dataset.num_classes:
        allowed = f"has logits of {logits} classes, and the data set has {dataset.num_classes}"
        raise refuse("model", first.flags["model"], allowed)
    lanes.trace(on, lanes.width(on, driver.lanes_at_once), driver.rounds_per_chunk)
    return lanes


@functools.lru_cache(maxsize=1)  # the images of one data set at a time
def dataset_of(name: str, data_dir: str) -> Dataset:
    """A data set with its images on the device, where every lane can share them.

    Raises:
      ValueError, OSError: as `load` does.
    """
    dataset = load(name, data_dir or None)
    return dataclasses.replace(
        dataset,
        train_images=jnp.asarray(dataset.train_images),
        test_images=jnp.asarray(dataset.test_images),
    )


def _dealt(run: Run) -> tuple[Any, ...]:
    """Two runs of a group with the same have the same data."""
    deal = run.setup.deal
    return run.seed, jax.tree.structure(deal), *map(float, jax.tree.leaves(deal))


def forget() -> None:
    """Lets go of compiled programs, which JAX's caches hold for good, where they are many.

    On CPUs each takes thousands of the 65,530 memory maps that Linux grants a process: that ended
    sweeps of more than 16 programs. What the next group may use again, such as the program of
    thieves, is kept as long as there is room.
    """
    try:
        maps = Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:  # not Linux
        return
    if maps > MOST_MAPS:
        jax.clear_caches()


@contextlib.contextmanager
def compilation_cache(choice: str) -> Iterator[None]:
    """Keeps compiled programs over processes: in a folder, "auto" the user's cache, or "off"."""
    before = jax.config.values["jax_compilation_cache_dir"]  # the environment may have set it
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "noisefl" / "jax"
    path = {"off": None, "auto": before or str(cache)}.get(choice, choice)
    jax.config.update("jax_compilation_cache_dir", path)
    reset_cache()  # JAX looks at the setting only once
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        reset_cache()
