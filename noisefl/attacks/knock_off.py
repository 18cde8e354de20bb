"""Knock-off: distillation of the owner's answers (PROTECTION.md, "Thieves")."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import lax

from noisefl import evaluate, keys
from noisefl.attacks.average import mean, weights
from noisefl.attacks.base import Params, Public, View
from noisefl.attacks.training import Training
from noisefl.local import Own
from noisefl.parts import part, size

SHIFT = 2  # pixels, up to


@part
class KnockOff(Training):
    """Cross-entropy to the owner's probabilities, all layers, from the mean of all copies on.

    It asks about its own images, and about shifted and mixed ones: a network is copied well with
    questions that are close to its task (Orekondy et al. 2019, arXiv 1812.02766), and mixed images
    lie where its boundaries are.
    """

    views: ClassVar[tuple[str, ...]] = ("V5",)

    asked: int = size(2000, "Q, questions that the owner answers", unit="images")

    def questions(self, key: jax.Array, own: Own, public: Public) -> jax.Array:
        """Own images in random order, half of all questions at most; then shifted by up to two
        pixels, and mixed of two, λ x + (1 − λ) x', in turn. uint8 [Q, H, W, Ch]."""
        padded, count = own.rows.shape[0], jnp.maximum(own.count, 1)
        lots = jax.random.uniform(keys.stream(key, "order"), (padded,))
        order = jnp.argsort(jnp.where(jnp.arange(padded) < count, lots, jnp.inf))
        number = jnp.arange(self.asked)
        images = own.images[own.rows[order[number % count]]]
        partners = jax.random.randint(keys.stream(key, "partner"), (self.asked,), 0, count)
        mixed = _mixed(keys.stream(key, "mix"), images, own.images[own.rows[partners]])
        shifted = _shifted(keys.stream(key, "shift"), images)
        plain = number < jnp.minimum(count, (self.asked + 1) // 2)
        every = (slice(None), None, None, None)
        changed = jnp.where((number % 2 == 0)[every], shifted, mixed)
        return jnp.where(plain[every], images, changed)

    def steal(self, key: jax.Array, view: View, own: Own, public: Public) -> Params:
        questions, answers = view.questions, view.answers
        assert questions is not None, "a view V5 holds questions and answers"
        assert answers is not None

        def objective(params: Params, batch: jax.Array, key: jax.Array) -> jax.Array:
            logits, _ = public.functions.train(params, evaluate.scale(questions[batch]), key)
            return jnp.mean(optax.softmax_cross_entropy(logits, answers[batch]))

        start = mean(view.copies, weights(view, public.touched))
        return self.descend(key, start, objective, jnp.int32(answers.shape[0]))


def _mixed(key: jax.Array, images: jax.Array, others: jax.Array) -> jax.Array:
    """λ x + (1 − λ) x' with λ uniform, uint8 [Q, H, W, Ch]."""
    share = jax.random.uniform(key, (images.shape[0], 1, 1, 1))
    return jnp.round(share * images + (1 - share) * others).astype(jnp.uint8)


def _shifted(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each by a whole number of pixels both ways, −2 … 2; zeros come in."""
    border = (SHIFT, SHIFT)
    wide = jnp.pad(images, ((0, 0), border, border, (0, 0)))
    by = jax.random.randint(key, (images.shape[0], 2), 0, 2 * SHIFT + 1)

    def one(image: jax.Array, by: jax.Array) -> jax.Array:
        return lax.dynamic_slice(image, (by[0], by[1], 0), images.shape[1:])

    return jax.vmap(one)(wide, by)
