"""A sequential test of "neither copy is more accurate than the aim".

Wald 1947; Ville 1939; Waudby-Smith & Ramdas 2020 (arXiv 2006.04347) for the betting view. If a
copy's accuracy on the distribution of the images is p ≥ aim, the likelihood ratio of an accuracy
q < aim against the aim, over images seen one by one, is a supermartingale, and so is any average
over several q fixed beforehand. It ever reaches 1/α with probability at most α.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import evaluate
from noisefl.calibrate.base import Draw, Probe

GAPS = (0.05, 0.025, 0.1, 0.2)  # q = aim − gap; most weight where calibrators aim
WEIGHTS = (0.7, 0.1, 0.1, 0.1)
FUTILE = 0.05  # chance to give up a copy that does hold; costs strength, never the guarantee


class Verdict(NamedTuple):
    """What the images said of one pair of copies."""

    holds: jax.Array  # bool []: both were shown to be at or under the aim
    samples: jax.Array  # int32 []: forward passes of single images
    evaluations: jax.Array  # int32 []: copies looked at


class _Copy(NamedTuple):
    read: jax.Array  # int32 []: images seen
    right: jax.Array  # int32 []: of which correct
    under: jax.Array  # bool []: shown to be at or under the aim
    over: jax.Array  # bool []: given up


def share_of_error(attempt: jax.Array) -> jax.Array:
    """Part of the round's error rate that attempt j = 1, 2, … may spend; they sum to 1.

    Three quarters for the first, which is usually the last.
    """
    j = attempt.astype(jnp.float32)
    return jnp.where(j < 1.5, 0.75, 0.25 / jnp.maximum(j * (j - 1), 1.0))


def _evidence(right: jax.Array, wrong: jax.Array, aim: jax.Array, sign: float) -> jax.Array:
    """log of the averaged likelihood ratio of accuracies aim + sign · gap against the aim."""
    gaps, weights = jnp.asarray(GAPS), jnp.asarray(WEIGHTS)
    low, high = jnp.minimum(1e-3, aim / 2), jnp.minimum(1e-3, (1 - aim) / 2)
    other = jnp.clip(aim + sign * gaps, low, 1 - high)  # strictly on its side of the aim
    ratio = right * jnp.log(other / aim) + wrong * jnp.log((1 - other) / (1 - aim))
    return jax.nn.logsumexp(ratio, b=weights)


def verdict(
    probe: Probe,
    draw: Draw,
    strength: jax.Array,
    images: jax.Array,
    aim: jax.Array,
    error: jax.Array,
    chunk: int,
) -> Verdict:
    """Judges W ± strength · draw on images read in order, a chunk at a time, until decided.

    P(holds) ≤ error whenever one copy's accuracy exceeds the aim, for images that are independent
    draws from the distribution that accuracy speaks of, and on which neither the base, the draw
    nor the strength was chosen. A copy undecided after all images does not hold.

    Args:
      probe: of the base.
      draw: unit noise.
      strength: float32 [].
      images: int32 [n], indices in random order.
      aim: float32 [].
      error: float32 [], α.
      chunk: images between two looks.
    """
    size = images.shape[0]
    if size == 0:
        return Verdict(jnp.bool_(False), jnp.int32(0), jnp.int32(0))
    chunk = min(chunk, size)

    def judge(signed: jax.Array, wanted: jax.Array) -> _Copy:
        def look(copy: _Copy) -> _Copy:
            chosen = lax.dynamic_slice_in_dim(images, copy.read, chunk)
            logits = probe.logits(draw, signed[None], chosen)[0]
            right = copy.right + jnp.sum(
                evaluate.correct(logits, probe.labels[chosen]), dtype=jnp.int32
            )
            read = copy.read + chunk
            # Wrong answers of a dead model prove nothing: a NaN logit ends in "over".
            dead = jnp.any(jnp.isnan(logits))
            under = _evidence(right, read - right, aim, -1) >= -jnp.log(error)
            over = _evidence(right, read - right, aim, +1) >= -jnp.log(FUTILE)
            return _Copy(read, right, under & ~dead & (aim > 0), over | dead)

        def undecided(copy: _Copy) -> jax.Array:
            return wanted & ~copy.under & ~copy.over & (copy.read + chunk <= size)

        none, no = jnp.int32(0), jnp.bool_(False)
        return lax.while_loop(undecided, look, _Copy(none, none, no, no))

    plus = judge(strength, jnp.bool_(True))
    minus = judge(-strength, plus.under)
    looked = 1 + plus.under.astype(jnp.int32)
    return Verdict(plus.under & minus.under, plus.read + minus.read, looked)
