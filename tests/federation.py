"""Tiny made-up federations, a tiny experiment, and the library's draws handed to the reference.

The library is asked for its draws by public functions alone: the members and the borrowed counts
out of `RoundInfo`, batches by `Training.batches`, unit noise by `Where.draw`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference as ref
import reference_nets as nets
from flax import linen as nn

import noisefl
from noisefl import calibrate, keys, schemes
from noisefl.data import Federation, Images
from noisefl.experiment import Experiment
from noisefl.local import SGD, Training
from noisefl.parts import changed, name_of, walk
from noisefl.round import State

IMAGE = (8, 8, 1)
CLASSES = 4
COUNTS = (9, 1, 6, 12, 3, 7, 8, 10)  # ragged for B = 4, one client of a single sample
EQUAL = (7,) * 8  # as many in all: another table, the same shapes
VALIDATION, TEST = 37, 29  # primes: 0.6 of either is no whole number of images
KEY = keys.root(0)

# Three rounds in float32 differ from float64 by 1e-6 on parameters of size 2, noise of size 20 in
# between; the rest is room for another backend's order of summation.
CLOSE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-5}


class TinyCNN(nn.Module):
    """One 3 × 3 convolution and a dense layer: 226 parameters. "head" sorts before "stem"."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.max_pool(nn.relu(nn.Conv(3, (3, 3), name="stem")(x)), (2, 2), (2, 2))
        return nn.Dense(CLASSES, name="head")(x.reshape(x.shape[0], -1))


def initial(key: jax.Array, images: jax.Array) -> dict:
    """Parameters of the same shapes, for `forward`."""
    kernels = jax.random.split(key)
    shapes = {"stem": (3, 3, 1, 3), "head": (48, CLASSES)}
    return {
        name: {"kernel": jax.random.normal(k, shape) / 3, "bias": jnp.zeros(shape[-1])}
        for k, (name, shape) in zip(kernels, shapes.items(), strict=True)
    }


def forward(params: Any, x: jax.Array) -> jax.Array:
    """The same network as a pure function, which is traced in a third of the time."""
    axes = ("NHWC", "HWIO", "NHWC")
    kernel = params["stem"]["kernel"]
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)
    x = nn.max_pool(nn.relu(x + params["stem"]["bias"]), (2, 2), (2, 2))
    return x.reshape(x.shape[0], -1) @ params["head"]["kernel"] + params["head"]["bias"]


NET: nets.Net = [("conv", "stem", "SAME"), ("relu",), ("pool",), ("flatten",), ("dense", "head")]

# m = 4 of K = 8, B = 4. Steps of the loop are exact in binary, so that float32 and float64 agree on
# each strength.
LOOP = calibrate.Additive(strength_step=0.5, strength_max=8.0)
TINY = Experiment(
    model=(initial, forward),
    cohort=noisefl.Cohort(clients_per_round=4),
    local=Training(SGD(learning_rate=0.125), batch_size=4),
    scheme=schemes.Warmup(schemes.Noised(calibrator=LOOP)),
)
# Fields that together have every number which may be absent.
RICH: dict[str, Any] = dict(
    calibrator=calibrate.Fixed(strength=4.0), noise_layers="stem/kernel|head/bias",
    local_epochs=2, batch_order="every_epoch", momentum=0.0, clip_norm=1e6,
)  # fmt: skip


def experiment(**fields: Any) -> Experiment:
    """`TINY` with other values of its fields, by name, wherever in the tree they stand."""
    made = TINY
    whole = ("scheme", "owner", "calibrator")  # whose own fields may follow
    for name, value in sorted(fields.items(), key=lambda field: field[0] not in whole):
        owners = {type(place.owner) for place in walk(made) if place.name == name}
        assert owners, name
        for cls in owners:
            made = changed(made, cls, **{name: value})
    return made


def observe(key: jax.Array, copy: Any, returned: Any, own: Any) -> Any:
    """What every client received, and what it returned: [M, …]."""
    return copy, returned


# One compilation for each structure of an experiment: cases that differ in numbers share it.
step = jax.jit(functools.partial(noisefl.step, observe=observe))


def images(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [N, 8, 8, 1]: one quadrant, the label's, is brighter than the noise around it."""
    pixels = rng.integers(0, 160, (len(labels), *IMAGE))
    for image, label in zip(pixels, labels, strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[row : row + 4, column : column + 4] += 50
    return pixels.astype(np.uint8)


@functools.cache
def federation(counts=COUNTS, seed: int = 0) -> Federation:
    """Clients of the given sizes; their samples lie scattered, some columns are padding only."""
    rng = np.random.default_rng(seed)
    owned = rng.permutation(sum(counts)).astype(np.int32)
    table = np.zeros((len(counts), max(14, *counts)), np.int32)
    for k, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
        table[k, :count] = owned[end - count : end]
    labels = [rng.integers(0, CLASSES, n, np.int32) for n in (sum(counts), VALIDATION, TEST)]
    train, validation, test = (
        (jnp.asarray(images(split, rng)), jnp.asarray(split)) for split in labels
    )
    return Federation(
        Images(*train, *test), jnp.asarray(table), jnp.asarray(counts, jnp.int32), *validation
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


def start(experiment: Experiment = TINY) -> State:
    """A state at round 0 whose base is trained and whose owner is another model."""
    state = noisefl.init(keys.root(7), experiment, federation())
    base = jax.tree.map(jnp.float32, trained())
    rng = np.random.default_rng(3)
    owner = jax.tree.map(lambda w: w + jnp.float32(rng.normal(0, 0.1, w.shape)), base)
    return replaced(state, base=base, owner=owner)


def ours(cls: type) -> bool:
    """It is of the package, and not of a test or an example."""
    return cls.__module__.startswith("noisefl.")


def lane(tree: Any, number: int) -> Any:
    """One entry of the leading axis."""
    return jax.tree.map(lambda leaf: leaf[number], tree)


def replaced(tree: Any, **changes: Any) -> Any:
    """A flax dataclass with other values."""
    return tree.replace(**changes)


def plain(tree: Any) -> Any:
    """In NumPy, keys as their bits."""

    def of(leaf: Any) -> np.ndarray:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return jax.tree.map(of, tree)


def assert_same(ours: Any, theirs: Any, **tolerance: Any) -> None:
    """Equal bit for bit without a tolerance; with one, floats alone may differ."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype
        if tolerance and one.dtype.kind == "f":
            np.testing.assert_allclose(one, other, **tolerance)
        else:
            np.testing.assert_array_equal(one, other)


# The same, for the reference.


def options(experiment: Experiment) -> ref.Options:
    """Its options: fields of the same names, and which rule and wrappers there are."""
    places = list(walk(experiment))
    kinds = {type(place.value).__name__ for place in places}
    values = {place.name: place.value for place in places if place.value is not None}
    if "Warmup" not in kinds:
        values["warmup_rounds"] = np.int32(schemes.NEVER if "Bare" in kinds else 0)
    values |= {
        "calibrator": name_of(type(values.get("calibrator"))),
        "bare_first": "Geometric" in kinds,
        "skip_infeasible": "SkipInfeasible" in kinds,
        "until_cap": "UntilCap" in kinds,
        "keep_best": "KeepBest" in kinds,
        "feeds_back": "FeedsBack" in kinds,
    }
    named = set(ref.Options.__dataclass_fields__) & set(values)
    noised = values.get("noise_layers", "first"), values.get("noise_parameters", "kernel")
    return ref.Options(
        net=NET,
        noised=ref.noised_parameters(NET, *noised),
        **{n: values[n].item() if isinstance(values[n], np.generic | np.ndarray) else values[n]
           for n in named},
    )  # fmt: skip


def reference_data(data: Federation, experiment: Experiment) -> ref.Data:
    rows = [
        np.asarray(row)[: int(n)]
        for row, n in zip(data.clients, np.asarray(data.counts), strict=True)
    ]
    train_images, train_labels = np.asarray(data.train_images), np.asarray(data.train_labels)
    on = experiment.accuracy_on
    return ref.Data(
        client_images=[train_images[row] for row in rows],
        client_labels=[train_labels[row] for row in rows],
        accuracy_images=np.asarray(getattr(data, f"{on}_images")),
        accuracy_labels=np.asarray(getattr(data, f"{on}_labels")),
    )


def local_batches(key: jax.Array, k: int, data: Federation, local: Training) -> list[np.ndarray]:
    """Client k's batches of a round, without the padding."""
    padded = data.clients.shape[1]
    positions, valid = local.batches(keys.stream(key, "client", k), data.counts[k], padded)
    both = zip(np.asarray(positions), np.asarray(valid), strict=True)
    return [step[mask] for step, mask in both if mask.any()]


def unit_noise(key: jax.Array, base: Any, experiment: Experiment) -> Callable[[int], nets.Params]:
    """Unit noise of try j of a round, as nested as the parameters are."""
    [where] = [place.value for place in walk(experiment) if place.name == "on"] or [None]
    paths = where.paths(experiment.functions, IMAGE) if where else ()

    def of_try(j: int) -> nets.Params:
        nested: nets.Params = {}
        own = keys.stream(keys.stream(key, "calibration"), "try", j)
        for (layer, name), leaf in where.draw(own, base, paths).items():
            nested.setdefault(layer, {})[name] = np.asarray(leaf, np.float64)
        return nested

    return of_try


def draws(
    key: jax.Array, info: Any, base: Any, data: Federation, experiment: Experiment
) -> ref.Draws:
    """All randomness of the round of that key."""
    members = info.members
    signs = 1 - 2 * np.asarray(members.groups)
    cohort = [(int(k), int(sign)) for k, sign in zip(members.clients, signs, strict=True)]
    return ref.Draws(
        cohort=cohort,
        batches=[local_batches(key, k, data, experiment.local) for k, _ in cohort],
        server_counts=np.asarray(info.told["server_counts"]).tolist(),
        noise=unit_noise(key, base, experiment),
    )
