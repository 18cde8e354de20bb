"""The source's scheme: one draw of noise, added for one half of the clients, subtracted for the
other.

ALGORITHM.md, "Three global models" and "One round".
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from noisefl import noise
from noisefl.cohort import Cohort, Members
from noisefl.errors import refuse
from noisefl.models import Functions
from noisefl.noise import Draw, Path, Where
from noisefl.parts import child, choice, part
from noisefl.probing import Judge
from noisefl.schemes.base import Calibrated, Issue, Slot

Params = Any


@part
class Pair(Calibrated):
    """Group a receives W + ξ, group b W − ξ.

    Attributes:
      cancellation: "pair": noise is left in what returns, and cancels through ± where both groups
        weigh the same; "subtract": it is taken out of each returned model, exactly; "reweight":
        left in, and both groups weigh ½ (ALGORITHM.md, "Derived": p_A = p_B).
    """

    untrained: ClassVar[str] = "weighted"
    source: ClassVar[str] = 'ALGORITHM.md, "One round"; seed.txt'

    on: Where = child(Where, "which parameters carry noise")
    cancellation: str = choice(
        "pair", ("pair", "subtract", "reweight"),
        "noise is left in, subtracted, or the groups reweighted to ½ and ½",
    )  # fmt: skip

    def fit(self, model: Functions, image_shape: tuple[int, int, int], cohort: Cohort) -> None:
        if min(cohort.sizes) < 1:
            allowed = "the two groups of a pair need at least 2"
            raise refuse("clients_per_round", cohort.clients_per_round, allowed)
        self.on.paths(model, image_shape)

    def touched(self, model: Functions, image_shape: tuple[int, int, int]) -> tuple[Path, ...]:
        return self.on.paths(model, image_shape)

    def slots(self, cohort: Cohort) -> dict[str, int]:
        return {"plus": 0, "minus": cohort.sizes[0]}

    def variants(self, members: Members) -> int:
        return 2

    def draw(self, key: jax.Array, base: Params, judge: Judge) -> Draw:
        """Unit noise of the noised parameters."""
        return self.on.draw(key, base, self.on.paths(judge.model, judge.image_shape))

    def variant(self, base: Params, draw: Draw, strength: jax.Array, variant: jax.Array) -> Params:
        """W + ξ for variant 0, W − ξ for 1."""
        return noise.apply(base, self.on.scaled(base, draw, strength), 1 - 2 * variant)

    def spread(
        self, copy: Params, strength: jax.Array, model: Functions, image_shape: tuple[int, int, int]
    ) -> dict[Path, jax.Array]:
        return self.on.spread(copy, self.on.paths(model, image_shape), strength)

    def relative_strength(
        self, base: Params, draw: Draw, strength: jax.Array, judge: Judge
    ) -> jax.Array:
        return self.on.relative_strength(base, tuple(draw), strength)

    def weights(self, members: Members) -> jax.Array:
        if self.cancellation != "reweight":
            return super().weights(members)
        counts = members.counts.astype(jnp.float32)
        of_group = jnp.stack([jnp.sum(jnp.where(members.groups == g, counts, 0)) for g in (0, 1)])
        return jnp.sum(counts) / (2 * of_group[members.groups])

    def copy(self, base: Params, issue: Issue, slot: Slot) -> Params:
        return self.variant(base, issue.secret.draw, issue.secret.strength, slot.group)

    def recover(
        self, returned: Params, copy: Params, base: Params, issue: Issue, slot: Slot
    ) -> tuple[Params, Params | None]:
        start = copy if self.cancellation == "subtract" else base
        return jax.tree.map(jnp.subtract, returned, start), None
