"""One draw, whose weakest strength that holds is bracketed and halved on log σ."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import keys
from noisefl.calibrate.base import Decision, Evidence, Probe, Search
from noisefl.calibrate.loop import ON_SPLIT
from noisefl.parts import Number, number, part


class _Bracket(NamedTuple):
    low: jax.Array  # float32 []: strongest that failed; 0 where only the bare base did
    high: jax.Array  # float32 []: weakest that held; infinite where none did
    at: jax.Array  # float32 []: the last try
    accuracy: jax.Array  # float32 [V], of `high`, or of the last try where none held
    probe: Probe


@part
class Bisection(Search):
    """Doubles or halves the last round's strength to a bracket, then halves the bracket.

    A bare base that holds is handed out; where it fails one try with noise follows in any case.
    Ends when the bracket is within `tolerance`, if σ_max fails, or after `max_tries`, the look at
    the bare base included. Where accuracy does not fall with the strength it ends at some strength
    that holds next to one that does not.

    Guarantee: as `Loop`: the copies of a feasible round were evaluated on all N images, and on
    those alone.
    """

    guarantee: ClassVar[str] = ON_SPLIT

    tolerance: Number = number(
        1.05, "largest ratio of what ships over the strongest that failed", low=1, inside="()"
    )

    def calibrate(
        self, key: jax.Array, probe: Probe, carry: jax.Array
    ) -> tuple[Decision, Evidence, Probe, jax.Array]:
        top = jnp.float32(self.strength_max)
        draw = probe.draw(keys.stream(key, "draw"))

        def unfinished(last: _Bracket) -> jax.Array:
            found, tries = jnp.isfinite(last.high), last.probe.bill.tries
            done = jnp.where(found, last.high <= last.low * self.tolerance, last.low >= top)
            return ~done & ((tries < self.max_tries) | (tries == 1))

        def again(last: _Bracket) -> _Bracket:
            found, failed = jnp.isfinite(last.high), last.low > 0
            middle = jnp.sqrt(last.low * last.high)
            down, up = last.high / 2, jnp.minimum(last.low * 2, top)
            strength = jnp.where(found, jnp.where(failed, middle, down), up)
            first = last.probe.bill.tries == 1
            strength = jnp.where(first, self.warm_start(carry), strength)

            new, probe = last.probe.accuracy(draw, strength)
            good = self.holds(new)
            return _Bracket(
                low=jnp.where(good, last.low, jnp.maximum(last.low, strength)),
                high=jnp.where(good, jnp.minimum(last.high, strength), last.high),
                at=strength,
                accuracy=jnp.where(~good & found, last.accuracy, new),  # else `high` still ships
                probe=probe,
            )

        none = jnp.float32(0)
        bare, probe = probe.bare()
        seen = jnp.full(probe.variants, bare)
        high = jnp.where(self.holds(seen), none, jnp.inf)
        last = lax.while_loop(unfinished, again, _Bracket(none, high, none, seen, probe))
        found = jnp.isfinite(last.high)
        strength = jnp.where(found, last.high, last.at)
        remembered = jnp.where(found & (strength > 0), strength, carry)
        return Decision(draw, strength, found), Evidence(last.accuracy), last.probe, remembered
