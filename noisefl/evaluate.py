"""Accuracy of models on images, in batches of the machine's liking."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Params = Any
Apply = Callable[..., Any]  # `model.apply`: ({"params": params}, images) → logits [B, C]


def scale(images: jax.Array) -> jax.Array:
    """uint8 pixels as float32 in [0, 1]; data stay uint8 on the device until here."""
    return images.astype(jnp.float32) / 255


def count_correct(
    apply: Apply, params: Params, images: jax.Array, labels: jax.Array, batch: int
) -> jax.Array:
    """Number of images whose largest logit is that of their label.

    A row with a NaN logit counts as wrong, so that a dead model never looks better than chance.

    Args:
      apply: `model.apply`.
      params: parameters.
      images: uint8 [N, H, W, Ch].
      labels: int32 [N].
      batch: images a forward pass.

    Returns:
      int32 [].
    """
    size = labels.shape[0]
    batch = min(batch, size)
    whole = size // batch * batch

    def correct(images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = apply({"params": params}, scale(images))
        right = (jnp.argmax(logits, axis=-1) == labels) & ~jnp.any(jnp.isnan(logits), axis=-1)
        return jnp.sum(right, dtype=jnp.int32)

    batched = jax.tree.map(lambda x: x[:whole].reshape(-1, batch, *x.shape[1:]), (images, labels))
    total = jnp.sum(lax.map(lambda pair: correct(*pair), batched))
    return total if whole == size else total + correct(images[whole:], labels[whole:])


def accuracy(
    apply: Apply, params: Params, images: jax.Array, labels: jax.Array, batch: int
) -> jax.Array:
    """Share of correct images, float32 []; arguments as for `count_correct`.

    It is the float32 nearest to count / N, so that a copy exactly at the cap is not above it.
    """
    # XLA turns a division by a constant into a product with its reciprocal, which rounds twice.
    size = lax.optimization_barrier(jnp.float32(labels.shape[0]))
    return count_correct(apply, params, images, labels, batch) / size


def is_finite(params: Params) -> jax.Array:
    """bool []: no parameter is NaN or infinite."""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))
