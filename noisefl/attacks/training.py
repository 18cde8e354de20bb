"""The training that thieves do: stochastic gradient descent on data of their own.

All of them, the controls included, train in the same way and search the same range of rates, so
that none looks better for having been tuned harder.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import lax

from noisefl import evaluate, keys
from noisefl.attacks.base import Attack, Public
from noisefl.local import Own
from noisefl.parts import Number, number, part, size

Params = Any
# (what is trained, positions [B], key) → loss []
Objective = Callable[[Params, jax.Array, jax.Array], jax.Array]

FACTORS = (1 / 3, 1.0, 3.0)  # times `rate`: the candidates
CLIP = 1.0  # norm of a gradient: a copy that noise has broken has huge ones


@part
class Training(Attack):
    """Base of the thieves that train: `steps` batches. Candidates differ in the rate."""

    abstract: ClassVar[bool] = True
    restates: ClassVar[bool] = True

    rate: Number = number(0.03, "η, in the middle of those tried", low=0, inside="()")
    momentum: Number = number(0.9, "of the thief's descent", low=0, high=1, inside="[)")
    steps: int = size(200, "batches that it trains on", unit="batches")
    batch_size: int = size(50, "images a batch, drawn with replacement", unit="images")

    def candidates(self) -> list[Attack]:
        return [self.replace(rate=self.rate * factor) for factor in FACTORS]

    def optimizer(self) -> optax.GradientTransformation:
        """Momentum, on gradients of bounded norm, the rate falling to 0 on a half cosine."""
        return optax.chain(
            optax.clip_by_global_norm(CLIP), optax.sgd(self.falling_rate, self.momentum)
        )

    def falling_rate(self, step: Any) -> Any:
        """η of a step, a half cosine from `rate` to 0."""
        return self.rate * optax.cosine_decay_schedule(1.0, self.steps)(step)

    def descend(
        self, key: jax.Array, start: Any, objective: Objective, count: jax.Array,
        trained: Any = None,
    ) -> Any:  # fmt: skip
        """What is trained, after all steps.

        Args:
          key: of the batches.
          start: any pytree of floats.
          objective: its mean loss on a batch, given as positions int32 [B] below `count`, with a
            key for what is random in training.
          count: int32 [], images.
          trained: bool [] of each leaf; the others stay as they are. Default: all.
        """
        optimizer = self.optimizer()

        def step(number: jax.Array, carry: Any) -> Any:
            params, state = carry
            own = keys.stream(key, "batch", number)
            chosen = jax.random.randint(own, (self.batch_size,), 0, jnp.maximum(count, 1))
            gradient = jax.grad(objective)(params, chosen, keys.stream(own, "loss"))
            if trained is not None:
                gradient = jax.tree.map(lambda g, t: jnp.where(t, g, 0), gradient, trained)
            updates, state = optimizer.update(gradient, state, params)
            if trained is not None:  # a norm that is NaN makes all of them so
                updates = jax.tree.map(lambda u, t: jnp.where(t, u, 0), updates, trained)
            return optax.apply_updates(params, updates), state

        return lax.fori_loop(0, self.steps, step, (start, optimizer.init(start)))[0]


def labelled(own: Own, public: Public) -> Objective:
    """Mean cross-entropy of a model, as in training, on own images and labels, float32 []."""

    def objective(params: Params, positions: jax.Array, key: jax.Array) -> jax.Array:
        rows = own.rows[positions]
        logits, _ = public.functions.train(params, evaluate.scale(own.images[rows]), key)
        wanted = jax.nn.one_hot(own.labels[rows], logits.shape[-1])
        return jnp.mean(optax.softmax_cross_entropy(logits, wanted))

    return objective
