"""Running statistics of a model (batch normalisation), estimated anew on images."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import lax

from noisefl import evaluate, keys
from noisefl.models import Functions, with_leaves

Params = Any
BATCHES, BATCH = 10, 100  # images of an estimate


def estimated(
    key: jax.Array, model: Functions, params: Params, images: jax.Array, rows: jax.Array,
    count: jax.Array | int,
) -> Params:  # fmt: skip
    """The parameters with the mean of ten batches' statistics in place of their running ones.

    A running statistic is r ← m r + (1 − m) b of a batch's own b, so that a batch begun at 0 and at
    1 tells m and b, whatever the model calls them.

    Args:
      key: of which images, drawn with replacement, and of what is random in training.
      model: of `models.functions`.
      params: a tree with running statistics; any other comes back as it is.
      images: uint8 [N, H, W, Ch].
      rows: int32 [P], indices into the images; valid in the first `count`.
      count: int32 [].
    """
    paths = model.state_of(params)
    if not paths:
        return params
    flat: dict[Any, jax.Array] = flatten_dict(params)  # pyright: ignore
    chosen = jax.random.randint(
        keys.stream(key, "images"), (BATCHES, BATCH), 0, jnp.maximum(count, 1)
    )

    def of_batch(batch: tuple[jax.Array, jax.Array]) -> dict[Any, jax.Array]:
        places, number = batch
        scaled = evaluate.scale(images[rows[places]])
        own = keys.stream(key, "batch", number)

        def after(begun: float) -> dict[Any, jax.Array]:
            start = {path: jnp.full_like(flat[path], begun) for path in paths}
            return model.train(with_leaves(params, start), scaled, own)[1]

        low, high = after(0.0), after(1.0)
        return {path: low[path] / (1 - (high[path] - low[path])) for path in paths}

    found = lax.map(of_batch, (chosen, jnp.arange(BATCHES)))
    return with_leaves(params, {path: jnp.mean(leaf, axis=0) for path, leaf in found.items()})
