"""A coarse copy: every layer rounded to a uniform grid."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from noisefl import noise
from noisefl.cohort import Cohort
from noisefl.models import Functions
from noisefl.noise import Path, Where
from noisefl.parts import child, part
from noisefl.probing import Judge
from noisefl.schemes.base import Issue, OneCopy

Params = Any


@part
class Quantised(OneCopy):
    """All clients receive Q(W); what they learnt is added to W itself, W + Δ.

    A parameter w of a layer goes to the nearest point of a grid of step q = strength · RMS of the
    layer (`on`, relative; else q = strength), which lies off zero by a random share u of a step:

        Q(w) = q (⌊w / q − u⌉ + u),   u uniform on [−½, ½), one for each parameter array

    so that |Q(w) − w| ≤ q / 2, and q² / 12 on average over u. The offset gives a calibrator that
    draws again something to draw: a large step ends at a handful of levels, and which ones decides
    as much as the step. It is no secret to who sees the copy; what rounding took away is. At
    strength 0 the copy is W.

    Attributes:
      on: which parameters are rounded, and the unit of the step; its distribution is not read.

    Raises:
      ValueError: in `fit`, no parameter matches `on`.
    """

    source: ClassVar[str] = 'PROTECTION.md, "Rivals", quantised copy'
    promise: ClassVar[str] = (
        "a parameter is known to half a step and no better from one copy; offsets that change from "
        "round to round tell more"
    )
    moves: ClassVar[str] = "discrete"

    on: Where = child(noise.layers("all", relative=True), "which parameters are rounded")

    def fit(self, model: Functions, image_shape: tuple[int, int, int], cohort: Cohort) -> None:
        self.on.paths(model, image_shape)

    def touched(self, model: Functions, image_shape: tuple[int, int, int]) -> tuple[Path, ...]:
        return self.on.paths(model, image_shape)

    def draw(self, key: jax.Array, base: Params, judge: Judge) -> dict[Path, jax.Array]:
        """The key of each parameter array's offset."""
        return self.on.keys(key, self.touched(judge.model, judge.image_shape))

    def variant(
        self, base: Params, draw: dict[Path, jax.Array], strength: jax.Array, variant: jax.Array
    ) -> Params:
        flat: dict[Path, jax.Array] = flatten_dict(base)  # pyright: ignore
        units = self.on.unit_scale(base, tuple(draw))

        def rounded(path: Path) -> jax.Array:
            step = strength * units[path]
            some = jnp.where(step > 0, step, 1)
            offset = jax.random.uniform(draw[path], minval=-0.5, maxval=0.5)
            nearest = some * (jnp.round(flat[path] / some - offset) + offset)
            return jnp.where(step > 0, nearest, flat[path])

        return unflatten_dict({**flat, **{path: rounded(path) for path in draw}})

    def spread(
        self, copy: Params, strength: jax.Array, model: Functions, image_shape: tuple[int, int, int]
    ) -> dict[Path, jax.Array]:
        """q / √12. The RMS of a layer of W is taken to be that of the copy's."""
        units = self.on.unit_scale(copy, self.on.paths(model, image_shape))
        return {path: strength * unit / 12**0.5 for path, unit in units.items()}

    def bytes_sent(self, base: Params, issue: Issue) -> jax.Array:
        """⌈log₂ of the levels that reach over ± max |w|⌉ bits for each rounded parameter, the step
        and the offset of each array; four bytes for each other parameter, and for all of W."""
        flat: dict[Path, jax.Array] = flatten_dict(base)  # pyright: ignore
        units = self.on.unit_scale(base, tuple(issue.secret.draw))
        sent = jnp.float32(0)
        for path, leaf in flat.items():
            whole = jnp.float32(4 * leaf.size)
            if path in units:
                step = issue.secret.strength * units[path]
                levels = jnp.floor(2 * jnp.max(jnp.abs(leaf)) / jnp.where(step > 0, step, 1)) + 2
                coarse = jnp.ceil(jnp.log2(levels)) * leaf.size / 8 + 8
                whole = jnp.where(step > 0, jnp.minimum(coarse, whole), whole)
            sent += whole
        return sent
