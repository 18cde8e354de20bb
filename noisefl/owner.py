"""The owner's model G: how it follows the base W, and whether W follows it.

ALGORITHM.md, "One round": G ← Σ_{a ⊔ b ⊔ s} (n_k / n) w_k, with w_k = G for k in s_t.
"""

import re
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import keys
from noisefl.cohort import Members
from noisefl.errors import refuse
from noisefl.parts import Part, child, choice, part, text
from noisefl.probing import Judge

Params = Any
Carry = Any


class Held(NamedTuple):
    """What the server keeps after a round."""

    owner: Params  # G
    base: Params  # W, from which the next round starts
    carry: Carry
    told: dict[str, jax.Array]  # numbers about the round


@part
class Owner(Part):
    """Base: a part with `update`, and `init` if it remembers something."""

    abstract: ClassVar[bool] = True

    def init(self, owner: Params) -> Carry:
        """What it remembers before the first round."""
        return ()

    def update(
        self, key: jax.Array, owner: Params, base: Params, members: Members, counts: jax.Array,
        protected: jax.Array, judge: Judge, carry: Carry,
    ) -> Held:  # fmt: skip
        """The owner after a round.

        Args:
          key: of the round.
          owner: G before it.
          base: W after it, the clients' own average.
          members: a_t and b_t.
          counts: int32 [K], n_k of the population.
          protected: bool [], the round was past warm-up.
          judge: of the server's split.
          carry: of `init`, or of the round before.
        """
        raise NotImplementedError


@part
class ServerClients(Owner):
    """Averages clients that the server makes up into W: they hold G, and no client sees them.

    All of them hold the same model, so that their terms of the average are one. In warm-up G ← W.
    """

    server_clients: str = text("m/2", "server-side clients a round: a number, or m, 4m, m/2")
    server_weights: str = choice(
        "borrowed", ("borrowed", "uniform"),
        "they count as a random client's samples, or as the mean client's",
    )  # fmt: skip

    def __post_init__(self) -> None:
        object.__setattr__(self, "server_clients", str(self.server_clients).strip())
        super().__post_init__()

    def check(self) -> None:
        self.number(1)

    def number(self, clients: int) -> int:
        """s, of m clients a round: '3', 'm', '4m', 'm/2' (rounded down)."""
        match = re.fullmatch(r"(\d{1,10})|(\d{0,10})\*?m(?:/([1-9]\d{0,9}))?", self.server_clients)
        if match is None:
            allowed = "must be a number, or like m, 4m or m/2"
            raise refuse("server_clients", self.server_clients, allowed)
        number, times, share = match.groups()
        found = int(number) if number else int(times or 1) * clients // int(share or 1)
        if found >= 2**31:
            raise refuse("server_clients", self.server_clients, "must be less than 2147483648")
        return found

    def borrowed(self, key: jax.Array, counts: jax.Array, number: int) -> jax.Array:
        """Samples that each server-side client counts for, float32 [s].

        Each draws one of the population independently, or takes the mean of counts int32 [K].
        """
        counts = counts.astype(jnp.float32)
        if self.server_weights == "uniform":
            return jnp.full((number,), jnp.mean(counts))
        return jax.random.choice(keys.stream(key, "server"), counts, (number,))

    def update(
        self, key: jax.Array, owner: Params, base: Params, members: Members, counts: jax.Array,
        protected: jax.Array, judge: Judge, carry: Carry,
    ) -> Held:  # fmt: skip
        samples = self.borrowed(key, counts, self.number(members.sampled))
        server = jnp.sum(samples)
        share = jnp.where(protected, server / (server + jnp.sum(members.counts)), 0)
        mixed = jax.tree.map(lambda w, g: (1 - share) * w + share * g, base, owner)
        new = _select(share > 0, mixed, base)  # 0 times a NaN would be one
        return Held(new, base, carry, {"server_counts": samples})


@part
class Wrapper(Owner):
    """Base: does what the owner inside does."""

    abstract: ClassVar[bool] = True

    inner: Owner = child(ServerClients, "the owner inside")

    def init(self, owner: Params) -> Carry:
        return self.inner.init(owner)


@part
class KeepBest(Wrapper):
    """G is replaced only by a candidate that is no worse on the judging split, past warm-up."""

    def init(self, owner: Params) -> Carry:
        """float32 []: the accuracy of G; −1 before it is known."""
        return jnp.float32(-1), self.inner.init(owner)

    def update(
        self, key: jax.Array, owner: Params, base: Params, members: Members, counts: jax.Array,
        protected: jax.Array, judge: Judge, carry: Carry,
    ) -> Held:  # fmt: skip
        known, inside = carry
        held = self.inner.update(key, owner, base, members, counts, protected, judge, inside)
        best = lax.cond(known < 0, lambda: judge.accuracy(owner), lambda: known)
        accuracy = judge.accuracy(held.owner)
        keep = protected & ~(accuracy >= best)
        new = _select(keep, owner, held.owner)
        return Held(new, held.base, (jnp.where(keep, best, accuracy), held.carry), held.told)


@part
class FeedsBack(Wrapper):
    """The next round starts from G, not from W."""

    def update(
        self, key: jax.Array, owner: Params, base: Params, members: Members, counts: jax.Array,
        protected: jax.Array, judge: Judge, carry: Carry,
    ) -> Held:  # fmt: skip
        held = self.inner.update(key, owner, base, members, counts, protected, judge, carry)
        return held._replace(base=held.owner)


def _select(condition: jax.Array, yes: Params, no: Params) -> Params:
    return jax.tree.map(lambda y, n: jnp.where(condition, y, n), yes, no)
