"""Who takes part in a round, and the one place where clients become an axis.

ALGORITHM.md, "One round": m ← max(C·K, 1); a_t, b_t ← disjoint random sets of clients.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from noisefl import keys
from noisefl.errors import refuse
from noisefl.parts import Part, choice, part, size


@struct.dataclass
class Members:
    """The M clients of a round, slot by slot."""

    clients: jax.Array  # int32 [M], indices into the population; group a first
    groups: jax.Array  # int32 [M]: 0 is group a, 1 is group b
    counts: jax.Array  # int32 [M], n_k
    sampled: int = struct.field(pytree_node=False)  # m; M is 2m where each group has m
    classes: jax.Array | None = None  # int32 [M, C]: images of each class, if they say so


@part
class Cohort(Part):
    """m of K clients, drawn anew each round, every one as likely as any other.

    Reads the key, the round and the counts alone, so that who takes part can be replayed.
    Of your own: a part with `sizes` and `draw`.

    Attributes:
      participation: "always" is the worst case of what thieves see: the first half of each group is
        of clients 0, 1, … of the population, the same in every round, dealt anew over both groups;
        the others are drawn from the rest.
    """

    clients_per_round: int = size(10, "m, clients sampled a round", unit="clients")
    groups: str = choice("half", ("half", "full"), "m/2 clients a group, or m in each")
    participation: str = choice(
        "drawn", ("drawn", "always"), "all drawn anew; or half of them the same in every round"
    )

    @property
    def sizes(self) -> tuple[int, int]:
        """Clients of the groups a and b; an odd m gives the extra one to a."""
        m = self.clients_per_round
        return (m, m) if self.groups == "full" else (m - m // 2, m // 2)

    def draw(self, key: jax.Array, counts: jax.Array) -> Members:
        """The members of a round.

        Args:
          key: of the round.
          counts: int32 [K], n_k of the population.

        Raises:
          ValueError: a population smaller than the cohort.
        """
        total, population = sum(self.sizes), counts.shape[0]
        if total > population:
            allowed = f"needs {total} distinct clients a round, and the data have {population}"
            raise refuse("clients_per_round", self.clients_per_round, allowed)
        own = keys.stream(key, "groups")
        if self.participation == "drawn":
            clients = jax.random.permutation(own, population)[:total]
        else:
            first, other = (-(-size // 2) for size in self.sizes)
            always = jax.random.permutation(keys.stream(own, "always"), first + other)
            drawn = first + other + jax.random.permutation(own, population - first - other)
            first_drawn = self.sizes[0] - first
            clients = jnp.concatenate(
                [always[:first], drawn[:first_drawn], always[first:], drawn[first_drawn:]]
            )[:total]
        groups = jnp.asarray(np.repeat([0, 1], self.sizes), jnp.int32)
        clients = clients.astype(jnp.int32)
        return Members(clients, groups, counts[clients], self.clients_per_round)


def mapped(
    work: Callable[..., tuple[Any, Any, Any]], slots: tuple[Any, ...], average: Any,
    weights: jax.Array, at_once: int, axis: str, places: jax.Array, followers: int,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Lets the M clients of a round work, and averages what they return as it comes.

    Memory is bounded by `at_once` models and those that are followed, not by the cohort, unless the
    average gathers them. Another `at_once` changes the order of summation and how XLA lowers the
    training, hence the last bits.

    Args:
      work: one client's ((update, mask), told, seen) from its entries of `slots`.
      slots: arrays [M, ...].
      average: of `noisefl.average`.
      weights: float32 [M], shares that sum to 1.
      at_once: clients side by side under vmap; 1 is one by one without vmap.
      axis: a mapped axis (of `shard_map` or vmap) over whose D positions the clients are dealt out;
        each has ⌈M / D⌉ of them work, and the averages meet in one sum. None if empty.
      places: int32 [M], where what a client saw is kept: 0 … A − 1, or A for nowhere.
      followers: A.

    Returns:
      The average's update, what the clients told [M, ...], and what the followed ones saw
      [A, ...], zeros where a place stayed empty.
    """
    size = weights.shape[0]
    if axis:
        devices = lax.axis_size(axis)
        each = -(-size // devices)
        filled = _filled(slots, weights, places, devices * each, followers)
        start = lax.axis_index(axis) * each
        slots, weights, places = jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, start, each), filled
        )
    mine = weights.shape[0]
    at_once = min(at_once, mine)
    xs = jax.tree.map(
        lambda x: x.reshape(-1, at_once, *x.shape[1:]),
        _filled(slots, weights, places, -(-mine // at_once) * at_once, followers),
    )

    def several(x: Any) -> tuple[Any, Any, Any]:
        if at_once > 1:
            return jax.vmap(work)(*x)
        return jax.tree.map(lambda leaf: leaf[None], work(*jax.tree.map(lambda leaf: leaf[0], x)))

    some, _, seen = jax.eval_shape(several, jax.tree.map(lambda x: x[0], xs[0]))
    nobody = jax.tree.map(lambda s: jnp.zeros((followers, *s.shape[1:]), s.dtype), seen)
    nothing = () if average.gathers else average.empty(*_first(some))

    def chunk(carry: Any, x: Any) -> tuple[Any, Any]:
        total, followed = carry
        models, told, seen = several(x[0])
        followed = jax.tree.map(
            lambda kept, new: kept.at[x[2]].set(new, mode="drop"), followed, seen
        )
        if average.gathers:
            return (total, followed), (models, told)
        return (average.add(total, *models, x[1]), followed), ((), told)

    def unchunked(leaf: jax.Array) -> jax.Array:
        leaf = leaf.reshape(-1, *leaf.shape[2:])[:mine]
        return lax.all_gather(leaf, axis, tiled=True)[:size] if axis else leaf

    (total, followed), (models, told) = lax.scan(chunk, (nothing, nobody), xs)
    models, told = jax.tree.map(unchunked, (models, told))
    if average.gathers:
        weights = lax.all_gather(weights, axis, tiled=True)[:size] if axis else weights
        combined = average.combine(*models, weights)
    else:
        combined = average.finish(lax.psum(total, axis) if axis else total)
    return combined, told, lax.psum(followed, axis) if axis else followed


def _first(shapes: Any) -> Any:
    """Of shapes [c, ...] those of one."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), shapes)


def _filled(
    slots: Any, weights: jax.Array, places: jax.Array, multiple: int, nowhere: int
) -> tuple[Any, jax.Array, jax.Array]:
    """Arrays [M, ...] filled up to `multiple` with repeats of the first client; they weigh 0, and
    nothing of theirs is kept."""
    fill = multiple - weights.shape[0]
    more = jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[:1], fill, axis=0)]), slots)
    return more, jnp.pad(weights, (0, fill)), jnp.pad(places, (0, fill), constant_values=nowhere)
