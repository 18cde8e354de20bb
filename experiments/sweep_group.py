"""One group of a sweep: its model and data, its program, and what a batch of its runs puts in."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from experiments.loading import dataset_of, federated, model_of, table_width
from experiments.plan import Group, Run
from noisefl import Config, FederatedData, keys, lanes, make_round, mesh, sweep


class Inputs(NamedTuple):
    """Of one batch, on the devices."""

    seeds: jax.Array
    data: FederatedData
    hypers: Any


class Lanes(NamedTuple):
    """A group, checked."""

    group: Group
    config: Config  # with the image shape of the data set
    model: nn.Module
    num_classes: int
    columns: int  # of the widest table of all runs
    data_dir: str | None

    def width(self, on: Mesh, lanes_at_once: int | None) -> int:
        """Lanes of a batch, before anyone knows whether they fit."""
        return lanes.width(len(self.group.runs), on, lanes_at_once)

    def compile(self, on: Mesh, width: int, rounds_per_chunk: int) -> tuple[int, sweep.Program]:
        """The program of a batch of `width` lanes, or of as many as fit.

        Raises:
          TooLarge: not even one lane a device does.
        """

        def one(width: int) -> sweep.Program:
            data = self.inputs(on, self.group.runs[:width], width).data
            return sweep.make_program(self.model, self.config, data, width, rounds_per_chunk, on)

        return sweep.fitting(one, width, on)

    def inputs(self, on: Mesh, runs: Sequence[Run], width: int) -> Inputs:
        """Of a batch; where it has fewer runs than lanes, the first run fills them up."""
        dataset = dataset_of(self.group.dataset, self.data_dir)
        mine = [runs[place] for place in lanes.own_places(on, width, len(runs))]
        known: dict[Any, FederatedData] = {}  # runs that differ in numbers share their data
        for run in mine:
            key = tuple(run.options.federation.items())
            if key not in known:
                known[key] = federated(dataset, run.options.federation)
        each = [known[tuple(run.options.federation.items())] for run in mine]
        stacked = lanes.stack(each, self.columns)
        roots = [keys.root(run.options.driver.seed) for run in mine]
        seeds = np.stack([np.asarray(jax.random.key_data(root)) for root in roots])
        numbers = [run.hyper for run in mine]
        hypers = jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *numbers)
        over = mesh.over_lanes(on)
        return Inputs(mesh.put(seeds, over), lanes.put(stacked, on), mesh.put(hypers, over))


def prepare(group: Group, data_dir: str | None) -> Lanes:
    """Loads the data and shapes the round: finds what is wrong with either, in seconds.

    Raises:
      ValueError, OSError: a model that does not take the images, a partition that cannot be made,
        noised layers that the model does not have.
    """
    options = group.runs[0].options
    dataset = dataset_of(group.dataset, data_dir)
    model = model_of(options, dataset)
    config = dataclasses.replace(group.config, image_shape=dataset.train_images.shape[1:])
    distinct = {tuple(run.options.federation.items()): run for run in group.runs}
    columns = max(table_width(dataset, run.options.federation) for run in distinct.values())
    make_round(model, config)
    return Lanes(group, config, model, dataset.num_classes, columns, data_dir)
