"""Tiny made-up federations, a tiny model, and the library's draws handed to the reference.

The library is asked for its draws by public functions alone: the cohort, its signs and the borrowed
counts out of `RoundInfo`, batches by `client.batches`, unit noise by `noise.draw`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference as ref
import reference_nets as nets
from flax import linen as nn

from noisefl import client, keys, make_round, models, noise
from noisefl.config import Config, Hyper, check_hyper
from noisefl.data import FederatedData
from noisefl.rounds import Round, RoundState

IMAGE = (8, 8, 1)
CLASSES = 4
COUNTS = (9, 1, 6, 12, 3, 7, 4, 10)  # ragged for B = 4, one client of a single sample
VALIDATION, TEST = 37, 29  # primes: 0.6 of either is no whole number of images

# Three rounds in float32 differ from float64 by 1e-6 on parameters of size 2, noise of size 20 in
# between; the rest is room for another backend's order of summation.
CLOSE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-5}
# Compiles in a third of the time; what users get, the default, is compared with it in a test.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


class TinyCNN(nn.Module):
    """One 3 × 3 convolution and a dense layer: 226 parameters. "head" sorts before "stem"."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(models.max_pool(models.Conv(3, 3, name="stem")(x)))
        return nn.Dense(CLASSES, name="head")(x.reshape(x.shape[0], -1))


NET: nets.Net = [("conv", "stem", "SAME"), ("relu",), ("pool",), ("flatten",), ("dense", "head")]


def config(**changes) -> Config:
    """K = 8, m = 4, B = 4."""
    tiny = Config(
        image_shape=IMAGE,
        num_clients=len(COUNTS),
        client_fraction=0.5,
        batch_size=4,
        local_test_size=20,
    )
    return dataclasses.replace(tiny, **changes)


def hyper(config: Config, **changes) -> Hyper:
    """Steps of the loop are exact in binary, so that float32 and float64 agree on each strength."""
    tiny = {"learning_rate": 0.125, "strength_step": 0.5, "strength_max": 8.0}
    return check_hyper(Hyper(**{**tiny, **changes}), config)


@functools.cache
def program(config: Config, optimizer: Any = None, calibrator: Any = None) -> Round:
    """The round with its step compiled, once for all tests of this process."""
    init, step = make_round(TinyCNN(), config, optimizer=optimizer, calibrator=calibrator)
    return Round(init, jax.jit(step, compiler_options=QUICK))


def images(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [N, 8, 8, 1]: one quadrant, the label's, is brighter than the noise around it."""
    pixels = rng.integers(0, 160, (len(labels), *IMAGE))
    for image, label in zip(pixels, labels, strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[row : row + 4, column : column + 4] += 50
    return pixels.astype(np.uint8)


def federation(counts=COUNTS, seed: int = 0) -> FederatedData:
    """Clients of the given sizes; their samples lie scattered, and two columns are padding only."""
    rng = np.random.default_rng(seed)
    owned = rng.permutation(sum(counts)).astype(np.int32)
    table = np.zeros((len(counts), max(counts) + 2), np.int32)
    for k, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
        table[k, :count] = owned[end - count : end]
    labels = [rng.integers(0, CLASSES, n, np.int32) for n in (sum(counts), VALIDATION, TEST)]
    pixels = [images(split, rng) for split in labels]
    return FederatedData(
        train_images=jnp.asarray(pixels[0]),
        train_labels=jnp.asarray(labels[0]),
        clients=jnp.asarray(table),
        counts=jnp.asarray(counts, jnp.int32),
        validation_images=jnp.asarray(pixels[1]),
        validation_labels=jnp.asarray(labels[1]),
        test_images=jnp.asarray(pixels[2]),
        test_labels=jnp.asarray(labels[2]),
    )


@functools.cache
def trained() -> nets.Params:
    """A base W that has learnt the task, by the reference's own descent: its noise must work."""
    data = federation(seed=1)
    pixels, labels = np.asarray(data.train_images), np.asarray(data.train_labels)
    rng = np.random.default_rng(2)
    params = {
        "stem": {"kernel": rng.normal(0, 0.5, (3, 3, 1, 3)), "bias": rng.normal(0, 0.1, 3)},
        "head": {"kernel": rng.normal(0, 0.2, (48, CLASSES)), "bias": np.zeros(CLASSES)},
    }
    batches = [rng.integers(0, len(labels), 10) for _ in range(150)]
    return nets.client_update(NET, params, batches, pixels, labels, 0.3)


def start(round_: Round) -> RoundState:
    """A state at round 0 whose base is trained and whose owner is another model."""
    state = round_.init(keys.root(7))
    base = jax.tree.map(jnp.float32, trained())
    rng = np.random.default_rng(3)
    owner = jax.tree.map(lambda w: w + jnp.float32(rng.normal(0, 0.1, w.shape)), base)
    return dataclasses.replace(state, base=base, owner=owner)


def round_keys(rounds: int, seed: int = 0) -> list[jax.Array]:
    """The keys that a simulation of this seed gives its first rounds."""
    return [keys.stream(keys.root(seed), "round", t) for t in range(1, rounds + 1)]


# The same, for the reference.


def reference_start(state: RoundState) -> ref.State:
    owner, base = nets.as_float64(state.owner), nets.as_float64(state.base)
    return ref.State(int(state.round), owner, base, True, float(state.owner_accuracy))


def options(config: Config, hyper: Hyper) -> ref.Options:
    named = {field.name for field in dataclasses.fields(ref.Options)}
    numbers = {name: value.item() for name, value in dataclasses.asdict(hyper).items()}
    values = {**dataclasses.asdict(config), **numbers}
    values["momentum"] = numbers["momentum"] if config.momentum else None
    values["clip_norm"] = numbers["clip_norm"] if config.clipping else None
    noised = ref.noised_parameters(NET, config.noise_layers, config.noise_parameters)
    return ref.Options(
        net=NET, noised=noised, **{name: values[name] for name in named if name in values}
    )


def reference_data(data: FederatedData, config: Config) -> ref.Data:
    rows = [
        np.asarray(row)[: int(n)]
        for row, n in zip(data.clients, np.asarray(data.counts), strict=True)
    ]
    train_images, train_labels = np.asarray(data.train_images), np.asarray(data.train_labels)
    judged = (
        (data.test_images, data.test_labels)
        if config.accuracy_on == "test"
        else (data.validation_images, data.validation_labels)
    )
    return ref.Data(
        client_images=[train_images[row] for row in rows],
        client_labels=[train_labels[row] for row in rows],
        accuracy_images=np.asarray(judged[0]),
        accuracy_labels=np.asarray(judged[1]),
    )


def local_batches(key: jax.Array, k: int, data: FederatedData, config: Config) -> list[np.ndarray]:
    """Client k's batches of a round, without the padding."""
    padded = data.clients.shape[1]
    positions, valid = client.batches(keys.stream(key, "client", k), data.counts[k], padded, config)
    both = zip(np.asarray(positions), np.asarray(valid), strict=True)
    return [step[mask] for step, mask in both if mask.any()]


def unit_noise(key: jax.Array, j: int, base, config: Config) -> nets.Params:
    """Unit noise of try j, as nested as the parameters are."""
    paths = noise.target(TinyCNN(), config)
    key = keys.stream(keys.stream(key, "calibration"), "try", j)
    nested: nets.Params = {}
    for (layer, name), leaf in noise.draw(key, base, paths, config.noise_distribution).items():
        nested.setdefault(layer, {})[name] = np.asarray(leaf, np.float64)
    return nested


def draws(key: jax.Array, info, base, data: FederatedData, config: Config) -> ref.Draws:
    cohort = [(int(k), int(sign)) for k, sign in zip(info.clients, info.signs, strict=True)]
    return ref.Draws(
        cohort=cohort,
        batches=[local_batches(key, k, data, config) for k, _ in cohort],
        server_counts=np.asarray(info.server_counts).tolist(),
        noise=lambda j: unit_noise(key, j, base, config),
    )
