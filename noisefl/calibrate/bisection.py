"""One draw, whose weakest strength that holds is bracketed and halved on log σ."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import keys
from noisefl.calibrate.base import Calibration, Calibrator, Probe, Reading, holds, warm_start
from noisefl.config import Hyper


class _Bracket(NamedTuple):
    low: jax.Array  # float32 []: strongest that failed; σ0 / 2 where none did
    high: jax.Array  # float32 []: weakest that held; infinite where none did
    at: jax.Array  # float32 []: the last try
    reading: Reading  # of `high`, or of the last try where none held; costs of all tries
    tries: jax.Array  # int32 []


def bisection(tolerance: float = 1.05) -> Calibrator:
    """Doubles or halves the last round's strength to a bracket, then halves the bracket.

    Ends when the bracket is within `tolerance`, at σ0 if that holds, at σ_max if that fails, or
    after `max_tries`. Where accuracy does not fall with the strength it ends at some strength that
    holds next to one that does not.

    Guarantee: a feasible pair's accuracies on the N images of the judging split are at or under
    cap − cap_margin: it was evaluated on all of them. Nothing is said of other images; the search
    over tries makes a pair just under the cap on these likelier than its like on others.

    Args:
      tolerance: largest ratio of the strength that ships over the strongest seen to fail.
    """

    def calibrate(key, base, probe: Probe, hyper: Hyper, carry):
        del base
        draw = probe.draw(keys.stream(key, "draw"))
        floor, top = jnp.float32(hyper.strength), jnp.float32(hyper.strength_max)

        def tried(last: _Bracket, strength: jax.Array) -> _Bracket:
            new = probe.accuracy(draw, strength)
            good = holds(new, hyper)
            keep = ~good & jnp.isfinite(last.high)  # an earlier try still ships
            reading = Reading(
                plus=jnp.where(keep, last.reading.plus, new.plus),
                minus=jnp.where(keep, last.reading.minus, new.minus),
                evaluations=last.reading.evaluations + new.evaluations,
                samples=last.reading.samples + new.samples,
            )
            low = jnp.where(good, last.low, jnp.maximum(last.low, strength))
            high = jnp.where(good, jnp.minimum(last.high, strength), last.high)
            return _Bracket(low, high, strength, reading, last.tries + 1)

        def unfinished(last: _Bracket) -> jax.Array:
            found = jnp.isfinite(last.high)
            done = jnp.where(
                found,
                (last.high <= last.low * tolerance) | (last.high <= floor),
                last.low >= top,
            )
            return ~done & (last.tries < hyper.max_tries)

        def again(last: _Bracket) -> _Bracket:
            found, failed = jnp.isfinite(last.high), last.low >= floor
            middle = jnp.sqrt(last.low * last.high)
            down, up = jnp.maximum(last.high / 2, floor), jnp.minimum(last.low * 2, top)
            return tried(last, jnp.where(found, jnp.where(failed, middle, down), up))

        none, zero = jnp.int32(0), jnp.float32(0)
        start = warm_start(carry, hyper, 1.0)
        empty = Reading(zero, zero, none, none)
        first = _Bracket(floor / 2, jnp.float32(jnp.inf), start, empty, none)
        last = lax.while_loop(unfinished, again, tried(first, start))
        found = jnp.isfinite(last.high)
        strength = jnp.where(found, last.high, last.at)
        return Calibration(
            draw=draw,
            strength=strength,
            feasible=found,
            plus_accuracy=last.reading.plus,
            minus_accuracy=last.reading.minus,
            tries=last.tries,
            evaluations=last.reading.evaluations,
            samples=last.reading.samples,
        ), jnp.where(found, strength, carry)

    return Calibrator(init=lambda: jnp.float32(jnp.nan), calibrate=calibrate)
