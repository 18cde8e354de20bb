"""The source's loop with a sequential test in place of whole-split accuracies.

ALGORITHM.md, "One round", the while loop; `verdict` for the test.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import keys
from noisefl.calibrate.base import Calibration, Calibrator, Draw, Probe, aim, warm_start
from noisefl.calibrate.verdict import share_of_error, verdict
from noisefl.config import Hyper


class Climb(NamedTuple):
    """Where a ladder of strengths has got to."""

    attempt: jax.Array  # int32 []: verdicts so far
    lap: jax.Array  # int32 []: draws given up at σ_max
    strength: jax.Array  # float32 []: of the last attempt
    holds: jax.Array  # bool []
    evaluations: jax.Array  # int32 []
    samples: jax.Array  # int32 []


def climb(
    probe: Probe,
    draw_of: Callable[[jax.Array], Draw],
    start: jax.Array,
    images: jax.Array,
    hyper: Hyper,
    factor: jax.Array | float,
    chunk: int,
) -> tuple[Draw, Climb]:
    """Tries start, start · factor, … until a verdict holds; attempt j spends its share of δ.

    A draw that fails at σ_max is given up for a fresh one, from the start again. Ends after
    `max_tries` attempts with the last one, which then does not hold.

    The ladder is fixed before the images are seen, so that all attempts may read the same ones:
    the error rates add up.

    Args:
      probe: of the base.
      draw_of: lap int32 [] → draw.
      start: float32 [], the first strength, at least σ0.
      images: int32 [n], indices in random order.
      hyper: `cap`, `cap_margin`, `error_rate`, `strength_max`, `max_tries`.
      factor: between two strengths.
      chunk: images between two looks.
    """

    def attempt(last: Climb, strength: jax.Array, lap: jax.Array) -> Climb:
        number = last.attempt + 1
        error = hyper.error_rate * share_of_error(number)
        found = verdict(probe, draw_of(lap), strength, images, aim(hyper), error, chunk)
        return Climb(
            number,
            lap,
            strength,
            found.holds,
            last.evaluations + found.evaluations,
            last.samples + found.samples,
        )

    def again(last: Climb) -> Climb:
        top = last.strength >= hyper.strength_max
        higher = jnp.minimum(last.strength * factor, hyper.strength_max)
        return attempt(last, jnp.where(top, start, higher), last.lap + top)

    none = jnp.int32(0)
    before = Climb(none, none, start, jnp.bool_(False), none, none)
    last = lax.while_loop(
        lambda last: ~last.holds & (last.attempt < hyper.max_tries),
        again,
        attempt(before, start, none),
    )
    return draw_of(last.lap), last


def sequential(chunk: int = 50, limit: int = 1500) -> Calibrator:
    """Climbs from below the last round's strength until the test accepts.

    Guarantee: the chance, over the order of the images and the images themselves, that a round
    ships as feasible a pair of which one copy's accuracy on their distribution exceeds
    cap − cap_margin is at most δ = `Hyper.error_rate`, whatever the base and the draw, as long as
    the base was not fitted to the validation images. (It depends on them only through earlier
    rounds' strengths.)

    Args:
      chunk: images between two looks.
      limit: images that one copy is judged on at most; undecided then, it does not hold.
    """

    def calibrate(key, base, probe: Probe, hyper: Hyper, carry):
        del base
        images = jax.random.permutation(keys.stream(key, "images"), probe.labels.shape[0])
        start = warm_start(carry, hyper, 0.7)
        draw, last = climb(
            probe,
            lambda lap: probe.draw(keys.stream(key, "draw", lap)),
            start,
            images[:limit].astype(jnp.int32),
            hyper,
            hyper.strength_factor,
            chunk,
        )
        nan = jnp.float32(jnp.nan)
        return Calibration(
            draw=draw,
            strength=last.strength,
            feasible=last.holds,
            plus_accuracy=nan,
            minus_accuracy=nan,
            tries=last.attempt,
            evaluations=last.evaluations,
            samples=last.samples,
        ), jnp.where(last.holds, last.strength, carry)

    return Calibrator(init=lambda: jnp.float32(jnp.nan), calibrate=calibrate)
