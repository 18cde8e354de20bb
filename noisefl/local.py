"""One client's local training (ClientUpdate of the source). Knows no client axis.

ALGORITHM.md, "One round": E local epochs of minibatch SGD, batch size B, learning rate η.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from noisefl import evaluate, keys
from noisefl.augmentation import Augmentation, Plain
from noisefl.models import Functions, with_leaves
from noisefl.optimizers import SGD as SGD
from noisefl.optimizers import Optax as Optax
from noisefl.optimizers import Optimizer, taken
from noisefl.parts import Part, child, choice, part, size

Params = Any


@struct.dataclass
class Own:
    """What a client holds: some rows of all training images."""

    images: jax.Array  # uint8 [N, H, W, Ch], all clients'
    labels: jax.Array  # int32 [N]
    rows: jax.Array  # int32 [P], indices into them; valid in the first `count`
    count: jax.Array  # int32 [], n_k


@part
class Training(Part):
    """E epochs of minibatch descent on a client's own images, from the model that it received.

    Of your own: a part with `train` and `samples`.
    """

    optimizer: Optimizer = child(SGD, "of local training; any optax transformation is taken")
    local_epochs: int = size(1, "E, passes over a client's data a round", unit="epochs")
    batch_size: int = size(10, "B", unit="images")
    augmentation: Augmentation = child(Plain, "of a batch's images")
    batch_order: str = choice(
        "once", ("once", "every_epoch"), "a client's data are batched once a round, or every epoch"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", taken(self.optimizer))
        super().__post_init__()

    def samples(self, count: jax.Array) -> jax.Array:
        """Images that a client of n_k samples trains on in a round, each epoch counted: of int32
        [...] int32 [...]."""
        return count * self.local_epochs

    def train(
        self, key: jax.Array, round: jax.Array, model: Functions, params: Params, own: Own,
        gather: str, rate: jax.Array | None = None,
    ) -> Params:  # fmt: skip
        """The client's model after local training.

        Args:
          key: the client's key of this round.
          round: int32 [], t.
          model: of `models.functions`.
          params: what the client received.
          own: its data.
          gather: of `Strategy`.
          rate: float32 [], what multiplies every step, where the scheme asks for that.
        """
        positions, valid = self.batches(key, own.count, own.rows.shape[0])
        return descend(
            keys.stream(key, "steps"), model, self.optimizer.transformation(round), params, own,
            own.rows[positions], valid, gather, rate, self.augmentation,
        )  # fmt: skip

    def batches(self, key: jax.Array, count: jax.Array, padded: int) -> tuple[jax.Array, jax.Array]:
        """Splits a client's samples at random into the batches of all its local steps.

        Args:
          key: the client's key of this round.
          count: int32 [], n_k.
          padded: P, the largest n_k of the population; every client has S = E · ⌈P / B⌉ steps.

        Returns:
          positions int32 [S, B] into the client's samples, and valid bool [S, B]. The last batch of
          an epoch may be smaller; steps past a client's own data are wholly invalid.
        """
        steps = -(-padded // self.batch_size)
        slots = steps * self.batch_size

        def epoch(key: jax.Array) -> jax.Array:
            # Sorting random numbers, padding last, permutes the first n_k positions.
            lots = jax.random.uniform(key, (padded,))
            rank = jnp.where(jnp.arange(padded) < count, lots, jnp.inf)
            order = jnp.argsort(rank).astype(jnp.int32)
            return jnp.pad(order, (0, slots - padded))

        if self.batch_order == "once":
            positions = jnp.tile(epoch(keys.stream(key, "epoch", 0)), (self.local_epochs, 1))
        else:
            epochs = jnp.arange(self.local_epochs)
            positions = jax.vmap(lambda e: epoch(keys.stream(key, "epoch", e)))(epochs)
        valid = jnp.tile(jnp.arange(slots) < count, (self.local_epochs, 1))
        shape = (self.local_epochs * steps, self.batch_size)
        return positions.reshape(shape), valid.reshape(shape)


def descend(
    key: jax.Array, model: Functions, optimizer: optax.GradientTransformation, params: Params,
    own: Own, samples: jax.Array, valid: jax.Array, gather: str = "step",
    rate: jax.Array | None = None, augmentation: Augmentation | None = None,
) -> Params:  # fmt: skip
    """Trains `params` on the given batches, one optimizer step each.

    Args:
      key: of what is random in training, such as dropout.
      model: of `models.functions`. Its running statistics are those after the last batch; a batch
        that is not full is filled up with its own images in turn, which count for them alone.
      optimizer: an optax transformation, begun afresh.
      params: where to start.
      own: `images` and `labels` are read.
      samples: int32 [S, B], indices into the images.
      valid: bool [S, B]; a step without a valid sample changes nothing, and is computed only while
        any client beside it has a step left.
      gather: "step" fetches a batch's images when its step comes; "client" all of them first.
      rate: float32 [], what multiplies every step.
      augmentation: of each batch's images.
    """
    augment = augmentation if augmentation and not augmentation.identity else None

    def loss(
        params: Params, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict]:
        if model.has_modes:
            valid_first = jnp.argsort(labels < 0, stable=True)
            there = jnp.maximum(jnp.sum(labels >= 0), 1)
            filled = valid_first[jnp.arange(labels.shape[0]) % there]
            images = images[jnp.where(labels >= 0, jnp.arange(labels.shape[0]), filled)]
        logits, statistics = model.train(params, evaluate.scale(images), key)
        # Labels are compared, not looked up: the gradient of a look-up is a kernel of its own. A
        # masked sample is of no class.
        losses = optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1]))
        return jnp.sum(losses) / jnp.maximum(jnp.sum(labels >= 0), 1), statistics

    # Steps with data come first: the loop can then end with the last of them.
    some = jnp.any(valid, axis=1)
    order = jnp.argsort(~some, stable=True)
    samples, valid = samples[order], valid[order]
    labels = jnp.where(valid, own.labels[samples], -1)
    images = own.images[samples] if gather == "client" else None
    steps = jnp.sum(some, dtype=jnp.int32)

    def step(index: jax.Array, carry: Any) -> Any:
        params, state, valid = carry
        batch = own.images[samples[index]] if images is None else images[index]
        random = model.has_modes or augment
        own_key = keys.stream(key, "step", index) if random else key
        if augment:
            batch = augment.change(keys.stream(own_key, "augmentation"), batch)
        gradient, statistics = jax.grad(loss, has_aux=True)(params, batch, labels[index], own_key)
        updates, after = optimizer.update(gradient, state, params)
        if rate is not None:
            updates = jax.tree.map(lambda update: rate * update, updates)
        kept = jax.tree.map(
            lambda new, old: jnp.where(valid, new, old),
            (with_leaves(optax.apply_updates(params, updates), statistics), after),
            (params, state),
        )
        return *kept, index + 1 < steps  # here: what is compared in a step does not fuse with it

    begun = params, optimizer.init(params), steps > 0
    return lax.fori_loop(0, _longest(steps), step, begun)[0]


@jax.custom_batching.custom_vmap
def _longest(steps: jax.Array) -> jax.Array:
    """The number of steps; of clients side by side the largest, as one number for all. A loop of
    theirs then has one end, and vmap has no need to choose between old and new after each step."""
    return steps


@_longest.def_vmap
def _(size: int, batched: list[bool], steps: jax.Array) -> tuple[jax.Array, bool]:
    return (jnp.max(steps) if batched[0] else steps), False
