"""The source's accuracy-driven loop.

ALGORITHM.md, "One round": σ ← σ0; while acc(W + ξ) > cap or acc(W − ξ) > cap: remove the previous
noise; raise σ; draw ξ ~ N(0, σ²).
"""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import keys
from noisefl.calibrate.base import Decision, Draw, Evidence, Probe, Search
from noisefl.parts import Number, choice, number, part

ON_SPLIT = (
    "no copy exceeds the aim on the N images of the judging split; nothing is said of other images"
)


class _Loop(NamedTuple):
    strength: jax.Array  # float32 []: of the last try
    accuracy: jax.Array  # float32 [V], of its copies
    probe: Probe


@part
class Loop(Search):
    """Base of the loops: tries ever larger strengths until all copies are at or under the aim.

    The strength stays at σ_max once it is there. The loop gives up, infeasible, after `max_tries`,
    and with one draw already after a failed try at σ_max, since another would be the same; it then
    ships the last, strongest try.

    Guarantee: no copy of a feasible round exceeds cap − cap_margin on the N images of the judging
    split: it was evaluated on all of them. Nothing is said of other images; the search over tries
    makes copies just under the cap on these likelier than their like on others.

    A ReLU network with max pooling is nearly homogeneous in its first layer, so that its accuracy
    tends to a limit as σ grows: without the bounds the loop need not end (ALGORITHM.md, "The loop
    need not end"). The limit depends on the draw, so that fresh draws at σ_max still find copies
    that hold.
    """

    abstract: ClassVar[bool] = True
    guarantee: ClassVar[str] = ON_SPLIT

    redraw: str = choice(
        "fresh", ("fresh", "rescale"), "each try draws ξ anew, or one draw is rescaled"
    )

    def init(self) -> tuple[()]:
        """Nothing: every round begins at σ0."""
        return ()

    def raised(self, strength: jax.Array) -> jax.Array:
        """The strength of the next try, float32 [], after one of `strength`."""
        raise NotImplementedError

    def climb(
        self, key: jax.Array, probe: Probe, bare: jax.Array | None = None
    ) -> tuple[Decision, Evidence, Probe]:
        """The loop from σ0 on.

        Args:
          key: of the round.
          probe: its bill holds the look at the bare base, if there was one, and nothing else.
          bare: float32 [], what that look saw; a base that holds is handed out.
        """
        looks = 0 if bare is None else 1  # tries before the first with noise
        seen = jnp.float32(jnp.inf) if bare is None else bare

        def draw_of(number: jax.Array) -> Draw:
            return probe.draw(keys.stream(key, "try", number if self.redraw == "fresh" else 0))

        def unfinished(loop: _Loop) -> jax.Array:
            more = loop.probe.bill.tries < self.max_tries
            if self.redraw == "rescale":
                more &= loop.strength < self.strength_max
            return ~self.holds(loop.accuracy) & (more | (loop.probe.bill.tries == looks))

        def again(loop: _Loop) -> _Loop:
            number = loop.probe.bill.tries - looks
            raised = jnp.minimum(self.raised(loop.strength), self.strength_max)
            strength = jnp.where(number == 0, jnp.float32(self.strength), raised)
            return _Loop(strength, *loop.probe.accuracy(draw_of(number), strength))

        begin = _Loop(jnp.float32(0), jnp.full(probe.variants, seen), probe)
        last = lax.while_loop(unfinished, again, begin)
        draw = draw_of(jnp.maximum(last.probe.bill.tries - 1 - looks, 0))
        decision = Decision(draw, last.strength, self.holds(last.accuracy))
        return decision, Evidence(last.accuracy), last.probe


@part
class Additive(Loop):
    """σ0, σ0 + Δ, σ0 + 2 Δ, …: the source's.

    The first try is at σ0, so that σ0 = 0 asks first whether the bare base needs noise at all.
    Guarantee: as `Loop`.
    """

    strength: Number = number(
        0.0, "of the first try, where nothing better is known", unit="σ, or r", low=0
    )
    strength_max: Number = number(
        5.0, "σ_max, the largest strength", unit="σ, or r", low=0, inside="()"
    )
    strength_step: Number = number(0.05, "added a try", unit="σ, or r", low=0, inside="()")

    def raised(self, strength: jax.Array) -> jax.Array:
        return strength + self.strength_step

    def calibrate(
        self, key: jax.Array, probe: Probe, carry: Any
    ) -> tuple[Decision, Evidence, Probe, Any]:
        return *self.climb(key, probe), carry


@part
class Geometric(Loop):
    """The bare base, then σ0, σ0 f, σ0 f², …

    A base that holds is handed out bare. The look at it is the first of `max_tries` and costs one
    model and N images; where it fails one try with noise follows in any case, so that a base that
    does not hold is never handed out. Guarantee: as `Loop`.
    """

    strength_factor: Number = number(1.25, "multiplied a try", low=1, inside="()")

    def raised(self, strength: jax.Array) -> jax.Array:
        return strength * self.strength_factor

    def calibrate(
        self, key: jax.Array, probe: Probe, carry: Any
    ) -> tuple[Decision, Evidence, Probe, Any]:
        bare, probe = probe.bare()
        return *self.climb(key, probe, bare), carry
