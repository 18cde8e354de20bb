"""Noise on a model: which parameters carry it, how it is drawn, applied and removed.

A draw is a pytree of unit-variance noise for the chosen parameters alone, keyed by their paths;
its strength is a traced number that scales it. ALGORITHM.md, "Three global models": A = W + ξ and
B = W − ξ with ξ ~ N(0, σ²) on kernel and bias of the first convolution.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from noisefl.config import Config, refuse
from noisefl.models.order import Layer, layer_order

Params = Any
Path = tuple[str, ...]
Draw = dict[Path, jax.Array]  # ("conv1", "kernel") → noise of that parameter's shape

UNIT = {
    "gaussian": lambda key, shape: jax.random.normal(key, shape),
    "uniform": lambda key, shape: jax.random.uniform(key, shape, minval=-(3**0.5), maxval=3**0.5),
    "laplace": lambda key, shape: jax.random.laplace(key, shape) / 2**0.5,
}


def _flat(params: Params) -> dict[Path, Any]:
    return flatten_dict(params)


def _chosen_layers(found: tuple[Layer, ...], which: str) -> set[Path]:
    if which == "all":
        return {layer.path for layer in found}
    if which == "last":
        return {found[-1].path}
    convolutions = [layer for layer in found if layer.convolution]
    return {(convolutions or list(found))[0].path}


def target(model: nn.Module, config: Config) -> tuple[Path, ...]:
    """Paths of the parameters that carry noise, e.g. `(("conv1", "bias"), ("conv1", "kernel"))`.

    Raises:
      ValueError: `noise_layers` is no valid expression, or no parameter matches.
    """
    found = layer_order(model, config.image_shape)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *config.image_shape)))[
        "params"
    ]
    paths = sorted(_flat(shapes))
    if config.noise_layers in ("first", "last", "all"):
        owners = _chosen_layers(found, config.noise_layers)
        paths = [path for path in paths if path[:-1] in owners]
    else:
        try:
            pattern = re.compile(config.noise_layers)
        except re.error as error:
            raise refuse(
                "noise_layers", config.noise_layers, f"not a regular expression ({error})"
            ) from None
        paths = [
            path
            for path in paths
            if pattern.fullmatch("/".join(path)) or pattern.fullmatch("/".join(path[:-1]))
        ]
    if config.noise_parameters == "kernel":
        paths = [path for path in paths if path[-1] == "kernel"]
    if not paths:
        names = ", ".join("/".join(layer.path) for layer in found)
        raise refuse(
            "noise_layers",
            config.noise_layers,
            f"must be first, last, all, or match one of the model's layers: {names}",
        )
    return tuple(paths)


def draw(key: jax.Array, params: Params, paths: tuple[Path, ...], distribution: str) -> Draw:
    """One draw of independent unit-variance noise for the parameters at `paths`."""
    flat = _flat(params)
    keys = jax.random.split(key, len(paths))
    return {
        path: UNIT[distribution](key, flat[path].shape)
        for key, path in zip(keys, paths, strict=True)
    }


def _rms(leaves: list[jax.Array]) -> jax.Array:
    size = sum(leaf.size for leaf in leaves)
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in leaves) / size)


def unit_scale(params: Params, paths: tuple[Path, ...], noise_scale: str) -> dict[Path, jax.Array]:
    """Standard deviation of ξ at strength 1, a scalar for each path: 1 ("absolute"), or the RMS of
    the noised parameters of the same layer ("relative")."""
    flat = _flat(params)
    if noise_scale == "absolute":
        return {path: jnp.float32(1) for path in paths}
    return {path: _rms([flat[p] for p in paths if p[:-1] == path[:-1]]) for path in paths}


def relative_strength(
    params: Params, paths: tuple[Path, ...], noise_scale: str, strength: jax.Array
) -> jax.Array:
    """r = (RMS of ξ) / (RMS of the noised parameters), float32 []; over one layer r = σ / RMS.

    0 without noise, also where the parameters are all 0.
    """
    flat, scales = _flat(params), unit_scale(params, paths, noise_scale)
    size = sum(flat[path].size for path in paths)
    spread = sum(flat[path].size * jnp.square(scales[path]) for path in paths)
    ratio = strength * jnp.sqrt(spread / size) / _rms([flat[path] for path in paths])
    return jnp.where(strength > 0, ratio, 0)


def scaled(params: Params, drawn: Draw, strength: jax.Array, noise_scale: str) -> Draw:
    """ξ itself: the draw at its strength."""
    scales = unit_scale(params, tuple(drawn), noise_scale)
    return {path: strength * scales[path] * unit for path, unit in drawn.items()}


def apply(params: Params, noise: Draw, sign: jax.Array | float) -> Params:
    """params + sign · ξ: the plus copy with sign +1, the minus copy with sign −1."""
    flat = _flat(params)
    return unflatten_dict({**flat, **{path: flat[path] + sign * noise[path] for path in noise}})


def remove(trained: Params, start: Params, base: Params) -> Params:
    """A returned model without the noise that it started from: base + (trained − start).

    Exact where it matters: a client that changed nothing gives back the base bitwise, which
    (W + ξ) − ξ would not.
    """
    return jax.tree.map(lambda t, s, b: b + (t - s), trained, start, base)
