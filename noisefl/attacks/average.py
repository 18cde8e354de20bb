"""Averages of copies: what independent noise does not survive (PROTECTION.md, "Thieves")."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from noisefl.attacks.base import Attack, Params, Public, View
from noisefl.local import Own
from noisefl.parts import Number, number, part

RECENCIES = (1.0, 0.95, 0.75)  # times `recency`; a client sees about a tenth of the rounds
SEPARATED = 0.5  # two groups, if no copy is further than that from another of its group, as a
#                  share of the distance between groups: chance alone hardly ever splits noise so
EQUAL = 1e-5  # of squared distances over squared norms: float32 sees no difference
FLOOR = 1e-6  # of a variance, over the largest: weights stay finite


@part
class Average(Attack):
    """The weighted mean of all copies, of all parameters; see `weights`.

    The source's pair hands out W + ξ to some and W − ξ to others: the mean of the two groups' means
    is W, however many of each a coalition has.
    """

    views: ClassVar[tuple[str, ...]] = ("V2", "V3", "V4")

    recency: Number = number(1.0, "times the weight, a round of age", low=0, high=1, inside="(]")
    by_noise: Number = number(0.0, "1: by 1 / σ² of the copies; 0: not", low=0, high=1)

    def candidates(self) -> list[Attack]:
        return [
            self.replace(recency=self.recency * recency, by_noise=by_noise)
            for recency in RECENCIES
            for by_noise in (self.by_noise, 1 - self.by_noise)
        ]

    def steal(self, key: jax.Array, view: View, own: Own, public: Public) -> Params:
        return mean(view.copies, weights(view, public.touched, self.recency, self.by_noise))


def mean(leaves: Params, weights: jax.Array) -> Params:
    """Σ weights[j, a] · leaf[j, a] of leaves [J, A, ...]; what has no weight is not looked at."""

    def one(leaf: jax.Array) -> jax.Array:
        own = weights.reshape(*weights.shape, *[1] * (leaf.ndim - 2))
        return jnp.sum(jnp.where(own == 0, 0, own * leaf), axis=(0, 1))

    return jax.tree.map(one, leaves)


def weights(
    view: View, touched: Params, recency: jax.Array | float = 1.0,
    by_noise: jax.Array | float = 0.0,
) -> jax.Array:  # fmt: skip
    """Weights of copies, float32 [J, A] of sum 1, 0 of absent and broken ones.

    In proportion to

        share · recency^age · (σ²)^−by_noise

    where share is 1 / (size of the copy's group), or 1 in a round without groups; age is counted in
    rounds, from the newest; σ² is the mean variance of the touched parameters.

    Args:
      view: of which `returned` is not read.
      touched: bool [] of each parameter.
      recency: float32 [], in (0, 1].
      by_noise: float32 [].
    """
    there, rounds = usable(view).reshape(-1), view.rounds.reshape(-1)
    share = _shares(_distances(gram(view.copies, there, touched)), there, rounds)
    age = jnp.max(jnp.where(there, rounds, 0)) - rounds
    aged = jnp.power(recency, jnp.where(there, age, 0).astype(jnp.float32))
    variance = _variance(view, touched, there)
    found = jnp.where(there, share * aged * jnp.power(variance, -by_noise), 0)
    return (found / jnp.sum(found)).reshape(view.present.shape)


def usable(view: View) -> jax.Array:
    """bool [J, A]: present and finite; if none is finite, all that are present."""
    finite = [
        jnp.all(jnp.isfinite(leaf), axis=tuple(range(2, leaf.ndim)))
        for leaf in jax.tree.leaves(view.copies)
    ]
    found = jnp.all(jnp.stack(finite), axis=0) & view.present
    return jnp.where(jnp.any(found), found, view.present)


def gram(copies: Params, there: jax.Array, touched: Params) -> jax.Array:
    """⟨c_i − c̄, c_j − c̄⟩ over the touched parameters, float32 [N, N] of N = J · A copies; c̄ is the
    plain mean of those `there` (bool [N]), and rows and columns of the others are 0.

    Less the mean, because noise is small beside W and float32 has seven digits.
    """
    count = jnp.maximum(jnp.sum(there), 1)

    def one(leaf: jax.Array, touched: jax.Array) -> jax.Array:
        flat = jnp.where(there[:, None], leaf.reshape(there.shape[0], -1), 0)
        apart = flat - jnp.sum(flat, axis=0) / count
        apart = jnp.where(there[:, None] & touched, apart, 0)
        return jnp.matmul(apart, apart.T, precision="highest")

    return jnp.sum(jnp.stack(jax.tree.leaves(jax.tree.map(one, copies, touched))), axis=0)


def _distances(gram: jax.Array) -> jax.Array:
    """Squared distances [N, N]."""
    norms = jnp.diagonal(gram)
    norms = norms[:, None] + norms
    found = norms - 2 * gram
    return jnp.where(found > EQUAL * norms, found, 0)


def _shares(distances: jax.Array, there: jax.Array, rounds: jax.Array) -> jax.Array:
    """1 / (copies of the own group) where a round's copies fall into two groups, else 1: [N].

    Seeds of the groups are the two copies furthest apart, and the others go to the nearer. What is
    said of a round stands in each of its copies' rows.
    """
    same = there[:, None] & there & (rounds[:, None] == rounds)
    number = jnp.arange(there.shape[0])
    distances = jnp.where(same, distances, 0)

    def of_round(each: jax.Array, reduce, other: float) -> jax.Array:  # [N], of copies → of rounds
        return reduce(jnp.where(same, each, other), axis=1)

    first = of_round(jnp.max(distances, axis=1), jnp.argmax, -1)
    second = jnp.argmax(distances[first], axis=1)
    group = distances[number, second] < distances[number, first]
    together = same & (group[:, None] == group)
    within = jnp.max(jnp.where(together, distances, 0), axis=1)
    between = jnp.min(jnp.where(same & ~together, distances, jnp.inf), axis=1)
    widest, nearest = of_round(within, jnp.max, 0), of_round(between, jnp.min, jnp.inf)
    sizes = jnp.maximum(jnp.sum(together, axis=1), 1)
    return jnp.where(widest < SEPARATED**2 * nearest, 1 / sizes, 1.0)


def _variance(view: View, touched: Params, there: jax.Array) -> jax.Array:
    """Mean σ² of the touched parameters, over its smallest, [N]; unknown ones as the mean of those
    that are known."""

    def one(spread: jax.Array, leaf: jax.Array, touched: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = leaf.size // there.shape[0]
        total = jnp.where(touched, size * jnp.square(spread.reshape(-1)), 0)
        return total, jnp.where(touched, size, 0)

    pairs = [
        one(*leaves)
        for leaves in zip(*map(jax.tree.leaves, (view.spread, view.copies, touched)), strict=True)
    ]
    totals, sizes = (sum(each) for each in zip(*pairs, strict=True))
    found = totals / jnp.maximum(sizes, 1)
    known = there & jnp.isfinite(found)
    usual = jnp.sum(jnp.where(known, found, 0)) / jnp.maximum(jnp.sum(known), 1)
    found = jnp.where(known, found, usual)
    found = jnp.maximum(found, FLOOR * jnp.max(jnp.where(there, found, 0)))
    smallest = jnp.min(jnp.where(there, found, jnp.inf))
    return jnp.where(there & (smallest > 0), found / smallest, 1.0)
