"""Accuracy of models on images, in batches of the machine's liking."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Params = Any
Apply = Callable[[Params, jax.Array], jax.Array]  # (params, images in [0, 1]) → logits [B, C]


def scale(images: jax.Array) -> jax.Array:
    """uint8 pixels as float32 in [0, 1]; data stay uint8 on the device until here."""
    return images.astype(jnp.float32) / 255


def in_batches(one: Callable[..., Any], inputs: tuple[jax.Array, ...], batch: int) -> Any:
    """`one(*inputs)` over inputs [N, …] in slices of `batch`; the last may be smaller.

    Returns:
      An array [N, …].
    """
    size = inputs[0].shape[0]
    batch = min(batch, size)
    whole = size // batch * batch
    batched = [x[:whole].reshape(-1, batch, *x.shape[1:]) for x in inputs]
    out = lax.map(lambda xs: one(*xs), tuple(batched))
    out = out.reshape(-1, *out.shape[2:])
    if whole == size:
        return out
    return jnp.concatenate([out, one(*(x[whole:] for x in inputs))])


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """bool [B]: the largest logit is that of the label.

    A row with a NaN logit counts as wrong, so that a dead model never looks better than chance.
    """
    return (jnp.argmax(logits, axis=-1) == labels) & ~jnp.any(jnp.isnan(logits), axis=-1)


def count(
    forward: Callable[..., jax.Array],
    inputs: tuple[jax.Array, ...],
    labels: jax.Array,
    batch: int,
) -> jax.Array:
    """Number of correct images, int32 []; `forward(*inputs)` gives logits of a slice of inputs."""

    def right(*slices: jax.Array) -> jax.Array:
        return correct(forward(*slices[:-1]), slices[-1])

    return jnp.sum(in_batches(right, (*inputs, labels), batch), dtype=jnp.int32)


def count_correct(
    apply: Apply, params: Params, images: jax.Array, labels: jax.Array, batch: int
) -> jax.Array:
    """Number of images whose largest logit is that of their label (`correct`).

    Args:
      apply: of `models.functions`.
      params: parameters.
      images: uint8 [N, H, W, Ch].
      labels: int32 [N].
      batch: images a forward pass.

    Returns:
      int32 [].
    """
    return count(lambda x: apply(params, scale(x)), (images,), labels, batch)


def share(count: jax.Array, size: int) -> jax.Array:
    """count / size as the float32 nearest to it, so that a copy exactly at the cap is not above it.

    Of int32 [...] float32 [...].

    XLA turns a division by a constant into a product with its reciprocal, which rounds twice. The
    barrier hides the constant; with the count's own shape it does so under vmap as well.
    """
    return count / lax.optimization_barrier(jnp.float32(size) + 0 * count)


def mine(images: jax.Array, labels: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """Of images [N, ...] and labels [N] those of this one of D positions of a mapped axis, ⌈N / D⌉;
    those that only fill up are of no class. All of them if there is no axis."""
    if not axis:
        return images, labels
    devices, size = lax.axis_size(axis), labels.shape[0]
    each = -(-size // devices)
    rows = lax.axis_index(axis) * each + jnp.arange(each)
    return images[jnp.minimum(rows, size - 1)], jnp.where(rows < size, labels[rows], -1)


def accuracy(
    apply: Apply, params: Params, images: jax.Array, labels: jax.Array, batch: int, axis: str = ""
) -> jax.Array:
    """Share of correct images, float32 []; arguments as for `count_correct`.

    Args:
      axis: a mapped axis (of `shard_map`) over which the images are split. None if empty.
    """
    right = count_correct(apply, params, *mine(images, labels, axis), batch)
    return share(lax.psum(right, axis) if axis else right, labels.shape[0])


def is_finite(params: Params) -> jax.Array:
    """bool []: no parameter is NaN or infinite."""
    return jnp.all(jnp.isfinite(jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(params)])))
