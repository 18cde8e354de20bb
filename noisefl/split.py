"""A model cut below its first noised layer: what lies below sees no noise, and is computed once."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import evaluate
from noisefl.models import Functions

Params = Any
LARGEST = 2048  # numbers kept for an image; more would cost more to read than to compute again


class Split(NamedTuple):
    """A model, cut where the first of some parameters meet what comes from the images."""

    model: Functions
    touched: tuple[tuple[str, ...], ...]

    def below(self, params: Params, images: jax.Array, batch: int) -> jax.Array:
        """What stands at the cut, [N, …], of images uint8 [N, H, W, Ch], `batch` a forward pass."""

        def one(images: jax.Array) -> jax.Array:
            scaled = evaluate.scale(images)
            program = self.model.program(params, scaled)
            cut = program.met(self.touched)
            assert cut is not None, "of `at`, or looked at before"
            return program.run(params, [scaled], self.model.lowering, [cut])[0]

        return evaluate.in_batches(one, (images,), batch)

    def above(self, params: Params, images: jax.Array, kept: jax.Array) -> jax.Array:
        """Logits [B, C] from what stands at the cut; a branch that passes it by is computed from
        the images, as ever."""
        scaled = evaluate.scale(images)
        program = self.model.program(params, scaled)
        cut = program.met(self.touched)
        assert cut is not None, "of `at`"
        given = {cut: kept}
        return program.run(params, [scaled], self.model.lowering, given=given)[0]


def at(
    model: Functions, touched: tuple[tuple[str, ...], ...], image_shape: tuple[int, int, int]
) -> Split | None:
    """The cut below the first use of the parameters at these paths.

    None where nothing is saved: where no layer stands below; where what they meet is not one array
    with an entry for each image; or where that is too large to be kept.
    """
    if not touched:
        return None
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    program = model.program(model.shapes(image_shape), images)
    cut = program.met(touched)
    if cut is None or not program.saves(cut):
        return None
    shape = program.shapes[cut]
    fits = shape[:1] == (2,) and math.prod(shape) <= 2 * LARGEST
    return Split(model, touched) if fits else None


def accuracy_of(
    model: Functions,
    split: Split | None,
    base: Params,
    images: jax.Array,
    labels: jax.Array,
    batch: int,
    axis: str = "",
) -> Callable[[Params], jax.Array]:
    """`evaluate.accuracy` of noised copies of `base`, params → float32 [].

    Args:
      model: the model.
      split: `at` of the model and the noised parameters; what lies below is computed once, here.
      base: parameters that all copies share below the split.
      images: uint8 [N, H, W, Ch].
      labels: int32 [N].
      batch: images a forward pass.
      axis: a mapped axis over which the images are split. None if empty.
    """
    if split is None:
        return lambda params: evaluate.accuracy(model.apply, params, images, labels, batch, axis)
    size = labels.shape[0]
    images, labels = evaluate.mine(images, labels, axis)
    kept = split.below(base, images, batch)

    def accuracy(params: Params) -> jax.Array:
        right = evaluate.count(
            lambda images, kept: split.above(params, images, kept), (images, kept), labels, batch
        )
        return evaluate.share(lax.psum(right, axis) if axis else right, size)

    return accuracy
