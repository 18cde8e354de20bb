"""Many draws and strengths at once: one large batch keeps an accelerator busy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import keys
from noisefl.calibrate.base import Calibration, Calibrator, Draw, Probe, holds, warm_start
from noisefl.config import Hyper


class _Batch(NamedTuple):
    number: jax.Array  # int32 []: batches so far
    draw: Draw  # the choice of the last one
    strength: jax.Array
    plus: jax.Array
    minus: jax.Array
    holds: jax.Array
    top: jax.Array  # float32 []: the strongest tried
    evaluations: jax.Array
    samples: jax.Array


def parallel(draws: int = 2, strengths: int = 8) -> Calibrator:
    """Evaluates draws × strengths as one batch; the weakest that holds wins.

    The strengths are a ladder by `strength_factor`, from two steps below the last round's. While
    none holds, the next batch takes fresh draws and goes on where the ladder ended, up to σ_max,
    as long as `max_tries` allows a whole batch more.

    Guarantee: as `bisection`: on the N images of the judging split, and on those alone.

    Args:
      draws: side by side.
      strengths: of each. A batch is never cut: the first goes even beyond `max_tries`.
    """
    each = draws * strengths

    def calibrate(key, base, probe: Probe, hyper: Hyper, carry):
        del base
        factor, top = jnp.float32(hyper.strength_factor), jnp.float32(hyper.strength_max)

        def batch(number: jax.Array, start: jax.Array, spent: tuple[jax.Array, jax.Array]):
            ladder = jnp.minimum(start * factor ** jnp.arange(strengths), top)
            stream = keys.stream(key, "batch", number)
            drawn = jax.vmap(lambda d: probe.draw(keys.stream(stream, "draw", d)))(
                jnp.arange(draws)
            )
            of_draw = jax.vmap(lambda strength, draw: probe.accuracy(draw, strength), (0, None))
            readings = jax.vmap(lambda draw: of_draw(ladder, draw))(drawn)
            good = holds(readings, hyper)  # [draws, strengths]
            rank = jnp.where(good, ladder, jnp.inf)
            some = jnp.any(good)
            best = jnp.where(some, jnp.argmin(rank), strengths - 1)  # else the strongest
            row, column = best // strengths, best % strengths
            return _Batch(
                number=number + 1,
                draw=jax.tree.map(lambda leaf: leaf[row], drawn),
                strength=ladder[column],
                plus=readings.plus[row, column],
                minus=readings.minus[row, column],
                holds=some,
                top=ladder[-1],
                evaluations=spent[0] + jnp.sum(readings.evaluations),
                samples=spent[1] + jnp.sum(readings.samples),
            )

        def again(last: _Batch) -> _Batch:
            start = jnp.minimum(last.top * factor, top)
            return batch(last.number, start, (last.evaluations, last.samples))

        def unfinished(last: _Batch) -> jax.Array:
            return ~last.holds & ((last.number + 1) * each <= hyper.max_tries)

        none = jnp.int32(0)
        start = warm_start(carry, hyper, 1.0)
        start = jnp.maximum(start / factor**2, jnp.float32(hyper.strength))
        last = lax.while_loop(unfinished, again, batch(none, start, (none, none)))
        return Calibration(
            draw=last.draw,
            strength=last.strength,
            feasible=last.holds,
            plus_accuracy=last.plus,
            minus_accuracy=last.minus,
            tries=last.number * each,
            evaluations=last.evaluations,
            samples=last.samples,
        ), jnp.where(last.holds, last.strength, carry)

    return Calibrator(init=lambda: jnp.float32(jnp.nan), calibrate=calibrate)
