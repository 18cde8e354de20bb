"""Arguments that are not what was asked for: of parts, of functions, and models that do not fit."""

import datetime
import decimal
import fractions
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from data_files import tiny
from flax import linen as nn
from flax import nnx
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

import noisefl
from noisefl import average, calibrate, data, keys, local, models, noise, optimizers, parts, schemes
from noisefl.parts import Part, Spec, defaults, kind_of, specs


class Silent:
    """What nobody expects; its repr is of two lines."""

    def __repr__(self) -> str:
        return "Silent(\n)"


ARRAYS = tiny(3, 40, 12, (4, 4), 3)
PARTS = [
    schemes.Bare(),
    calibrate.Fixed(),
    optimizers.SGD(),
    average.Mean(),
    noise.Where(),
    noise.Uniform(),
]
SCALARS = [
    None, True, False, 0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**53 + 1, 2**63, -(2**63), 10**400, 0.0,
    -0.0,
    0.5, 1.5, 1e-50, 1e39, float("nan"), float("inf"), float("-inf"), 1j, "", "x", "0.5", "1",
    "nan",
    b"1", "a\nb", (), [], {}, set(), (1, 2), [1, [2, 3]], [0.5, None], {"x": 1}, {1: 2},
    {"learning_rate": "x"},
    fractions.Fraction(1, 3), decimal.Decimal("0.5"), datetime.date(2020, 1, 1), ...,
    NotImplemented,
    object, Silent(), print, lambda: 0, range(3), iter(()), slice(1), schemes.Bare, nn.Dense(3),
    np.float16(0.5), np.float64(0.5), np.longdouble(0.5), np.int8(3), np.uint64(2**64 - 1),
    np.bool_(True),
    np.str_("all"), np.datetime64("2020"), np.ma.masked, np.array(["half"]), np.array([None, 1]),
    jnp.float32(0.5), jnp.int32(3), jnp.bfloat16(0.5), jnp.arange(3), jax.random.key(0),
    np.zeros(0), np.zeros((2, 2)), np.full((3, 4), np.nan), np.arange(2000.0), optax.sgd(0.1),
    optax.sgd, *PARTS,
]  # fmt: skip
KINDS = [*"?bBhHiIlLqQefdgFDOUSm", "M8[s]"]  # hypothesis cannot show dates without a unit


@st.composite
def strange_arrays(draw: st.DrawFn) -> np.ndarray:
    kind = draw(st.sampled_from(KINDS))
    shape = draw(of_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    array = np.zeros(shape, np.dtype(f"{kind}3" if kind in "US" else kind))
    if array.size and kind in "efdg":
        array.flat[0] = draw(st.floats(width=16) | st.just(np.nan))
    elif array.size and kind in "bhilqBHILQ":
        array.flat[0] = draw(st.integers(0, 127))
    return array


junk = st.one_of(
    st.sampled_from(SCALARS), st.sampled_from(SCALARS), st.floats(), st.integers(), strange_arrays()
)


def below(cls: type) -> list[type]:
    """All parts of the package that can be made, also those of equal names."""
    found = dict.fromkeys(deep for sub in cls.__subclasses__() for deep in (sub, *below(sub)))
    return [c for c in found if c.__module__.startswith("noisefl.") and not vars(c).get("abstract")]


CLASSES = below(Part)


@st.composite
def fields(draw: st.DrawFn) -> tuple[type, dict[str, Any]]:
    """A class of part, and one to three of its fields."""
    cls = draw(st.sampled_from([cls for cls in CLASSES if specs(cls)]))
    names = draw(st.lists(st.sampled_from(list(specs(cls))), min_size=1, max_size=3, unique=True))
    return cls, {name: draw(near(cls, name) | junk) for name in names}


def near(cls: type, name: str) -> st.SearchStrategy[Any]:
    """Values at the bounds of a field, and the wrong one of two."""
    spec = specs(cls)[name]
    default = defaults(cls)[name]
    if spec.traced or spec.kind == "size":
        values = [spec.low, spec.high, spec.low - 1, spec.high + 1]
        values += [
            np.nextafter(np.float32(b), np.float32(w)) for b in values[:2] for w in (-9e9, 9e9)
        ]
        lanes = [np.array([value, value]) for value in values]
        whole = [int(value) for value in values if np.isfinite(value)]
        return st.sampled_from([*values, *lanes, *whole])
    if spec.kind == "choice":
        return st.sampled_from(
            [*spec.choices, spec.choices[0].upper(), list(spec.choices), spec.choices[0].encode()]
        )
    if spec.kind in ("child", "children"):
        made = [part() for part in CLASSES]
        return st.sampled_from(made) | st.lists(st.sampled_from(made), max_size=2)
    return st.just(default() if isinstance(default, type) else default)


def is_right(owner: type, name: str, spec: Spec, given: Any, held: Any) -> bool:
    """Whether what a part holds is what it was given, and may be."""
    if held is None:
        return given is None and (spec.optional or spec.kind == "static")
    if spec.traced:
        wide, kind = (
            np.asarray(given, np.float64),
            np.float32 if spec.kind == "number" else np.int32,
        )
        with np.errstate(over="ignore"):
            return (
                held.dtype == kind and np.shape(held) == wide.shape and held.size > 0
                and np.array_equal(np.asarray(held),
                wide.astype(kind)) and bool(np.all(np.isfinite(held)))
                and bool(np.all(np.asarray(held, np.float64) >= np.float32(spec.low)))
                and bool(np.all(np.asarray(held, np.float64) <= np.float32(spec.high)))
            )  # fmt: skip
    if spec.kind == "size":
        return type(held) is int and held == given and spec.low <= held <= spec.high
    if spec.kind == "numbers":
        return all(isinstance(key, str) and held[key].dtype == np.float32 for key in held)
    if spec.kind in ("child", "children"):
        some = held if isinstance(held, tuple) else (held,)
        return all(isinstance(one, kind_of(owner, name)) for one in some)
    if spec.kind == "choice":
        return isinstance(held, str) and held in spec.choices
    if spec.kind == "text":
        return isinstance(held, str)
    if spec.kind == "static":  # what a model is, is asked where there are images
        kinds = {"factory": Callable, "given": optax.GradientTransformation, "clients_axis": str}
        hash(held if name != "model" else 0)
        return isinstance(held, kinds.get(name, object)) and (
            name != "channels" or len(held) in (0, 2)
        )
    return isinstance(held, bool)


# Functions: what they are called with, and what it must be that they return.


def sound(**changes: Any) -> data.Dataset:
    names = ("train_images", "train_labels", "test_images", "test_labels")
    return data.arrays(**{**dict(zip(names, ARRAYS, strict=True)), **changes})


DATASET = sound(train_writers=np.arange(40) // 4)


def dealt(indices: Any, counts: Any, images: int) -> bool:
    """Every image exactly once, and at least one to each."""
    indices, counts = np.asarray(indices), np.asarray(counts)
    held = [image for row, count in zip(indices, counts, strict=True) for image in row[:count]]
    return sorted(held) == list(range(images)) and min(counts) >= 1 and indices.dtype == np.int32


def federated(found: Any, given: dict[str, Any]) -> bool:
    size = found.validation_labels.shape[0]
    held = [
        int(i) for row, n in zip(found.clients, found.counts, strict=True) for i in row[: int(n)]
    ]
    wanted = given.get("deal") or data.Deal(
        **{n: v for n, v in given.items() if n in specs(data.Deal)}
    )
    return (
        len(set(held)) == len(held) == 40 - size and min(map(int, found.counts)) >= 1
        and found.num_clients == given.get("num_clients", wanted.num_clients)
        and size == given.get("validation_size", wanted.validation_size)
    )  # fmt: skip


def of_arrays(found: Any, given: dict[str, Any]) -> bool:
    x, y = np.asarray(given["train_images"]), np.asarray(given["train_labels"])
    ours = sorted(
        (i.tobytes(), int(n)) for i, n in zip(found.train_images, found.train_labels, strict=True)
    )
    return ours == sorted((i.tobytes(), int(n)) for i, n in zip(x, y.ravel(), strict=True)) and (
        type(found.num_classes) is int and found.num_classes > found.train_labels.max()
    )


LABELS = np.arange(40) % 3
FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any], Callable[[Any, dict[str, Any]],
Any]]] = {
    "arrays": (
        data.arrays,
        {**dict(zip(("train_images", "train_labels", "test_images", "test_labels"), ARRAYS,
        strict=True)),
         "num_classes": None, "train_writers": None, "name": "mine"},
        of_arrays,
    ),
    "federate": (
        data.federate,
        {"dataset": DATASET, "seed": 0, "num_clients": 5, "partition": "iid",
        "shards_per_client": 2,
         "dirichlet_alpha": 0.5, "size_sigma": 1.0, "validation_size": 8},
        federated,
    ),
    "federate a deal": (
        data.federate,
        {"dataset": DATASET, "seed": 3,
         "deal": data.Deal(num_clients=5, partition="writers", validation_size=8)},
        federated,
    ),
    "partition": (
        data.partition,
        {"labels": LABELS, "num_clients": 5, "how": "iid", "seed": 0, "shards_per_client": 2,
         "dirichlet_alpha": 0.5, "size_sigma": 1.0, "writers": np.arange(40) // 4},
        lambda found, given: dealt(found.indices, found.counts, len(given["labels"])),
    ),
    "holdings": (
        data.holdings,
        {"labels": LABELS, "deal": data.Deal(num_clients=5, validation_size=8), "seed": 0,
        "writers": np.arange(40) // 4},
        lambda found, given: len(found.validation) == given["deal"].validation_size,
    ),
    "root": (
        keys.root, {"seed": 0},
        lambda found,
        given: found == jax.random.key(int(given["seed"])) and given["seed"] == int(given["seed"]),
    ),
    "by_name": (
        models.by_name, {"name": "mlp", "num_classes": 3},
        lambda found,
        given: type(found.num_classes) is int and found.num_classes == given["num_classes"],
    ),
    "functions": (
        models.functions, {"model": models.MLP(), "lowering": None, "channels": None},
        lambda found, given: found.classes((4, 4, 1)) > 0,
    ),
    "Lowering": (
        models.Lowering,
        {"conv": "auto", "pool": "auto", "dense": "auto", "precision": "default", "target": None},
        lambda found, given: all(isinstance(getattr(found, n), str) for n in models.LOWERINGS),
    ),
    "lanes": (
        lambda some: parts.lanes(some), {"some": [calibrate.Fixed(), calibrate.Fixed(cap=0.5)]},
        lambda found, given: isinstance(found, Part),
    ),
    "chunk_of_rounds": (
        noisefl.simulate.chunk_of_rounds, {"rounds_per_chunk": 2, "measure": None},
        lambda found, given: type(given["rounds_per_chunk"]) is not bool and callable(found),
    ),
}  # fmt: skip
WORDS = [
    "iid",
    "shards",
    "dirichlet",
    "lognormal",
    "writers",
    "mlp",
    "lax",
    "winograd",
    "bfloat16",
    "shard",
]


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A function by its name, and arguments of which one or two are not what was asked for."""
    name = draw(st.sampled_from(list(FUNCTIONS)))
    given = dict(FUNCTIONS[name][1])
    for one in draw(st.lists(st.sampled_from(list(given)), min_size=1, max_size=2, unique=True)):
        strange = junk
        if isinstance(given[one], np.ndarray):
            strange |= st.sampled_from([
                given[one][:-1], given[one][:0], given[one][None], given[one].astype(np.int64),
                given[one].astype(float), given[one] - np.int64(1),
                np.concatenate([given[one]] * 2),
                list(given[one]), given[one].astype(object), given[one].astype(np.uint64) + 2**63,
                jnp.asarray(given[one]), given[one][..., None], given[one].astype(str),
            ])  # fmt: skip
        elif isinstance(given[one], str):
            strange |= st.sampled_from(WORDS)
        elif isinstance(given[one], int):
            strange |= st.integers(-1, 50)
        given[one] = draw(strange)
    return name, given


# Models


class Odd(nn.Module):
    """Whose logits are something else."""

    what: str

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        y = nn.Dense(3)(x.reshape(x.shape[0], -1))
        if self.what == "raises":
            raise RuntimeError("not\ntoday")
        if self.what == "one channel":
            y = y + nn.Conv(3, (3, 3), kernel_init=lambda key, shape, *_: jnp.ones((3, 3, 7, 3)))(
                x
            ).mean((1, 2))
        if self.what == "state":
            self.variable("cache", "seen", jnp.zeros, ())
        return {
            "none": None, "two": (y, y), "dict": {"logits": y}, "number": jnp.float32(1),
            "sum": y.sum(0),
            "rank": y[None], "long": jnp.concatenate([y, y]), "whole": y.astype(jnp.int32),
            "bool": y > 0,
            "complex": y.astype(jnp.complex64), "python": 3.0, "image": x,
            "half": y.astype(jnp.float16),
            "empty": y[:, :0], "array": np.zeros((1, 3), np.float32), "few": y[:, :2], "one": y[:,
            :1],
        }.get(self.what, y)  # fmt: skip


KERNEL = jnp.zeros((16, 3))


def _init(key: jax.Array, images: jax.Array) -> Any:
    return {"head": jax.random.normal(key, (16, 3))}


def _apply(params: Any, images: jax.Array) -> Any:
    return images.reshape(images.shape[0], -1) @ params["head"]


def _raises(*_: Any) -> Any:
    raise KeyError("x")


class Linear(nnx.Module):
    """Of nnx, made with more than rngs."""

    def __init__(self, size: int, rngs: nnx.Rngs):
        self.head = nnx.Linear(size, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(x.reshape(x.shape[0], -1))


UNFIT: list[Any] = [
    *(Odd(what) for what in (
        "none", "two", "dict", "number", "sum", "rank", "long", "whole", "bool", "complex",
        "python", "image",
        "empty", "array", "few", "one", "raises", "one channel", "state",
    )),
    models.LeNet5(num_classes=3), models.LeNet5(num_classes=0), models.MLP(num_classes=2),
    functools.partial(models.MLP, num_classes=3), nn.Dense(3), nn.Dense(-1), nn.Sequential([]),
    nn.Dropout(0.5),
    nn.BatchNorm(), models.MLP, 3, None, "mlp", (_init,), (_init, 3), (_init, _raises), (_raises,
    _apply),
    (lambda key, images: None, _apply), (lambda key, images: {}, _apply), (lambda key,
    images: [KERNEL], _apply),
    (lambda key, images: {"head": 3.0}, _apply), (lambda key, images: KERNEL, lambda p,
    x: x.reshape(len(x), -1) @ p),
    (lambda key, images: {"head": KERNEL.astype(int)}, _apply), (lambda key, images: {"head": "x"},
    _apply),
    (lambda key: {"head": KERNEL}, _apply),
    (lambda key, images: {"head": jnp.zeros((15, 3))}, _apply), (_init, lambda params: 3),
    (lambda key, images: {1: KERNEL}, lambda p, x: x.reshape(len(x), -1) @ p[1]),
    (lambda key, images: {"head": jnp.zeros((16, 0))}, _apply), (_init, lambda p,
    x: float(x.sum())),
    (_init, lambda p, x: jnp.zeros((len(x), 3)) if x.sum() > 0 else 0),
    Linear, functools.partial(Linear, 15), functools.partial(Linear, *["x"]), Linear(15,
    nnx.Rngs(0)),
    nnx.Linear,
]  # fmt: skip
FIT: list[Any] = [
    models.MLP(num_classes=3), models.MLP(num_classes=30), Odd("fits"), (_init, _apply),
    functools.partial(Linear, 16),
    Linear(16, nnx.Rngs(0)),
]  # fmt: skip


def experiment(model: Any, **changes: Any) -> noisefl.Experiment:
    """Of a model on `DATASET`."""
    return noisefl.Experiment(
        model=model, cohort=noisefl.Cohort(2), local=local.Training(batch_size=4), **changes
    )


FEDERATION = data.federate(DATASET, num_clients=5, validation_size=8, seed=0)
AROUND: list[dict[str, Any]] = [
    {"scheme": schemes.Warmup(schemes.Noised(on=noise.layers("last")))}, {"scheme": schemes.Bare()},
    {"pixels": "normalised", "channels": ((0.5,), (0.2,))},
]  # fmt: skip
