"""Contrasts of rounds: what noise that a client has in every round does not survive."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from noisefl.attacks.average import mean, usable
from noisefl.attacks.base import Attack, Params, Public, View
from noisefl.local import Own
from noisefl.parts import Number, number, part

SHARES = (0.0, 0.5)  # of a member's rounds that count as old


@part
class Contrast(Attack):
    """In touched parameters, for each member the mean of its newer copies less that of its older
    ones, and the mean over members; where a member once had W bare, that is added. Elsewhere the
    mean of the members' newest copies.

    A client's sticky noise is in all of its copies, and not in their differences, whatever its
    size. W_t − W_t' is left, which of a late round and an early one is most of what was learnt; and
    with W_t' itself, handed out before the noise began, it is W_t. So an *affine* combination,
    whose weights sum to 1, cannot be all that a scheme is held against: these sum to 0.

    A member of one round alone has no difference; if that is true of all, the newest copies are
    what there is.
    """

    views: ClassVar[tuple[str, ...]] = ("V2", "V4")

    old: Number = number(
        0.5, "of a member's rounds that are old; at least one is", unit="share of 1",
        low=0, high=1, inside="[)",
    )  # fmt: skip

    def candidates(self) -> list[Attack]:
        return [self.replace(old=share) for share in SHARES]

    def steal(self, key: jax.Array, view: View, own: Own, public: Public) -> Params:
        there = usable(view)
        touched, known = map(jax.tree.leaves, (public.touched, view.spread))
        noisy = jnp.any(
            jnp.stack([t & (s != 0) for t, s in zip(touched, known, strict=True)]), axis=0
        )
        bare = there & ~noisy  # the spread is public, and 0 where W was handed out
        newest = _mean_of(there & (_rank(there) == jnp.sum(there, axis=0) - 1))
        number = jnp.sum(there & noisy, axis=0)
        old = jnp.maximum(jnp.floor(self.old * number), 1)
        several, rank = there & noisy & (number > 1), _rank(there & noisy)
        newer, older = _mean_of(several & (rank >= old)), _mean_of(several & (rank < old))
        first = jnp.argmax(jnp.any(bare, axis=1))  # W of one round, not a mean over several
        base = _mean_of(bare & (jnp.arange(bare.shape[0]) == first)[:, None])
        contrast = jnp.where(jnp.any(several), newer - older + base, newest)
        stolen, others = mean(view.copies, contrast), mean(view.copies, newest)
        return jax.tree.map(lambda t, s, o: jnp.where(t, s, o), public.touched, stolen, others)


def _rank(there: jax.Array) -> jax.Array:
    """int32 [J, A]: of those that are there, how many of the same member came before."""
    return jnp.cumsum(there, axis=0) - 1


def _mean_of(chosen: jax.Array) -> jax.Array:
    """float32 [J, A]: weights of the mean over members of each one's mean over the chosen; members
    without any do not count, and of none all are 0."""
    each = jnp.sum(chosen, axis=0)
    return chosen / (jnp.maximum(each, 1) * jnp.maximum(jnp.sum(each > 0), 1))
