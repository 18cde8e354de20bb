"""A strength predicted from the logits of a few images, then verified on others.

Along one draw the logits of a copy change smoothly with the strength, exactly linearly where the
noise is on the last layer. A secant through the logits at strengths 0 and s foretells the accuracy
at every other strength without another forward pass.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from noisefl import evaluate, keys
from noisefl.calibrate.base import Calibrator, Draw, Probe, aim, warm_start
from noisefl.calibrate.blocks import deal
from noisefl.calibrate.climb import climb

GRID = np.geomspace(0.25, 4.0, 65)  # strengths foretold, times that of the secant
NEAR = 1.5  # the secant is trusted within this factor


class _Guess(NamedTuple):
    strength: jax.Array  # float32 []
    near: jax.Array  # bool []
    secants: jax.Array  # int32 []


def _weakest(
    clean: jax.Array, pair: jax.Array, right_at: Callable[[jax.Array], jax.Array], target: jax.Array
) -> jax.Array:
    """The weakest ratio of the grid at which both foretold accuracies are on target.

    Args:
      clean: [n, C], logits of the base.
      pair: [2, n, C], logits of both copies.
      right_at: logits [n, C] → accuracy float32 [].
      target: float32 [].
    """

    def accuracy(ratio: jax.Array) -> jax.Array:
        foretold = clean + ratio * (pair - clean)
        return jnp.maximum(right_at(foretold[0]), right_at(foretold[1]))

    grid = jnp.asarray(GRID, jnp.float32)
    under = lax.map(accuracy, grid) <= target
    return jnp.where(jnp.any(under), grid[jnp.argmax(under)], grid[-1])


def _straight(clean: jax.Array, pair: jax.Array) -> jax.Array:
    """bool []: the base lies midway between its copies, so that secants hold at any strength."""
    bend = jnp.mean(jnp.abs(pair[0] + pair[1] - 2 * clean))
    return bend <= 1e-4 * jnp.mean(jnp.abs(pair[0] - pair[1]))


def predictive(
    draws: int = 3,
    scouts: int = 120,
    gap: float = 1 / 12,
    chunk: int = 50,
    limit: int = 1500,
    step: float = 1.07,
    stratified: bool = True,
) -> Calibrator:
    """Foretells the strength at which the better copy is somewhat below the aim, and verifies it.

    Of several draws it takes the one that needs least: one draw at whatever strength it needs broke
    models down (BUILD_NOTES.md).

    Guarantee: that of `sequential`. Draw and strength are chosen on the scouts alone, and verified
    on other images; where the verification fails it climbs.

    Args:
      draws: of which the one with the weakest foretold strength is taken.
      scouts: images of which logits are taken, at most half of all that are dealt.
      gap: share of cap − cap_margin that is left below it (0.05 of 0.6); small ones need more
        images, large ones more strength.
      chunk: images between two looks of the verification.
      limit: images that one copy is verified on at most; undecided then, it climbs.
      step: factor of that climb.
      stratified: as in `sequential`.
    """

    def calibrate(key, base, probe: Probe, hyper, carry):
        del base
        dealt = deal(keys.stream(key, "images"), probe, scouts + limit, stratified)
        most, strata = dealt.images.shape
        number = max(1, min(scouts // strata, most // 2))
        seen, jury = dealt.slice(0, number), dealt.slice(number)
        chosen, target = seen.images.reshape(-1), aim(hyper) * (1 - gap)
        labels, logits = probe.labels[chosen], probe.of(chosen)

        def draw_of(number: jax.Array) -> Draw:
            return probe.draw(keys.stream(key, "draw", number))

        def right_at(logits: jax.Array) -> jax.Array:
            right = evaluate.correct(logits, labels).reshape(number, strata)
            return jnp.dot(jnp.mean(right.astype(jnp.float32), axis=0), seen.weights)

        def guess(at: jax.Array, pair: jax.Array, secants: jax.Array) -> _Guess:
            new = at * _weakest(clean, pair, right_at, target)
            new = jnp.clip(new, jnp.float32(hyper.strength), hyper.strength_max)
            # Short of the ends of the grid, at which the answer may lie beyond.
            trusted = jnp.where(_straight(clean, pair), 0.99 * GRID[-1], NEAR)
            return _Guess(new, jnp.abs(jnp.log(new / at)) <= jnp.log(trusted), secants)

        def copies(draw: Draw, at: jax.Array) -> jax.Array:
            return logits(draw, at * jnp.asarray([1.0, -1.0]))

        start = warm_start(carry, hyper, 1.0)
        candidates = jax.vmap(draw_of)(jnp.arange(draws))
        clean = logits(draw_of(jnp.int32(0)), jnp.zeros(1))[0]
        pairs = jax.vmap(copies, (0, None))(candidates, start)
        guesses = jax.vmap(lambda pair: guess(start, pair, jnp.int32(1)))(pairs)
        weakest = jnp.argmin(guesses.strength)
        draw, best = jax.tree.map(lambda leaf: leaf[weakest], (candidates, guesses))
        foretold = lax.while_loop(
            lambda g: ~g.near & (g.secants < 4),
            lambda g: guess(g.strength, copies(draw, g.strength), g.secants + 1),
            best,
        )

        def draw_after(number: jax.Array) -> Draw:
            fresh = draw_of(number + draws - 1)
            return jax.tree.map(lambda a, b: jnp.where(number == 0, a, b), draw, fresh)

        found = climb(probe, draw_after, foretold.strength, jury, hyper, step, chunk)
        looked = 1 + 2 * (draws - 1 + foretold.secants)
        found = dataclasses.replace(
            found,
            evaluations=found.evaluations + looked,
            samples=found.samples + looked * chosen.size,
        )
        return found, jnp.where(found.feasible, found.strength, carry)

    return Calibrator(init=lambda: jnp.float32(jnp.nan), calibrate=calibrate)
