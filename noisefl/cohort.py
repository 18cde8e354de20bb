"""The sampled clients, mapped and averaged: the only place where clients become an axis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Params = Any


def weighted_sum(
    train: Callable[..., tuple[Params, jax.Array]],
    clients: tuple[jax.Array, ...],
    weights: jax.Array,
    at_once: int,
    axis: str | None = None,
) -> tuple[Params, jax.Array]:
    """Trains the M clients of a round and sums their models as they come.

    Memory is bounded by `at_once` models, not by the cohort. Another `at_once` changes the order
    of summation and how XLA lowers the training, hence results in the last bits.

    Args:
      train: one client's (model, scalar) from its entries of `clients`.
      clients: arrays [M, ...].
      weights: float32 [M].
      at_once: clients side by side under vmap; 1 is one by one without vmap, 0 is all.
      axis: a mapped axis (of `shard_map` or vmap) over whose D positions the clients are dealt out;
        each trains ⌈M / D⌉ of them, and the sums meet in one `psum`.

    Returns:
      Σ_k weights_k · model_k, and the scalars [M].
    """
    if axis is not None:
        return _over(axis, train, clients, weights, at_once)
    size = weights.shape[0]
    at_once = min(at_once or size, size)
    xs, shares = jax.tree.map(
        lambda x: x.reshape(-1, at_once, *x.shape[1:]), _filled(clients, weights, at_once)
    )

    def chunk(total: Params, x: Any) -> tuple[Params, jax.Array]:
        some, share = x
        if at_once == 1:
            model, scalar = train(*jax.tree.map(lambda leaf: leaf[0], some))
            part, scalars = jax.tree.map(lambda leaf: share[0] * leaf, model), scalar[None]
        else:
            models, scalars = jax.vmap(train)(*some)
            part = jax.tree.map(lambda leaf: jnp.tensordot(share, leaf, 1), models)
        return jax.tree.map(jnp.add, total, part), scalars

    shapes = jax.eval_shape(lambda: train(*jax.tree.map(lambda x: x[0, 0], xs)))[0]
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, scalars = lax.scan(chunk, zero, (xs, shares))
    return total, scalars.reshape(-1)[:size]


def _over(
    axis: str,
    train: Callable[..., tuple[Params, jax.Array]],
    clients: tuple[jax.Array, ...],
    weights: jax.Array,
    at_once: int,
) -> tuple[Params, jax.Array]:
    size, devices = weights.shape[0], lax.axis_size(axis)
    each = -(-size // devices)
    filled = _filled(clients, weights, devices * each)
    mine, share = jax.tree.map(
        lambda x: lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * each, each), filled
    )
    part, scalars = weighted_sum(train, mine, share, at_once)
    return lax.psum(part, axis), lax.all_gather(scalars, axis, tiled=True)[:size]


def _filled(
    clients: tuple[jax.Array, ...], weights: jax.Array, multiple: int
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Filled up to a multiple with repeats of the first client, of weight 0."""
    fill = -weights.shape[0] % multiple
    more = jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[:1], fill, axis=0)]), clients)
    return more, jnp.pad(weights, (0, fill))
