"""A strength predicted from the logits of a few images, then verified on others.

Along one draw the logits of a copy change smoothly with the strength, exactly linearly where the
noise is on the last layer. A secant through the logits at strengths 0 and s foretells the accuracy
at every other strength without another forward pass.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from noisefl import keys
from noisefl.calibrate.base import Calibration, Calibrator, Draw, Probe, aim, warm_start
from noisefl.calibrate.sequential import climb
from noisefl.config import Hyper

GRID = np.geomspace(0.25, 4.0, 65)  # strengths foretold, times that of the secant
NEAR = 1.5  # the secant is trusted within this factor


class _Guess(NamedTuple):
    strength: jax.Array  # float32 []
    near: jax.Array  # bool []
    secants: jax.Array  # int32 []


def _weakest(
    clean: jax.Array, pair: jax.Array, labels: jax.Array, at: jax.Array, target: jax.Array
) -> jax.Array:
    """The weakest strength of the grid around `at` whose foretold accuracies are on target.

    Args:
      clean: [n, C], logits of the base.
      pair: [2, n, C], logits of both copies at strength `at`.
      labels: int32 [n].
      at: float32 [].
      target: float32 [].
    """

    def accuracy(ratio: jax.Array) -> jax.Array:
        foretold = clean + ratio * (pair - clean)
        right = (jnp.argmax(foretold, axis=-1) == labels).astype(jnp.float32)
        return jnp.max(jnp.mean(right, axis=1))

    grid = jnp.asarray(GRID, jnp.float32)
    under = lax.map(accuracy, grid) <= target
    first = jnp.argmax(under)  # 0 where none is
    return at * jnp.where(jnp.any(under), grid[first], grid[-1])


def predictive(
    scouts: int = 256,
    gap: float = 0.04,
    chunk: int = 50,
    limit: int = 1500,
    step: float = 1.07,
) -> Calibrator:
    """Foretells the strength at which the better copy is `gap` below the aim, and verifies it.

    Guarantee: that of `sequential`. The strength is chosen on the scouts alone, and verified on
    other images; where the verification fails it climbs.

    Args:
      scouts: images of which logits are taken, at most half of the split.
      gap: below cap − cap_margin; small ones need more images, large ones more strength.
      chunk: images between two looks of the verification.
      limit: images that one copy is verified on at most; undecided then, it climbs.
      step: factor of that climb.
    """

    def calibrate(key, base, probe: Probe, hyper: Hyper, carry):
        del base
        size = probe.labels.shape[0]
        number = max(1, min(scouts, size // 2))
        images = jax.random.permutation(keys.stream(key, "images"), size).astype(jnp.int32)
        chosen, jury = images[:number], images[number : number + limit]
        low = jnp.float32(hyper.strength)

        def draw_of(lap: jax.Array) -> Draw:
            return probe.draw(keys.stream(key, "draw", lap))

        draw, target = draw_of(jnp.int32(0)), aim(hyper) - gap
        labels = probe.labels[chosen]

        clean = probe.logits(draw, jnp.zeros(1), chosen)[0]

        def secant(guess: _Guess) -> _Guess:
            pair = probe.logits(draw, guess.strength * jnp.asarray([1.0, -1.0]), chosen)
            new = _weakest(clean, pair, labels, guess.strength, target)
            new = jnp.clip(new, low, hyper.strength_max)
            moved = jnp.abs(jnp.log(new / guess.strength))
            return _Guess(new, moved <= np.log(NEAR), guess.secants + 1)

        first = _Guess(warm_start(carry, hyper, 1.0), jnp.bool_(False), jnp.int32(0))
        guess = lax.while_loop(lambda g: ~g.near & (g.secants < 4), secant, first)
        draw, last = climb(probe, draw_of, guess.strength, jury, hyper, step, chunk)
        nan = jnp.float32(jnp.nan)
        return Calibration(
            draw=draw,
            strength=last.strength,
            feasible=last.holds,
            plus_accuracy=nan,
            minus_accuracy=nan,
            tries=last.attempt,
            evaluations=last.evaluations + 1 + 2 * guess.secants,
            samples=last.samples + number * (1 + 2 * guess.secants),
        ), jnp.where(last.holds, last.strength, carry)

    return Calibrator(init=lambda: jnp.float32(jnp.nan), calibrate=calibrate)
