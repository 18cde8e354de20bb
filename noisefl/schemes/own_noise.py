"""Noise of every client's own, taken out exactly; PROTECTION.md, "Two-way noise"."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from noisefl import keys, noise
from noisefl.cohort import Cohort, Members
from noisefl.models import Functions
from noisefl.noise import Path, Where
from noisefl.parts import Number, child, choice, number, part
from noisefl.probing import Judge
from noisefl.schemes.base import Calibrated, Carry, Issue

Params = Any


class Keys(NamedTuple):
    """Of the noise of a round: the noise itself would be M models."""

    common: dict[Path, jax.Array]  # of ξ_t
    own: dict[Path, jax.Array]  # of all ξ_k, each drawn by its client's number
    clients: jax.Array  # int32 [M]


@part
class OwnNoise(Calibrated):
    """Client k of round t receives W + ξ, ξ = √ρ ξ_t + √(1 − ρ) ξ_k.

    ξ_t is drawn anew each round and common to all; ξ_k is the client's own, either fresh in every
    round or sticky, which is unit noise of its own for ever (the strength is the round's). The
    server takes out what it put in: the update is what came back minus the copy.

    Averages of the copies of c clients, all present in J rounds of equal strength, over a W that
    stands still, are left with ρ / J + (1 − ρ) / c of the noise's variance where it is sticky,
    and with ρ / J + (1 − ρ) / (c J) where it is fresh. At ρ = 0 a sticky ξ_k is not hidden at all
    from whoever has two rounds of *different* strengths: their difference is a multiple of it.

    What a calibrator draws again is what is fresh; of sticky noise at ρ = 0 that is nothing, and
    the strength alone helps.

    Attributes:
      own: "fresh": ξ_k is drawn anew in every round; "sticky": it is the same in all.
      common: ρ, share of the variance that is ξ_t's. Rivals of PROTECTION.md: fresh at 0, sticky
        at 0, and sticky at ½, which is two-way noise.

    Raises:
      ValueError: in `fit`, no parameter carries noise.

    References:
      ALP, arXiv 2002.09843: noise of any size that the server takes out.
    """

    source: ClassVar[str] = 'PROTECTION.md, "Two-way noise"; exact removal as in ALP, 2002.09843'
    promise: ClassVar[str] = (
        "the plain average of c clients' copies of J rounds of equal strength keeps ρ/J + (1 − ρ)/c"
        " of the noise's variance if sticky, ρ/J + (1 − ρ)/(cJ) if fresh; nothing of other thieves"
    )

    on: Where = child(noise.layers("last", relative=True), "which parameters carry noise")
    own: str = choice(
        "fresh", ("fresh", "sticky"), "a client's noise is drawn anew a round, or the same in all"
    )
    common: Number = number(
        0.0, "ρ, of the noise's variance, is drawn anew a round and common to all clients",
        unit="share of 1", low=0, high=1,
    )  # fmt: skip

    def fit(self, model: Functions, image_shape: tuple[int, int, int], cohort: Cohort) -> None:
        self.on.paths(model, image_shape)

    def touched(self, model: Functions, image_shape: tuple[int, int, int]) -> tuple[Path, ...]:
        return self.on.paths(model, image_shape)

    def init(self, key: jax.Array, base: Params) -> Carry:
        """(key of sticky noise, the calibrator's carry)."""
        return keys.stream(key, "own"), self.calibrator.init()

    def issue(
        self, key: jax.Array, round: jax.Array, base: Params, owner: Params, members: Members,
        judge: Judge, carry: Carry,
    ) -> tuple[Issue, Carry]:  # fmt: skip
        sticky, carry = carry
        paths = self.touched(judge.model, judge.image_shape)

        def draw(key: jax.Array) -> Keys:
            own = sticky if self.own == "sticky" else keys.stream(key, "own")
            common = self.on.keys(keys.stream(key, "common"), paths)
            return Keys(common, self.on.keys(own, paths), members.clients)

        issue, carry = self.calibrated(draw, key, base, members, judge, carry)
        return issue, (sticky, carry)

    def variant(self, base: Params, draw: Keys, strength: jax.Array, variant: jax.Array) -> Params:
        """W + ξ of the client in slot v."""
        common, own = jnp.sqrt(self.common), jnp.sqrt(1 - self.common)
        of_all = self.on.unit(base, draw.common)
        of_one = self.on.unit(base, draw.own, draw.clients[variant])
        unit = {path: common * of_all[path] + own * of_one[path] for path in of_all}
        return noise.apply(base, self.on.scaled(base, unit, strength), 1)

    def relative_strength(
        self, base: Params, draw: Keys, strength: jax.Array, judge: Judge
    ) -> jax.Array:
        return self.on.relative_strength(base, tuple(draw.own), strength)

    def spread(
        self, copy: Params, strength: jax.Array, model: Functions, image_shape: tuple[int, int, int]
    ) -> dict[Path, jax.Array]:
        return self.on.spread(copy, self.on.paths(model, image_shape), strength)
