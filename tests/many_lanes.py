"""Seven runs of a tiny model that differ in all that lanes may, and each of them alone."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import noisefl
from noisefl import calibrate, keys, local, measure, noise, optimizers, schemes, simulate, sweep
from noisefl.data import Dataset, Federation
from noisefl.parts import changed

ROUNDS, CHUNK = 4, 2
MEASURE = measure.Standard(local_test_size=20)


class Linear(nn.Module):
    """One dense layer, 3 classes: what compiles fastest."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="dense1")(x.reshape(x.shape[0], -1))


class Lane(NamedTuple):
    """One run."""

    name: str
    seed: int
    data: Federation
    experiment: noisefl.Experiment


def experiment(
    learning_rate: float = 0.5, warmup_rounds: int = 1, **rule: Any
) -> noisefl.Experiment:
    """m = 3 clients, no multiple of the devices that may share them; numbers of the rule differ."""
    tiny = {"cap": 0.55, "strength": 0.4, "strength_step": 0.4, "strength_max": 6.0, "max_tries": 9}
    pair = schemes.Noised(
        on=noise.layers("first", relative=True), calibrator=calibrate.Additive(**{**tiny, **rule})
    )
    return noisefl.Experiment(
        model=Linear(),
        cohort=noisefl.Cohort(3),
        local=local.Training(optimizers.SGD(learning_rate), batch_size=4),
        scheme=schemes.Warmup(pair, warmup_rounds),
        strategy=noisefl.Strategy(eval_batch=8),
    )


@functools.cache
def dataset() -> Dataset:
    """6 × 6 images whose class is the brightest third of the columns."""
    rng = np.random.default_rng(5)

    def split(size: int) -> tuple[Any, np.ndarray]:
        labels = rng.integers(0, 3, size).astype(np.int32)
        images = rng.integers(0, 120, (size, 6, 6, 1)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 2 * label : 2 * label + 2] += 100
        return jnp.asarray(images), labels

    return Dataset("tiny", *split(60), *split(34), 3)


@functools.cache
def data(partition: str = "iid", seed: int = 0) -> Federation:
    """6 clients, 15 images to validate on, 34 to test."""
    deal = noisefl.Deal(num_clients=6, partition=partition, validation_size=15)
    return noisefl.federate(dataset(), deal, seed=seed)


@functools.cache
def lanes() -> tuple[Lane, ...]:
    even, uneven, other = data(), data("lognormal"), data("lognormal", 2)
    fedavg = noisefl.fedavg
    return (
        Lane("even", 0, even, experiment()),
        Lane("another seed and cap", 1, even, experiment(cap=0.4)),
        Lane("uneven clients, small steps", 2, uneven, experiment(0.1)),
        Lane("other clients, long warm-up", 3, other, experiment(warmup_rounds=3)),
        Lane("FedAvg", 0, even, fedavg(experiment())),
        Lane("FedAvg of uneven clients", 2, uneven, fedavg(experiment(0.1))),
        Lane("one try, any accuracy", 0, even, experiment(cap=0.99, max_tries=1)),
    )


def swept(some: Sequence[Lane] | None = None, **options: Any) -> sweep.Result:
    """The lanes by `sweep.run`, 4 at once: with all seven, a batch of 4, and one with a gap."""
    some = lanes() if some is None else some
    return sweep.run(
        [lane.experiment for lane in some],
        jnp.stack([keys.root(lane.seed) for lane in some]),
        [lane.data for lane in some],
        rounds=ROUNDS,
        rounds_per_chunk=CHUNK,
        measure=MEASURE,
        **{"lanes_at_once": 4, **options},
    )


@functools.cache
def program() -> tuple[Any, Any]:
    begin = functools.partial(simulate.begin, measure=MEASURE)
    return jax.jit(begin), jax.jit(simulate.chunk_of_rounds(CHUNK, MEASURE))


def alone(lane: Lane) -> Any:
    """(state, numbers [T] by name) of one run by `simulate`, in NumPy."""
    begin, simulation = program()
    root, chunks = keys.root(lane.seed), []
    state = begin(root, lane.experiment, lane.data)
    for _ in range(0, ROUNDS, CHUNK):
        state, numbers = simulation(root, state, lane.data, lane.experiment, jnp.int32(ROUNDS))
        chunks.append(numbers)
    numbers = jax.tree.map(lambda *leaves: np.concatenate(leaves), *chunks)
    return jax.tree.map(np.asarray, (state, numbers))


def by_name(result: Any) -> dict[str, np.ndarray]:
    """The leaves of (states, numbers)."""
    found = jax.tree.leaves_with_path(tuple(result))
    return {jax.tree_util.keystr(path): leaf for path, leaf in found}


def with_numbers(lane: Lane, part: type, **numbers: Any) -> Lane:
    """The lane with other numbers in every part of that class."""
    return lane._replace(experiment=changed(lane.experiment, part, **numbers))
