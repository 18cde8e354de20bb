"""Noise on a model: which parameters carry it, how it is drawn, applied and removed.

A draw is a pytree of unit-variance noise for the chosen parameters alone, keyed by their paths;
its strength is a traced number that scales it. ALGORITHM.md, "Three global models": A = W + ξ and
B = W − ξ with ξ ~ N(0, σ²) on kernel and bias of the first convolution.
"""

import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from noisefl.errors import refuse
from noisefl.keys import stream
from noisefl.models import Functions, Layer
from noisefl.parts import Part, child, choice, part, text

Params = Any
Path = tuple[str, ...]
Draw = dict[Path, jax.Array]  # ("conv1", "kernel") → noise of that parameter's shape


@part
class Distribution(Part):
    """Base: independent noise of mean 0 and variance 1."""

    abstract: ClassVar[bool] = True

    def sample(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Float32 [...] of that shape."""
        raise NotImplementedError


@part
class Gaussian(Distribution):
    """N(0, 1), the source's."""

    def sample(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, shape)


@part
class Uniform(Distribution):
    """Uniform on ±√3."""

    def sample(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(key, shape, minval=-(3**0.5), maxval=3**0.5)


@part
class Laplace(Distribution):
    """Double exponential of scale 1/√2."""

    def sample(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.laplace(key, shape) / 2**0.5


@part
class Where(Part):
    """Which parameters carry noise, in which unit and distribution.

    Attributes:
      noise_layers: "first" is the first convolution, in a model without one the first dense layer;
        "all" are those that multiply by parameters; an expression must match a whole layer path or
        parameter path, e.g. "conv2" or "dense.*/kernel".
      noise_scale: "absolute": ξ ~ N(0, σ²); "relative": ξ ~ N(0, (r · RMS)²), RMS that of the
        noised parameters of each layer. Strengths are then r, not σ.
    """

    noise_layers: str = text("first", "first, last, all, or a regular expression over paths")
    noise_parameters: str = choice("kernel+bias", ("kernel+bias", "kernel"), "of those layers")
    noise_scale: str = choice(
        "absolute", ("absolute", "relative"), "strengths are σ, or r = σ/RMS of each layer"
    )
    noise_distribution: Distribution = child(Gaussian, "of ξ, of equal variance")

    def paths(self, model: Functions, image_shape: tuple[int, int, int]) -> tuple[Path, ...]:
        """Paths of the parameters that carry noise, `(("conv1", "bias"), ("conv1", "kernel"))`.

        Raises:
          ValueError: `noise_layers` is no valid expression, or no parameter matches.
        """
        found = model.layers(image_shape)
        kernels = {layer.kernel for layer in found}
        if self.noise_layers in ("first", "last", "all"):
            chosen = _chosen_layers(found, self.noise_layers)
            paths = sorted({path for layer in chosen for path in layer.parameters})
        else:
            try:
                pattern = re.compile(self.noise_layers)
            except re.error as error:
                allowed = f"not a regular expression ({error})"
                raise refuse("noise_layers", self.noise_layers, allowed) from None
            everything = set(flatten_dict(model.shapes(image_shape)))
            paths = [
                path
                for path in sorted(everything - set(model.state(image_shape)))
                if pattern.fullmatch("/".join(path)) or pattern.fullmatch("/".join(path[:-1]))
            ]
        if self.noise_parameters == "kernel":
            paths = [path for path in paths if path in kernels]
        if not paths:
            names = ", ".join("/".join(layer.path or layer.kernel) for layer in found)
            allowed = f"must be first, last, all, or match one of the model's layers: {names}"
            raise refuse("noise_layers", self.noise_layers, allowed)
        return tuple(paths)

    def keys(self, key: jax.Array, paths: tuple[Path, ...]) -> dict[Path, jax.Array]:
        """A key [] for each noised parameter: what a scheme keeps instead of many draws."""
        return dict(zip(paths, jax.random.split(key, len(paths)), strict=True))

    def unit(
        self, params: Params, keys: dict[Path, jax.Array], index: jax.Array | None = None
    ) -> Draw:
        """Independent unit-variance noise of `keys`; with an index int32 [], one of many draws."""
        flat = _flat(params)

        def of(path: Path) -> jax.Array:
            key = keys[path] if index is None else stream(keys[path], "draw", index)
            return self.noise_distribution.sample(key, flat[path].shape)

        return {path: of(path) for path in keys}

    def draw(self, key: jax.Array, params: Params, paths: tuple[Path, ...]) -> Draw:
        """One draw of independent unit-variance noise, [...] of each parameter at `paths`."""
        return self.unit(params, self.keys(key, paths))

    def unit_scale(self, params: Params, paths: tuple[Path, ...]) -> dict[Path, jax.Array]:
        """Standard deviation of ξ at strength 1, float32 [] for each path.

        1 ("absolute"), or the RMS of the noised parameters of the same layer ("relative").
        """
        flat = _flat(params)
        if self.noise_scale == "absolute":
            return {path: jnp.float32(1) for path in paths}
        return {path: _rms([flat[p] for p in paths if p[:-1] == path[:-1]]) for path in paths}

    def scaled(self, params: Params, drawn: Draw, strength: jax.Array) -> Draw:
        """ξ itself: the draw at its strength, float32 []."""
        scales = self.unit_scale(params, tuple(drawn))
        return {path: strength * scales[path] * unit for path, unit in drawn.items()}

    def spread(
        self, copy: Params, paths: tuple[Path, ...], strength: jax.Array
    ) -> dict[Path, jax.Array]:
        """Standard deviation of ξ as whoever holds a copy can tell it from the strength, float32 []
        for each path. The RMS of a layer of W is told from that of the copy's: its square is
        1 + r² times as large on average."""
        scales = self.unit_scale(copy, paths)
        if self.noise_scale == "relative":
            scales = {path: s / jnp.sqrt(1 + jnp.square(strength)) for path, s in scales.items()}
        return {path: strength * scale for path, scale in scales.items()}

    def relative_strength(self, params: Params, deviations: dict[Path, jax.Array]) -> jax.Array:
        """r = (RMS of ξ) / (RMS of the noised parameters), float32 []; over one layer r = σ / RMS.

        0 without noise, also where the parameters are all 0.

        Args:
          params: W.
          deviations: σ of each noised path.
        """
        flat = _flat(params)
        size = sum(flat[path].size for path in deviations)
        squares = sum(flat[path].size * jnp.square(sd) for path, sd in deviations.items())
        ratio = jnp.sqrt(squares / size) / _rms([flat[path] for path in deviations])
        return jnp.where(squares > 0, ratio, 0)


def layers(which: str, relative: bool = False) -> Where:
    """`Where(which)`, strengths as σ or, relative, as r = σ / RMS."""
    return Where(noise_layers=which, noise_scale="relative" if relative else "absolute")


def _flat(params: Params) -> dict[Path, jax.Array]:
    return flatten_dict(params)  # pyright: ignore[reportReturnType]


def _chosen_layers(found: tuple[Layer, ...], which: str) -> tuple[Layer, ...]:
    if which == "all":
        return found
    if which == "last":
        return found[-1:]
    return (tuple(layer for layer in found if layer.convolution) or found)[:1]


def _rms(leaves: list[jax.Array]) -> jax.Array:
    size = sum(leaf.size for leaf in leaves)
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in leaves) / size)


def apply(params: Params, noise: Draw, sign: jax.Array | float) -> Params:
    """params + sign · ξ: the plus copy with sign +1, the minus copy with sign −1, float32 []."""
    flat = _flat(params)
    return unflatten_dict({**flat, **{path: flat[path] + sign * noise[path] for path in noise}})
