"""Seven runs of a tiny model that differ in all that lanes may, and each of them alone."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from noisefl import (
    Config,
    Dataset,
    FederatedData,
    Hyper,
    check_hyper,
    federate,
    keys,
    make_round,
    simulate,
    sweep,
)
from noisefl import fedavg as without_noise

ROUNDS, CHUNK = 4, 2
CONFIG = Config(
    image_shape=(6, 6, 1),
    num_clients=6,
    client_fraction=0.5,  # 3 clients, no multiple of the devices that may share them
    batch_size=4,
    noise_scale="relative",
    local_test_size=20,
    eval_batch=8,
)


class Linear(nn.Module):
    """One dense layer, 3 classes: what compiles fastest."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="dense1")(x.reshape(x.shape[0], -1))


class Lane(NamedTuple):
    """One run."""

    name: str
    seed: int
    data: FederatedData
    hyper: Hyper


def hyper(**changes: Any) -> Hyper:
    tiny = {"learning_rate": 0.5, "cap": 0.55, "strength": 0.4, "strength_step": 0.4}
    return check_hyper(Hyper(**{**tiny, "strength_max": 6.0, "max_tries": 9, **changes}), CONFIG)


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
def lanes() -> tuple[Lane, ...]:
    def data(scheme: str, seed: int) -> FederatedData:
        return federate(dataset(), num_clients=6, scheme=scheme, seed=seed, validation_size=15)

    even, uneven, other = data("iid", 0), data("lognormal", 0), data("lognormal", 2)
    return (
        Lane("even", 0, even, hyper()),
        Lane("another seed and cap", 1, even, hyper(cap=0.4)),
        Lane("uneven clients, small steps", 2, uneven, hyper(learning_rate=0.1)),
        Lane("other clients, long warm-up", 3, other, hyper(warmup_rounds=3)),
        Lane("FedAvg", 0, even, without_noise(hyper())),
        Lane("FedAvg of uneven clients", 2, uneven, without_noise(hyper(learning_rate=0.1))),
        Lane("one try, any accuracy", 0, even, hyper(cap=0.99, max_tries=1)),
    )


def swept(some: Sequence[Lane] | None = None, **options: Any) -> sweep.Result:
    """The lanes by `sweep.run`, 4 at once: with all seven, a batch of 4, and one with a gap."""
    some = lanes() if some is None else some
    return sweep.run(
        CONFIG,
        jax.tree.map(lambda *leaves: np.stack(leaves), *(lane.hyper for lane in some)),
        jnp.stack([keys.root(lane.seed) for lane in some]),
        [lane.data for lane in some],
        model=Linear(),
        rounds=ROUNDS,
        rounds_per_chunk=CHUNK,
        **{"lanes_at_once": 4, **options},
    )


@functools.cache
def program() -> tuple[Any, Any]:
    round_ = make_round(Linear(), CONFIG)
    return jax.jit(round_.init), simulate.make_simulation(round_, Linear(), CONFIG, CHUNK)


def alone(lane: Lane) -> Any:
    """(state after the last round, metrics [T]) of one run by `simulate`, NumPy arrays."""
    init, simulation = program()
    root = keys.root(lane.seed)
    state = init(keys.stream(root, "init"))
    chunks = []
    for _ in range(0, ROUNDS, CHUNK):
        state, metrics = simulation(
            keys.stream(root, "rounds"), state, lane.data, lane.hyper, jnp.int32(ROUNDS)
        )
        chunks.append(metrics)
    metrics = jax.tree.map(lambda *leaves: np.concatenate(leaves), *chunks)
    return jax.tree.map(np.asarray, (state, metrics))
