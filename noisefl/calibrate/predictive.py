"""A strength predicted from the logits of a few images, then verified on others.

Along one draw the logits of a copy change smoothly with the strength, exactly linearly where the
noise is on the last layer. A secant through the logits at strengths 0 and s foretells the accuracy
at every other strength without another forward pass.
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from noisefl import keys
from noisefl.calibrate import wager
from noisefl.calibrate.base import Decision, Draw, Evidence, Probe
from noisefl.calibrate.blocks import Blocks
from noisefl.calibrate.climb import Tested, climb
from noisefl.parts import Number, number, part, size

GRID = np.geomspace(0.25, 4.0, 65)  # strengths foretold, times that of the secant
NEAR = 1.5  # the secant is trusted within this factor
SECANTS = 5  # of the chosen draw at most: they reach 1/1000 and 1000 times the first strength


class _Guess(NamedTuple):
    strength: jax.Array  # float32 []
    near: jax.Array  # bool []
    secants: jax.Array  # int32 []
    probe: Probe


def _weakest(
    clean: jax.Array,
    copies: jax.Array,
    right_at: Callable[[jax.Array], jax.Array],
    target: jax.Array,
) -> jax.Array:
    """The weakest ratio of the grid at which all foretold accuracies are on target.

    Args:
      clean: [n, C], logits of the base.
      copies: [V, n, C], logits of the copies.
      right_at: logits [n, C] → accuracy float32 [].
      target: float32 [].
    """

    def accuracy(ratio: jax.Array) -> jax.Array:
        return jnp.max(jax.vmap(right_at)(clean + ratio * (copies - clean)))

    grid = jnp.asarray(GRID, jnp.float32)
    under = lax.map(accuracy, grid) <= target
    return jnp.where(jnp.any(under), grid[jnp.argmax(under)], grid[-1])


def _straight(clean: jax.Array, copies: jax.Array) -> jax.Array:
    """bool []: of a pair, the base lies midway between its copies, so that secants hold at any
    strength. Of other numbers of copies nothing is known, and it is False."""
    if copies.shape[0] != 2:
        return jnp.bool_(False)
    bend = jnp.mean(jnp.abs(copies[0] + copies[1] - 2 * clean))
    return bend <= 1e-4 * jnp.mean(jnp.abs(copies[0] - copies[1]))


@part
class Predictive(Tested):
    """Foretells the strength at which the best copy is somewhat below the aim, and verifies it.

    Of several draws it takes the one that needs least: one draw at whatever strength it needs broke
    models down (docs/results.md). A secant counts within its grid where the copies are a pair whose
    logits are linear, else near its own strength; a new one is laid there if not. Where the bare
    base is on target on the scouts, it is the first to be verified, and a single secant of each
    draw has to do for what comes after it.

    Guarantee: as `Tested`. Draw and strength are chosen on the scouts alone, and verified on other
    images; where the verification fails it climbs.
    """

    judges: ClassVar[tuple[str, ...]] = ("linear", "smooth")

    step: Number = number(1.07, "factor between two tries of the test", low=1, inside="()")
    draws: int = size(3, "draws side by side", unit="draws")
    gap: Number = number(
        1 / 12,
        "share of the aim left below it, or more: small gaps need many images, large ones noise",
        low=0,
        high=1,
        inside="[)",
    )

    def target(self, jury: Blocks) -> jax.Array:
        """The accuracy that is foretold, float32 []: below the aim by the gap, or by more where
        the split leaves so few images that no copy that close to it could pass."""
        strata, close = jury.images.shape[1], self.aim * (1 - self.gap)
        error = self.error_rate * wager.share_of_error(jnp.int32(1))
        far = wager.provable(self.aim, error, jury.number, strata)
        starved = jury.number < self.limit // strata
        return jnp.where(starved, jnp.minimum(close, far), close)

    def calibrate(
        self, key: jax.Array, probe: Probe, carry: jax.Array
    ) -> tuple[Decision, Evidence, Probe, jax.Array]:
        scouts, jury = self.seat(key, probe)
        images, target = scouts.images.reshape(-1), self.target(jury)
        labels, shared = probe.labels[images], probe.below(images)

        def draw_of(number: jax.Array) -> Draw:
            return probe.draw(keys.stream(key, "draw", number))

        def right_at(logits: jax.Array) -> jax.Array:
            return scouts.accuracy(logits, labels)

        def guess(at: jax.Array, copies: jax.Array) -> tuple[jax.Array, jax.Array]:
            new = jnp.minimum(at * _weakest(clean, copies, right_at, target), self.strength_max)
            # Short of the ends of the grid, at which the answer may lie beyond.
            trusted = jnp.where(_straight(clean, copies), 0.99 * GRID[-1], NEAR)
            return new, jnp.abs(jnp.log(new / at)) <= jnp.log(trusted)

        def again(g: _Guess) -> _Guess:
            copies, probe = g.probe.logits(draw, g.strength, images, shared)
            return _Guess(*guess(g.strength, copies), g.secants + 1, probe)

        start = self.warm_start(carry)
        candidates = jax.vmap(draw_of)(jnp.arange(self.draws))
        clean, probe = probe.clean(images, shared)
        bare = right_at(clean) <= target
        sets, probe = probe.logits_of(candidates, start, images, shared)
        strengths, near = jax.vmap(lambda copies: guess(start, copies))(sets)
        weakest = jnp.argmin(strengths)
        draw = jax.tree.map(lambda leaf: leaf[weakest], candidates)
        foretold = lax.while_loop(
            lambda g: ~g.near & (g.secants < SECANTS) & ~bare,
            again,
            _Guess(strengths[weakest], near[weakest], jnp.int32(1), probe),
        )

        def draw_after(number: jax.Array) -> Draw:
            fresh = draw_of(number + self.draws - 1)
            return jax.tree.map(lambda a, b: jnp.where(number == 0, a, b), draw, fresh)

        decision, evidence, probe = climb(
            self, foretold.probe, draw_after, bare, foretold.strength, jury
        )
        return decision, evidence, probe, self.remembered(decision, carry)
