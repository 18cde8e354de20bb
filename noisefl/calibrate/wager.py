"""A sequential test of "this copy is no more accurate than the aim", by bets on blocks of images.

Waudby-Smith & Ramdas 2020 (arXiv 2006.04347); Ville 1939. If a copy's accuracy is at least the aim,
a gambler who stakes the fraction λ < 1 / (1 − aim) on every block x having fewer right answers has
capital Π (1 + λ (aim − x)), a supermartingale that starts at 1, and so is any average over several
λ fixed beforehand. It ever reaches 1/α with probability at most α.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BOLDNESS = (0.95, 0.5, 0.2, 0.05)  # λ over the largest allowed; small ones for small gaps
WEIGHTS = (0.6, 0.2, 0.1, 0.1)
LUCK = 1.5  # standard deviations, of `provable`
FUTILE = 0.05  # chance to give up a copy that does hold; costs strength, never the guarantee


class Wager(NamedTuple):
    """log capital of each λ."""

    under: jax.Array  # float32 [G], against "accuracy ≥ aim"
    over: jax.Array  # float32 [G], against "accuracy ≤ aim"


class Outcome(NamedTuple):
    """What the blocks so far have shown; neither, one, never both in earnest."""

    under: jax.Array  # bool []: accuracy is at or under the aim
    over: jax.Array  # bool []: no use going on


def start() -> Wager:
    return Wager(*(jnp.zeros(len(WEIGHTS)),) * 2)


def share_of_error(attempt: jax.Array) -> jax.Array:
    """Part of the round's error rate that attempt j = 1, 2, …, int32 [], may spend: float32 [].

    They sum to 1.
    Three quarters for the first, which with `predictive` is usually the last.
    """
    j = attempt.astype(jnp.float32)
    return jnp.where(j < 1.5, 0.75, 0.25 / jnp.maximum(j * (j - 1), 1.0))


def settle(
    wager: Wager, shares: jax.Array, aim: jax.Array, error: jax.Array
) -> tuple[Wager, Outcome]:
    """The wager after some more blocks.

    P(under, ever) ≤ error whenever the accuracy exceeds the aim.

    Args:
      wager: before them.
      shares: float32 [k], right answers of each block, weighted, between 0 and 1.
      aim: float32 [], in (0, 1).
      error: float32 [], α.
    """
    boldness, weights = jnp.asarray(BOLDNESS), jnp.asarray(WEIGHTS)

    def bet(before: jax.Array, gain: jax.Array, most: jax.Array) -> tuple[jax.Array, jax.Array]:
        capital = before + jnp.cumsum(jnp.log1p(boldness * most * gain[:, None]), axis=0)
        return capital[-1], jax.nn.logsumexp(capital, axis=1, b=weights)

    under, for_under = bet(wager.under, aim - shares, 1 / (1 - aim))
    over, for_over = bet(wager.over, shares - aim, 1 / aim)
    return Wager(under, over), Outcome(
        jnp.any(for_under >= -jnp.log(error)), jnp.any(for_over >= -jnp.log(FUTILE))
    )


def provable(aim: jax.Array, error: jax.Array, blocks: jax.Array, strata: int) -> jax.Array:
    """The highest accuracy at which some nine copies in ten pass the test within so many blocks.

    A stake λ / (1 − aim) on blocks of mean x and variance x (1 − x) / S grows as the logarithm's
    second-order expansion says; `LUCK` standard deviations of that are for the luck of the images.
    Of simulated copies 86 to 99 % pass, and more where classes explain some of the variance.

    Args:
      aim: float32 [], in (0, 1).
      error: float32 [], α.
      blocks: int32 [], T, all that there are to look at.
      strata: S, images of a block.

    Returns:
      float32 [], one of 65 from 0 to the aim; 0 where nothing above it passes.
    """
    boldness, weights = jnp.asarray(BOLDNESS)[:, None], jnp.asarray(WEIGHTS)[:, None]
    x = jnp.linspace(0, aim, 65)
    up, variance = 1 + boldness / (1 - aim) * (aim - x), x * (1 - x) / strata
    swing = boldness / (1 - aim) / up
    growth = blocks * (jnp.log(up) - jnp.square(swing) * variance / 2)
    proved = growth - LUCK * swing * jnp.sqrt(blocks * variance) + jnp.log(weights)
    return jnp.max(jnp.where(jnp.max(proved, axis=0) >= -jnp.log(error), x, 0))
