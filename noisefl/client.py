"""One client's local training (ClientUpdate of the source). Knows no client axis.

ALGORITHM.md, "One round": E local epochs of minibatch SGD, batch size B, learning rate η.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from noisefl import evaluate, keys
from noisefl.config import Config, Hyper

Params = Any
Optimizer = Callable[[Hyper, jax.Array], optax.GradientTransformation]


def sgd(config: Config) -> Optimizer:
    """SGD with the config's momentum and clipping and the hyper's decayed learning rate.

    An `Optimizer` maps (hyper, round int32 []) to an optax transformation, which every client
    starts afresh in every round; any other may be given to `make_round`.
    """

    def optimizer(hyper: Hyper, round: jax.Array) -> optax.GradientTransformation:
        rate = hyper.learning_rate * hyper.learning_rate_decay ** (round - 1)
        clip = optax.clip_by_global_norm(hyper.clip_norm) if config.clipping else optax.identity()
        return optax.chain(clip, optax.sgd(rate, hyper.momentum if config.momentum else None))

    return optimizer


def batches(
    key: jax.Array, count: jax.Array, padded: int, config: Config
) -> tuple[jax.Array, jax.Array]:
    """Splits a client's samples at random into the batches of all its local steps.

    Args:
      key: the client's key of this round.
      count: int32 [], n_k.
      padded: P, the largest n_k of the population; every client has S = E · ⌈P / B⌉ steps.
      config: `local_epochs`, `batch_size` and `batch_order` are read.

    Returns:
      positions int32 [S, B] into the client's samples, and valid bool [S, B]. The last batch of
      an epoch may be smaller; steps past a client's own data are wholly invalid.
    """
    steps = -(-padded // config.batch_size)
    slots = steps * config.batch_size

    def epoch(key: jax.Array) -> jax.Array:
        # Sorting random numbers, padding last, permutes the first n_k positions.
        rank = jnp.where(jnp.arange(padded) < count, jax.random.uniform(key, (padded,)), jnp.inf)
        order = jnp.argsort(rank).astype(jnp.int32)
        return jnp.pad(order, (0, slots - padded))

    if config.batch_order == "once":
        positions = jnp.tile(epoch(keys.stream(key, "epoch", 0)), (config.local_epochs, 1))
    else:
        epochs = jnp.arange(config.local_epochs)
        positions = jax.vmap(lambda e: epoch(keys.stream(key, "epoch", e)))(epochs)
    valid = jnp.tile(jnp.arange(slots) < count, (config.local_epochs, 1))
    shape = (config.local_epochs * steps, config.batch_size)
    return positions.reshape(shape), valid.reshape(shape)


def update(
    apply: evaluate.Apply,
    optimizer: optax.GradientTransformation,
    params: Params,
    images: jax.Array,
    labels: jax.Array,
    samples: jax.Array,
    valid: jax.Array,
    gather: str = "step",
) -> Params:
    """Trains `params` on the given batches, one optimizer step each.

    Args:
      apply: `model.apply`.
      optimizer: an optax transformation.
      params: what the client received.
      images: uint8 [N, H, W, Ch], all clients'.
      labels: int32 [N].
      samples: int32 [S, B], indices into images.
      valid: bool [S, B]; a step without a valid sample is not computed (under vmap: computed
        while any client of its chunk has a step left, and changes nothing).
      gather: "step" fetches a batch's images when its step comes; "client" all of them first.

    Returns:
      The client's model after local training.
    """

    def loss(params: Params, images: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
        logits = apply({"params": params}, evaluate.scale(images))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(losses * mask) / jnp.maximum(jnp.sum(mask), 1)

    # Steps with data come first: the loop can then end with the last of them.
    some = jnp.any(valid, axis=1)
    order = jnp.argsort(~some, stable=True)
    samples, valid = samples[order], valid[order]
    fetched = (images[samples], labels[samples]) if gather == "client" else None

    def step(index: jax.Array, carry: Any) -> Any:
        params, state = carry
        if fetched is None:
            batch = images[samples[index]], labels[samples[index]]
        else:
            batch = fetched[0][index], fetched[1][index]
        updates, state = optimizer.update(
            jax.grad(loss)(params, *batch, valid[index]), state, params
        )
        return optax.apply_updates(params, updates), state

    steps = jnp.sum(some, dtype=jnp.int32)
    return lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]
