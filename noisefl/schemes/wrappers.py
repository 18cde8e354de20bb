"""When a scheme applies: wrappers around any other scheme."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from noisefl.cohort import Cohort, Members
from noisefl.errors import refuse
from noisefl.local import Own
from noisefl.models import Functions
from noisefl.noise import Path
from noisefl.parts import LARGEST, Number, child, count, name_of, part
from noisefl.probing import Judge
from noisefl.schemes.base import Carry, Issue, Scheme, Slot, bare
from noisefl.schemes.noised import Noised

Params = Any

NEVER = LARGEST  # a warm-up of this many rounds never ends: plain FedAvg


@part
class Wrapper(Scheme):
    """Base: does what the scheme inside does."""

    abstract: ClassVar[bool] = True

    inner: Scheme = child(Noised, "the scheme inside")

    @property
    def untrained(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.untrained

    @property
    def source(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.source

    @property
    def promise(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.promise

    @property
    def partial(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.partial

    @property
    def declares(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.declares

    @property
    def cap(self) -> Number | None:
        return self.inner.cap

    @property
    def vouches(self) -> bool:
        return self.inner.vouches

    def fit(self, model: Functions, image_shape: tuple[int, int, int], cohort: Cohort) -> None:
        self.inner.fit(model, image_shape, cohort)

    def touched(self, model: Functions, image_shape: tuple[int, int, int]) -> tuple[Path, ...]:
        return self.inner.touched(model, image_shape)

    def slots(self, cohort: Cohort) -> dict[str, int]:
        return self.inner.slots(cohort)

    def init(self, key: jax.Array, base: Params) -> Carry:
        return self.inner.init(key, base)

    def issue(
        self, key: jax.Array, round: jax.Array, base: Params, owner: Params, members: Members,
        judge: Judge, carry: Carry,
    ) -> tuple[Issue, Carry]:  # fmt: skip
        return self.inner.issue(key, round, base, owner, members, judge, carry)

    def copy(self, base: Params, issue: Issue, slot: Slot) -> Params:
        return self.inner.copy(base, issue, slot)

    def rate(self, issue: Issue) -> jax.Array | None:
        return self.inner.rate(issue)

    def work(
        self, train: Callable[[Params], Params], copy: Params, issue: Issue, slot: Slot, own: Own,
        model: Functions,
    ) -> Any:  # fmt: skip
        return self.inner.work(train, copy, issue, slot, own, model)

    def kept(self, returned: Any, copy: Params, issue: Issue) -> Params:
        return self.inner.kept(returned, copy, issue)

    def recover(
        self, returned: Params, copy: Params, base: Params, issue: Issue, slot: Slot
    ) -> tuple[Params, Params | None]:
        return self.inner.recover(returned, copy, base, issue, slot)

    def combine(
        self, averaged: Any, base: Params, issue: Issue, carry: Carry
    ) -> tuple[Params, Carry]:
        return self.inner.combine(averaged, base, issue, carry)

    def spread(
        self, copy: Params, strength: jax.Array, model: Functions, image_shape: tuple[int, int, int]
    ) -> dict[Path, jax.Array]:
        return self.inner.spread(copy, strength, model, image_shape)

    def bytes_sent(self, base: Params, issue: Issue) -> jax.Array:
        return self.inner.bytes_sent(base, issue)

    @property
    def innermost(self) -> Scheme:
        """The scheme inside all wrappers."""
        inside = self.inner
        while isinstance(inside, Wrapper):
            inside = inside.inner
        return inside


@part
class Delayed(Wrapper):
    """Base: hands out W itself while it is too early; the scheme inside is not asked then."""

    abstract: ClassVar[bool] = True

    def check(self) -> None:
        inside = self.innermost
        if not inside.wrappable:
            allowed = "hands out no model to train, so that FedAvg cannot go before it"
            raise refuse("scheme", name_of(type(inside)), allowed)

    def early(
        self, round: jax.Array, owner: Params, judge: Judge, carry: Carry
    ) -> tuple[jax.Array, Carry, Carry]:
        """(bool []: too early, own carry, the inner scheme's carry)."""
        raise NotImplementedError

    def joined(self, own: Carry, inner: Carry) -> Carry:
        """The carry of both."""
        return inner

    def issue(
        self, key: jax.Array, round: jax.Array, base: Params, owner: Params, members: Members,
        judge: Judge, carry: Carry,
    ) -> tuple[Issue, Carry]:  # fmt: skip
        early, own, inside = self.early(round, owner, judge, carry)

        @functools.partial(jax.jit, inline=True)  # traced once, for its shapes and for the branch
        def protected() -> tuple[Issue, Carry]:
            return self.inner.issue(key, round, base, owner, members, judge, inside)

        shapes = jax.eval_shape(protected)[0]
        issue, inside = lax.cond(early, lambda: (bare(shapes), inside), protected)
        return issue, self.joined(own, inside)

    def copy(self, base: Params, issue: Issue, slot: Slot) -> Params:
        return _select(issue.protected, self.inner.copy(base, issue, slot), base)

    def work(
        self, train: Callable[[Params], Params], copy: Params, issue: Issue, slot: Slot, own: Own,
        model: Functions,
    ) -> Any:  # fmt: skip
        if type(self.innermost).work is Scheme.work:  # a branch would be compiled twice
            return train(copy)
        return lax.cond(
            issue.protected,
            lambda: self.inner.work(train, copy, issue, slot, own, model),
            lambda: train(copy),
        )

    def kept(self, returned: Any, copy: Params, issue: Issue) -> Params:
        """In a round that hands out W `returned` is of W too, and a client has no less of it."""
        return self.inner.kept(returned, copy, issue)

    def recover(
        self, returned: Params, copy: Params, base: Params, issue: Issue, slot: Slot
    ) -> tuple[Params, Params | None]:
        update, mask = self.inner.recover(returned, copy, base, issue, slot)
        whole = jax.tree.map(jnp.subtract, returned, base)
        if mask is not None:
            mask = jax.tree.map(lambda m: jnp.where(issue.protected, m, 1), mask)
        return _select(issue.protected, update, whole), mask


@part
class Warmup(Delayed):
    """The first τ rounds are plain FedAvg ("while t > τ and …"). With τ = `NEVER` all are."""

    warmup_rounds: Number = count(1, "τ, first rounds without protection", unit="rounds")

    def early(
        self, round: jax.Array, owner: Params, judge: Judge, carry: Carry
    ) -> tuple[jax.Array, Carry, Carry]:
        return round <= self.warmup_rounds, (), carry


@part
class UntilCap(Delayed):
    """Plain FedAvg until a round has ended with an owner above the cap on the judging split."""

    def check(self) -> None:
        super().check()
        if self.inner.cap is None:
            allowed = "has no cap that the owner could exceed"
            raise refuse("scheme", name_of(type(self.inner)), allowed)

    def init(self, key: jax.Array, base: Params) -> Carry:
        return jnp.bool_(False), self.inner.init(key, base)

    def early(
        self, round: jax.Array, owner: Params, judge: Judge, carry: Carry
    ) -> tuple[jax.Array, Carry, Carry]:
        before, inside = carry
        known = before | (round <= 1)  # nobody has trained yet
        cap: Any = self.inner.cap
        over = lax.cond(known, lambda: before, lambda: judge.accuracy(owner) > cap)
        return ~over, over, inside

    def joined(self, own: Carry, inner: Carry) -> Carry:
        return own, inner


@part
class SkipInfeasible(Wrapper):
    """A round whose copies nobody vouches for hands out nothing, and changes neither G nor W."""

    def check(self) -> None:
        if not self.inner.vouches:
            allowed = "would skip every round: its calibrator vouches for none"
            raise refuse("scheme", name_of(type(self.inner)), allowed)

    def issue(
        self, key: jax.Array, round: jax.Array, base: Params, owner: Params, members: Members,
        judge: Judge, carry: Carry,
    ) -> tuple[Issue, Carry]:  # fmt: skip
        issue, carry = super().issue(key, round, base, owner, members, judge, carry)
        return issue.replace(shipped=issue.feasible), carry  # pyright: ignore


def _select(condition: jax.Array, yes: Params, no: Params) -> Params:
    return jax.tree.map(lambda y, n: jnp.where(condition, y, n), yes, no)
