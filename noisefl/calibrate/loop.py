"""The source's accuracy-driven loop.

ALGORITHM.md, "One round": σ ← σ0; while acc(W + ξ) > cap or acc(W − ξ) > cap: remove the previous
noise; raise σ; draw ξ ~ N(0, σ²).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import keys
from noisefl.calibrate.base import Calibration, Calibrator, Probe, Reading, holds
from noisefl.config import Hyper


def additive(strength: jax.Array, hyper: Hyper) -> jax.Array:
    """σ + Δ, the source's step."""
    return strength + hyper.strength_step


def geometric(strength: jax.Array, hyper: Hyper) -> jax.Array:
    """σ · f."""
    return strength * hyper.strength_factor


class _Loop(NamedTuple):
    tries: jax.Array
    strength: jax.Array
    reading: Reading


def accuracy_loop(
    raise_strength: Callable[[jax.Array, Hyper], jax.Array], redraw: str
) -> Calibrator:
    """Tries σ0, then ever larger strengths, until both copies are at or under the aim.

    Try j = 0 is at σ0, so that σ0 = 0 asks first whether the bare base needs noise at all. The
    strength stays at σ_max once it is there. The loop gives up, infeasible, after `max_tries`, and
    with one draw already after a failed try at σ_max, since another would be the same; it then
    ships the last, strongest try.

    Guarantee: as `bisection`: on the N images of the judging split, and on those alone.

    A ReLU network with max pooling is nearly homogeneous in its first layer, so that its accuracy
    tends to a limit as σ grows: without the bounds the loop need not end (ALGORITHM.md, "The loop
    need not end"). The limit depends on the draw, so that fresh draws at σ_max still find pairs
    that hold.

    Args:
      raise_strength: `additive` or `geometric`.
      redraw: "fresh": each try draws ξ anew; "rescale": one draw, only its strength changes.
    """

    def calibrate(key, base, probe: Probe, hyper: Hyper, carry):
        del base

        def drawn(tries: jax.Array):
            return probe.draw(keys.stream(key, "try", tries if redraw == "fresh" else 0))

        def unfinished(loop: _Loop) -> jax.Array:
            more = loop.tries < hyper.max_tries
            if redraw == "rescale":
                more &= loop.strength < hyper.strength_max
            return ~holds(loop.reading, hyper) & more

        def again(loop: _Loop) -> _Loop:
            strength = jnp.minimum(raise_strength(loop.strength, hyper), hyper.strength_max)
            new = probe.accuracy(drawn(loop.tries), strength)
            cost = (loop.reading.evaluations, loop.reading.samples)
            new = new._replace(evaluations=cost[0] + new.evaluations, samples=cost[1] + new.samples)
            return _Loop(loop.tries + 1, strength, new)

        strength = jnp.float32(hyper.strength)
        first = _Loop(jnp.int32(1), strength, probe.accuracy(drawn(jnp.int32(0)), strength))
        last = lax.while_loop(unfinished, again, first)
        reading = last.reading
        return Calibration(
            draw=drawn(last.tries - 1),
            strength=last.strength,
            feasible=holds(reading, hyper),
            plus_accuracy=reading.plus,
            minus_accuracy=reading.minus,
            tries=last.tries,
            evaluations=reading.evaluations,
            samples=reading.samples,
        ), carry

    return Calibrator(init=lambda: (), calibrate=calibrate)
