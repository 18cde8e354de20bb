"""Copies, images and views of a tiny model, for the tests of each thief."""

from typing import Any

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import reference_nets as nets

from noisefl import attacks, keys, models
from noisefl.attacks import Public, View
from noisefl.local import Own
from noisefl.parts import implementations

CLASSES = [*filter(fed.ours, implementations(attacks.Attack))]
MODEL = models.functions((fed.initial, fed.forward))  # traced sooner than the module
MODULE = models.functions(fed.TinyCNN())
W = jax.tree.map(jnp.float32, fed.trained())
KEY = keys.root(5)
EPS = np.finfo(np.float32).eps


def touching(*layers: str) -> Public:
    """Copies may differ from W in those layers."""
    touched = {n: jax.tree.map(lambda _, n=n: jnp.bool_(n in layers), W[n]) for n in W}
    return Public(touched, fed.TINY.local, MODEL, fed.IMAGE, 16)


HEAD, ALL = touching("head"), touching("stem", "head")
LINEN = fed.replaced(HEAD, functions=MODULE)  # for the thief who looks into it


def logits(params: Any, images: Any) -> np.ndarray:
    return nets.forward(fed.NET, nets.as_float64(params), np.asarray(images))[0]


def own(count: int = 150, padding: int = 10) -> Own:
    """Images that the owner W labels; rows past `count` point at images of a wrong class."""
    rng = np.random.default_rng(6)
    images = fed.images(rng.integers(0, fed.CLASSES, count + 40), rng)
    labels = logits(W, images).argmax(1)
    labels[count:] = (labels[count:] + 1) % fed.CLASSES
    rows = np.concatenate([rng.permutation(count), count + np.arange(padding)])
    arrays = [jnp.asarray(x) for x in (images, np.int32(labels), np.int32(rows))]
    return Own(arrays[0], arrays[1], arrays[2], jnp.int32(count))


OWN = own()


def noise(seed: int, public: Public = HEAD, size: float = 1.0) -> Any:
    """ξ on touched parameters, 0 on the others."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda w, touched: jnp.float32(size * rng.normal(size=w.shape)) * touched,
        W, public.touched,
    )  # fmt: skip


def moved(xi: Any, by: Any, base: Any = W) -> Any:
    """base + by[j, a] · ξ, [J, A, ...]."""
    by = jnp.asarray(by, jnp.float32)
    return jax.tree.map(lambda w, x: w + by.reshape(*by.shape, *[1] * w.ndim) * x, base, xi)


def view(copies: Any, **changes: Any) -> View:
    """Of copies [J, A, ...]: all present, rounds 1 to J, nothing known of the noise."""
    rows, members = jax.tree.leaves(copies)[0].shape[:2]
    rounds = jnp.broadcast_to(1 + jnp.arange(rows, dtype=jnp.int32)[:, None], (rows, members))
    unknown = jax.tree.map(lambda _: jnp.full((rows, members), jnp.nan), W)
    there = jnp.ones((rows, members), bool)
    return fed.replaced(View(copies, copies, there, rounds, unknown), **changes)


def spread(value: Any, public: Public = HEAD) -> Any:
    """The same σ [J, A] of all touched parameters, 0 of the others."""
    return jax.tree.map(lambda touched: jnp.float32(value) * touched, public.touched)


def one(copy: Any, **changes: Any) -> View:
    return view(jax.tree.map(lambda leaf: leaf[None, None], copy), **changes)


def short(cls: type, **changes: Any) -> Any:
    """With few steps."""
    few = {"steps": 6, "batch_size": 8, "asked": 24}
    fields = cls.__dataclass_fields__
    return cls(**{**{name: few[name] for name in few if name in fields}, **changes})


@jax.jit
def steal(thief, key, view, own, public):
    return thief.steal(key, view, own, public)


def right(params: Any) -> float:
    """Share of own images on which a model says what W says."""
    images, labels = np.asarray(OWN.images)[:150], np.asarray(OWN.labels)[:150]
    return (logits(params, images).argmax(1) == labels).mean()
