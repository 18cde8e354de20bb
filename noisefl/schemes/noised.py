"""Noise on what clients receive: one family, from the source's pair to two-way noise.

ALGORITHM.md, "Three global models" and "One round"; PROTECTION.md, "Two-way noise".
"""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from noisefl import keys, noise
from noisefl.cohort import Cohort, Members
from noisefl.errors import refuse
from noisefl.models import Functions
from noisefl.noise import Draw, Path, Where
from noisefl.parts import Number, child, choice, number, part, size
from noisefl.probing import Judge
from noisefl.schemes.base import Calibrated, Carry, Issue, Slot

Params = Any
Each = dict[Path, jax.Array]  # float32 [] of each noised parameter


class Drawn(NamedTuple):
    """What the noise of a round is made of. A client's own is kept as a key: M models would be
    much."""

    common: tuple[Draw, ...]  # unit noise, of each of D draws
    rest: dict[Path, jax.Array]  # keys, of what a coalition is left with; empty where not judged
    own: dict[Path, jax.Array] = {}  # noqa: RUF012  # keys, of all clients; empty without
    sticky: Each = {}  # noqa: RUF012  # deviation of sticky noise, 0 before it has one; empty without
    clients: Any = ()  # int32 [M], where they have noise of their own,
    groups: Any = ()  # int32 [M], and common noise is not the same for all


class Deviations(NamedTuple):
    """Standard deviations of the three kinds of noise."""

    common: Each
    fresh: Each
    sticky: Each


class Kept(NamedTuple):
    """What the scheme remembers."""

    key: jax.Array  # of sticky noise
    sticky: Each
    calibrator: Carry


def left(
    common: Any, fresh: Any, sticky: Any, members: Any, rounds: Any, draws: int = 1,
    opposite: bool = False,
) -> Any:  # fmt: skip
    """Variance of the noise in the best affine combination of what c clients received in J rounds.

    Args:
      common: variance of each of D draws, new in every round and shared by clients.
      fresh: variance of what is a client's own and new in every round.
      sticky: variance of what is a client's own and the same in all rounds.
      members: c ≥ 1.
      rounds: J ≥ 1, in which any of them took part.
      draws: D, which the clients of a round have in turn.
      opposite: half of the clients have −1 times the common noise.

    Returns:
      ((common / min(c, D) or, of opposite signs and c ≥ 2, 0) + fresh / c) / J + sticky / c. Where
      the variances differ from round to round, (…) / J is to be read as 1 / Σ_t 1 / (…)_t.

    A copy is W + x_t + y_kt + z_k, of variances a, b and s. Weights w_kt that sum to 1 leave
    Σ_t a (Σ_k w_kt)² + b Σ w_kt² + s Σ_k (Σ_t w_kt)². With u_t = Σ_k w_kt, Cauchy and Schwarz say
    Σ_k w_kt² ≥ u_t² / c, so that the first two are at least Σ_t (a + b/c) u_t² ≥
    1 / Σ_t 1 / (a + b/c), as Σ_t u_t = 1; and the last is at least s/c. Equal weights reach both at
    once. With D draws the first is a Σ_d u_td² ≥ a u_t² / min(c, D); with opposite signs the
    weights of both groups may sum to the same, and nothing is left of it.

    Whoever was not there in some of the rounds has fewer weights to choose, and no better ones: the
    figure is a bound. Where W moves, the combination is one of several W_t with the same noise on
    it. Weights that are chosen by what the copies do on data are not covered: they know the noise.
    """
    shared = common / jnp.minimum(jnp.float32(members), draws)
    if opposite:
        shared = jnp.where(jnp.float32(members) >= 2, 0.0, shared)
    return (shared + fresh / members) / rounds + sticky / members


def left_of_late(
    common: Any, fresh: Any, sticky: Any, members: Any, rounds: Any, draws: int = 1,
    opposite: bool = False,
) -> Any:  # fmt: skip
    """Variance of the noise that is left where only the weights of late rounds must sum to 1.

    Where W moves, copies of an early round tell a client its sticky noise up to an early W, which
    is nearly nothing, or known if it was once handed out bare: C_t − C_t' + W_t' has none of it. So
    weights of early rounds are free, and what counts is W of the late ones.

    Args:
      common, fresh, sticky, members, rounds, draws, opposite: as of `left`.

    Returns:
      With a = what `left` has of common and fresh noise in one round, and z = sticky / c: `left`
      itself, a / J + z, where a ≥ J z or J < 2, else 4 a / (J + a / z).

    Late weights of sum 1 on x rounds and early ones of sum −β on J − x leave at least
    a / x + β² a / (J − x) + (1 − β)² z, by Cauchy and Schwarz as in `left`. The best β makes that
    a / x + 1 / (1/z + (J − x) / a), and the best x, (J + a / z) / 2, makes it 2 a / x, unless that
    is more than J. x need not be whole: the figure is a bound.
    """
    of_round = left(common, fresh, 0.0, members, 1, draws, opposite)
    of_own = sticky / members
    affine = of_round / rounds + of_own
    ratio = of_round / jnp.where(of_own > 0, of_own, 1)
    contrast = 4 * of_round / (rounds + ratio)
    plain = (of_own <= 0) | (of_round >= rounds * of_own) | (jnp.float32(rounds) < 2)
    return jnp.where(plain, affine, contrast)


@part
class Noised(Calibrated):
    """Client k of round t receives W + ξ.

    Without noise of their own, all clients have the same draw, fresh in every round, and those of
    group b have −1 times it: the source's pair, W ± ξ. Otherwise

        ξ = ± √ρ ξ_t + √(1 − ρ) ξ_k,

    ξ_t common and fresh, ξ_k the client's own, drawn anew in every round or once for ever
    ("sticky").

    *Sticky noise keeps its scale.* At two scales it would cancel: C_t − C_t' is a multiple of ξ_k
    where ρ is 0. In the first protected round it has its share 1 − ρ of that round's variance, and
    that variance it keeps; what a later strength asks beyond it is ξ_t's, and where one asks for
    less, there is no ξ_t and the sticky noise alone.

    *What is guaranteed.* Any affine combination of the copies that c clients received in J rounds,
    with weights that do not depend on them, is one of the W_t and Gaussian noise of the variance
    `left` says at least: of sticky noise of variance s and common noise of variance a,
    a / J + s / c. The pair has nothing left for c ≥ 2. Where W moves, early copies give sticky
    noise away (`left_of_late`): at ρ = 0 two rounds are enough, and what then stands is common
    noise, at least 4 a / (J + a c / s) of it. Nothing is said of a thief that trains.

    *The cap on a coalition.* With `coalition` the calibrator judges one model more, which nobody
    receives: W under a fresh draw of the variance of `left_of_late`. If the round is feasible it is
    no better than the cap, in the sense of the calibrator's guarantee, at the strength of the round
    as if it had been that of all J; so are the copies. c = J = 1 is the cap on a copy.

    *Damping.* What a layer below the noise learns comes back through it, √(1 + r²) times as large
    as without, r = (RMS of ξ) / (RMS of the noised parameters), so that steps that are stable
    without noise may be too large; damping 1 divides them by that. Through several noised layers
    the factors multiply, and more is needed. Where r is 0 nothing is damped
    (docs/results.md, "Stability").

    Attributes:
      common_draws: D; the clients of a group have them in turn.
      signs: "opposite": group b has −1 times the common noise; "same": all have it alike.
      common: ρ, share of the variance that is common noise, where clients have their own.
      cancellation: "pair": noise is left in what returns, and cancels through ± where both groups
        weigh the same; "subtract": what was put in is taken out of each returned model, exactly;
        "reweight": left in, and both groups weigh ½ (ALGORITHM.md, "Derived": p_A = p_B).

    Raises:
      ValueError: in `fit`, a group without a client; no parameter carries noise. A coalition's cap
        on a pair, of which two members have W.

    References:
      seed.txt. ALP, arXiv 2002.09843: noise of any size that the server takes out.
    """

    source: ClassVar[str] = (
        'ALGORITHM.md, "One round", seed.txt; PROTECTION.md, "Two-way noise"; ALP, 2002.09843'
    )
    promise: ClassVar[str] = (
        "affine combinations of c clients' copies of J rounds keep ρ/J + (1 − ρ)/c of the noise's "
        "variance if their own is sticky, (ρ + (1 − ρ)/c)/J if fresh; a pair's keep nothing; "
        "differences of early and late copies shed what is sticky"
    )

    on: Where = child(Where, "which parameters carry noise")
    common_draws: int = size(1, "D, draws of common noise a round", unit="draws")
    signs: str = choice("opposite", ("opposite", "same"), "of common noise, in the two groups")
    own: str = choice(
        "absent", ("absent", "fresh", "sticky"),
        "a client's own noise, drawn anew a round, or the same in all",
    )  # fmt: skip
    common: Number = number(
        0.5, "ρ, of the noise's variance, is common noise, where clients have their own",
        unit="share of 1", low=0, high=1,
    )  # fmt: skip
    cancellation: str = choice(
        "pair", ("pair", "subtract", "reweight"),
        "noise is left in, subtracted, or the groups reweighted to ½ and ½",
    )  # fmt: skip
    damping: Number | None = number(
        None, "d, local steps are divided by (1 + r²)^(d/2)", low=0, none="steps as they are",
    )  # fmt: skip
    coalition: Number | None = number(
        None, "c, whose best average is under the cap too", unit="clients", low=1, none="no cap",
    )  # fmt: skip
    coalition_rounds: Number = number(1.0, "J, rounds that such a coalition has", low=1)

    @property
    def untrained(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.cancellation == "subtract":
            return "bitwise"
        return "weighted" if self.own == "absent" and self.signs == "opposite" else "expected"

    @property
    def moves(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "smooth" if self.own == "sticky" else "linear"

    def fit(self, model: Functions, image_shape: tuple[int, int, int], cohort: Cohort) -> None:
        if self.coalition is not None and (self.own, self.signs) == ("absent", "opposite"):
            allowed = "two clients average it away, so that no coalition can have a cap: "
            allowed += "must be same, or own fresh or sticky"
            raise refuse("signs", self.signs, allowed)
        fewest = self.common_draws if self.own == "absent" or self.common_draws > 1 else 0
        if min(cohort.sizes) < fewest:
            allowed = f"each of the two groups needs a client for each of {fewest} draws"
            if fewest == 1:
                allowed = "the two groups of a pair need at least 2"
            raise refuse("clients_per_round", cohort.clients_per_round, allowed)
        self.on.paths(model, image_shape)

    def touched(self, model: Functions, image_shape: tuple[int, int, int]) -> tuple[Path, ...]:
        return self.on.paths(model, image_shape)

    def slots(self, cohort: Cohort) -> dict[str, int]:
        if self.own != "absent":
            return super().slots(cohort)
        names = ("plus", "minus") if self.signs == "opposite" else ("copy",)
        first = (0, cohort.sizes[0])
        if self.common_draws == 1:
            return dict(zip(names, first, strict=False))
        starts = list(zip(names, first, strict=False))
        return {f"{name}{d}": at + d for d in range(self.common_draws) for name, at in starts}

    def variants(self, members: Members) -> int:
        """Copies that differ, and last what a coalition is left with, where that is judged."""
        if self.own != "absent":
            copies = super().variants(members)
        else:
            copies = self.common_draws * (2 if self.signs == "opposite" else 1)
        return copies + (self.coalition is not None)

    def init(self, key: jax.Array, base: Params) -> Carry:
        """`Kept` of sticky noise, else the calibrator's carry."""
        carry = self.calibrator.init()
        if self.own != "sticky":
            return carry
        paths: Any = flatten_dict(base)  # those that carry noise are not known without the model
        return Kept(keys.stream(key, "own"), {path: jnp.float32(0) for path in paths}, carry)

    def draw(self, key: jax.Array, base: Params, judge: Judge) -> Drawn:
        """What does not hang on who takes part."""
        paths = self.touched(judge.model, judge.image_shape)
        shared = key if self.own == "absent" else keys.stream(key, "common")
        each = [shared, *(keys.stream(shared, "draw", d) for d in range(1, self.common_draws))]
        rest = {}
        if self.coalition is not None:
            rest = self.on.keys(keys.stream(key, "coalition"), paths)
        return Drawn(tuple(self.on.draw(one, base, paths) for one in each), rest)

    def issue(
        self, key: jax.Array, round: jax.Array, base: Params, owner: Params, members: Members,
        judge: Judge, carry: Carry,
    ) -> tuple[Issue, Carry]:  # fmt: skip
        paths = self.touched(judge.model, judge.image_shape)
        kept = carry if self.own == "sticky" else Kept(key, {}, carry)  # of no use to the others
        sticky = {path: kept.sticky[path] for path in paths} if self.own == "sticky" else {}

        def draw(key: jax.Array) -> Drawn:
            drawn = self.draw(key, base, judge)
            if self.common_draws > 1 or (self.own != "absent" and self.signs == "opposite"):
                drawn = drawn._replace(groups=members.groups)
            if self.own == "absent":
                return drawn
            own = self.on.keys(kept.key if self.own == "sticky" else keys.stream(key, "own"), paths)
            return drawn._replace(own=own, sticky=sticky, clients=members.clients)

        issue, carry = self.calibrated(draw, key, base, members, judge, kept.calibrator)
        if self.coalition is not None:  # what is shipped is copies
            issue = issue.replace(accuracy=issue.accuracy[:-1])  # pyright: ignore
        if self.own != "sticky":
            return issue, carry
        now = self.deviations(base, sticky, issue.strength, paths).sticky
        known = {path: jnp.where(sticky[path] > 0, sticky[path], now[path]) for path in paths}
        return issue, Kept(kept.key, {**kept.sticky, **known}, carry)

    def deviations(
        self, base: Params, sticky: Each, strength: jax.Array, paths: tuple[Path, ...]
    ) -> Deviations:
        """Of the three kinds of noise at a strength.

        Args:
          base: W.
          sticky: the scale of sticky noise, 0 before it has one; empty where there is none.
          strength: float32 [].
          paths: of the noised parameters.
        """
        zero = {path: jnp.float32(0) for path in paths}
        whole = {p: strength * scale for p, scale in self.on.unit_scale(base, paths).items()}
        if self.own == "absent":
            return Deviations(whole, zero, zero)
        shares = jnp.sqrt(self.common), jnp.sqrt(1 - self.common)
        common, own = ({path: share * whole[path] for path in paths} for share in shares)
        if self.own == "fresh":
            return Deviations(common, own, zero)
        known = {path: (sticky[path] > 0) & (strength > 0) for path in paths}
        more = {path: jnp.square(whole[path]) - jnp.square(sticky[path]) for path in paths}
        # The last bit of a strength that stays the same would be 3e-4 of it, as common noise.
        beyond = {
            path: jnp.sqrt(jnp.where(gap > 1e-6 * jnp.square(whole[path]), gap, 0))
            for path, gap in more.items()
        }
        return Deviations(
            {path: jnp.where(known[path], beyond[path], common[path]) for path in paths},
            zero,
            {path: jnp.where(known[path], sticky[path], own[path]) for path in paths},
        )

    def variant(self, base: Params, draw: Drawn, strength: jax.Array, variant: jax.Array) -> Params:
        paths = tuple(draw.common[0])
        scales = self.deviations(base, draw.sticky, strength, paths)
        sides = 2 if self.signs == "opposite" else 1

        def of_client() -> Draw:
            group = place = 0
            if self.own == "absent":
                place, group = variant // sides, variant % sides
            elif self.common_draws > 1 or sides == 2:
                group, place = draw.groups[variant], self._in_turn(draw, variant)
            sign = 1 - 2 * group if sides == 2 else 1
            common = draw.common[0]
            if self.common_draws > 1:
                common = jax.tree.map(lambda *each: jnp.stack(each)[place], *draw.common)
            xi = {path: sign * (scales.common[path] * common[path]) for path in paths}
            if self.own == "absent":
                return xi
            unit = self.on.unit(base, draw.own, draw.clients[variant])
            own = scales.sticky if self.own == "sticky" else scales.fresh
            return {path: xi[path] + own[path] * unit[path] for path in paths}

        def of_coalition() -> Draw:
            unit = self.on.unit(base, draw.rest)
            return {path: jnp.sqrt(variance) * unit[path] for path, variance in rest.items()}

        if self.coalition is None:
            return noise.apply(base, of_client(), 1)
        among = self.coalition, self.coalition_rounds, self.common_draws, sides == 2
        rest = {
            path: left_of_late(*(jnp.square(kind[path]) for kind in scales), *among)  # pyright: ignore
            for path in paths
        }
        copies = self.common_draws * sides if self.own == "absent" else draw.clients.shape[0]
        return noise.apply(base, jax.lax.cond(variant == copies, of_coalition, of_client), 1)

    def relative_strength(
        self, base: Params, draw: Drawn, strength: jax.Array, judge: Judge
    ) -> jax.Array:
        scales = self.deviations(base, draw.sticky, strength, tuple(draw.common[0]))
        whole = jax.tree.map(lambda *each: jnp.sqrt(sum(map(jnp.square, each))), *scales)
        return self.on.relative_strength(base, whole)

    def spread(
        self, copy: Params, strength: jax.Array, model: Functions, image_shape: tuple[int, int, int]
    ) -> dict[Path, jax.Array]:
        return self.on.spread(copy, self.on.paths(model, image_shape), strength)

    def weights(self, members: Members) -> jax.Array:
        if self.cancellation != "reweight":
            return super().weights(members)
        counts = members.counts.astype(jnp.float32)
        of_group = jnp.stack([jnp.sum(jnp.where(members.groups == g, counts, 0)) for g in (0, 1)])
        return jnp.sum(counts) / (2 * of_group[members.groups])

    def rate(self, issue: Issue) -> jax.Array | None:
        if self.damping is None:
            return None
        return jnp.power(1 + jnp.square(issue.relative_strength), -self.damping / 2)

    def copy(self, base: Params, issue: Issue, slot: Slot) -> Params:
        draw, variant = issue.secret.draw, slot.index
        if self.own == "absent":
            sides = 2 if self.signs == "opposite" else 1
            place = self._in_turn(draw, slot.index) if self.common_draws > 1 else 0
            variant = sides * place + (slot.group if sides == 2 else 0)
        return self.variant(base, draw, issue.secret.strength, jnp.int32(variant))

    def _in_turn(self, draw: Drawn, index: jax.Array) -> jax.Array:
        """Which common noise the client in a slot has: group a comes first."""
        return (index - draw.groups[index] * jnp.sum(draw.groups == 0)) % self.common_draws

    def recover(
        self, returned: Params, copy: Params, base: Params, issue: Issue, slot: Slot
    ) -> tuple[Params, Params | None]:
        start = copy if self.cancellation == "subtract" else base
        return jax.tree.map(jnp.subtract, returned, start), None


def own_noise(own: str = "fresh", common: float = 0.0, **fields: Any) -> Noised:
    """Noise of every client's own on the last layer, in units of its RMS, and taken out exactly;
    sticky with ρ = ½ it is two-way noise (PROTECTION.md).

    Args:
      own: "fresh" or "sticky".
      common: ρ.
      fields: others of `Noised`.
    """
    given = {"on": noise.layers("last", relative=True), "signs": "same", "cancellation": "subtract"}
    return Noised(own=own, common=common, **{**given, **fields})
