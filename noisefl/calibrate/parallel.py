"""Many draws and strengths at once: one large batch keeps an accelerator busy."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import keys
from noisefl.calibrate.base import Decision, Draw, Evidence, Probe, Search
from noisefl.calibrate.loop import ON_SPLIT
from noisefl.parts import Number, number, part, size


class _Batch(NamedTuple):
    number: jax.Array  # int32 []: batches so far
    draw: Draw  # the choice of the last one
    strength: jax.Array  # float32 []
    accuracy: jax.Array  # float32 [V]
    holds: jax.Array  # bool []
    top: jax.Array  # float32 []: the strongest tried
    probe: Probe


@part
class Parallel(Search):
    """Evaluates draws × strengths as one batch; the weakest that holds wins.

    A bare base that holds is handed out. The strengths are a ladder by `strength_factor`, from two
    steps below the last round's. While none holds, the next batch takes fresh draws and goes on
    where the ladder ended, up to σ_max, as long as `max_tries`, of which the look at the bare base
    is one, allows a whole batch more. A batch is never cut: the first goes even beyond `max_tries`.

    Guarantee: as `Loop`: on the N images of the judging split, and on those alone.
    """

    guarantee: ClassVar[str] = ON_SPLIT

    strength_factor: Number = number(1.25, "multiplied a try", low=1, inside="()")
    draws: int = size(2, "draws side by side", unit="draws")
    strengths: int = size(8, "strengths of each draw", unit="strengths")

    def calibrate(
        self, key: jax.Array, probe: Probe, carry: jax.Array
    ) -> tuple[Decision, Evidence, Probe, jax.Array]:
        factor, top = jnp.float32(self.strength_factor), jnp.float32(self.strength_max)
        start = self.warm_start(carry) / factor**2

        def draw_of(batch: jax.Array, number: jax.Array) -> Draw:
            return probe.draw(keys.stream(keys.stream(key, "batch", batch), "draw", number))

        def unfinished(last: _Batch) -> jax.Array:
            whole = last.probe.bill.tries + self.draws * self.strengths <= self.max_tries
            return ~last.holds & (whole | (last.number == 0))

        def again(last: _Batch) -> _Batch:
            first = jnp.where(last.number == 0, start, last.top * factor)
            ladder = jnp.minimum(first * factor ** jnp.arange(self.strengths), top)
            drawn = jax.vmap(lambda d: draw_of(last.number, d))(jnp.arange(self.draws))
            accuracies, probe = last.probe.accuracies(drawn, ladder)
            good = self.holds(accuracies)  # [draws, strengths]
            some = jnp.any(good)
            rank = jnp.where(good, ladder, jnp.inf)
            best = jnp.where(some, jnp.argmin(rank), self.strengths - 1)  # else the strongest
            row, column = best // self.strengths, best % self.strengths
            return _Batch(
                number=last.number + 1,
                draw=jax.tree.map(lambda leaf: leaf[row], drawn),
                strength=ladder[column],
                accuracy=accuracies[row, column],
                holds=some,
                top=ladder[-1],
                probe=probe,
            )

        none, nothing = jnp.int32(0), jnp.float32(0)
        bare, probe = probe.bare()
        seen = jnp.full(probe.variants, bare)
        begin = _Batch(none, draw_of(none, none), nothing, seen, self.holds(seen), nothing, probe)
        last = lax.while_loop(unfinished, again, begin)
        remembered = jnp.where(last.holds & (last.strength > 0), last.strength, carry)
        decision = Decision(last.draw, last.strength, last.holds)
        return decision, Evidence(last.accuracy), last.probe, remembered
