"""No protection: plain FedAvg (McMahan et al. 2017, arXiv 1602.05629)."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from noisefl.calibrate import Bill
from noisefl.cohort import Cohort, Members
from noisefl.parts import part
from noisefl.probing import Judge
from noisefl.schemes.base import Carry, Issue, Scheme, Slot, bare

Params = Any


@part
class Bare(Scheme):
    """Every client receives W itself."""

    source: ClassVar[str] = "McMahan et al. 2017, arXiv 1602.05629"

    def touched(self, model: Any, image_shape: tuple[int, int, int]) -> tuple[Any, ...]:
        return ()

    def slots(self, cohort: Cohort) -> dict[str, int]:
        return {"copy0": 0}

    def issue(
        self, key: jax.Array, round: jax.Array, base: Params, owner: Params, members: Members,
        judge: Judge, carry: Carry,
    ) -> tuple[Issue, Carry]:  # fmt: skip
        none, no = jnp.float32(0), jnp.bool_(False)
        weights = jnp.ones(members.counts.shape, jnp.float32)
        like = Issue((), no, no, weights, none, none, no, jnp.zeros(1), Bill.empty())
        return bare(like), carry

    def copy(self, base: Params, issue: Issue, slot: Slot) -> Params:
        return base
