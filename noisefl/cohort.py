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


@part
class Cohort(Part):
    """m of K clients, drawn anew each round, every one as likely as any other.

    Reads the key, the round and the counts alone, so that the host can replay who takes part.
    Of your own: a part with `sizes` and `draw`.
    """

    clients_per_round: int = size(10, "m, clients sampled a round", unit="clients")
    groups: str = choice("half", ("half", "full"), "m/2 clients a group, or m in each")

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
        total = sum(self.sizes)
        if total > counts.shape[0]:
            allowed = f"needs {total} distinct clients a round, and the data have {counts.shape[0]}"
            raise refuse("clients_per_round", self.clients_per_round, allowed)
        order = jax.random.permutation(keys.stream(key, "groups"), counts.shape[0])
        clients = order[:total].astype(jnp.int32)
        groups = jnp.asarray(np.repeat([0, 1], self.sizes), jnp.int32)
        return Members(clients, groups, counts[clients], self.clients_per_round)


def mapped(
    work: Callable[..., tuple[Any, Any]], slots: tuple[Any, ...], average: Any,
    weights: jax.Array, at_once: int, axis: str = "",
) -> tuple[Any, Any]:  # fmt: skip
    """Lets the M clients of a round work, and averages what they return as it comes.

    Memory is bounded by `at_once` models, not by the cohort, unless the average gathers them.
    Another
    `at_once` changes the order of summation and how XLA lowers the training, hence the last bits.

    Args:
      work: one client's ((update, mask), told) from its entries of `slots`.
      slots: arrays [M, ...].
      average: of `noisefl.average`.
      weights: float32 [M], shares that sum to 1.
      at_once: clients side by side under vmap; 1 is one by one without vmap.
      axis: a mapped axis (of `shard_map` or vmap) over whose D positions the clients are dealt out;
        each has ⌈M / D⌉ of them work, and the averages meet in one sum. None if empty.

    Returns:
      The average's update, and what the clients told [M, ...].
    """
    size = weights.shape[0]
    if axis:
        devices = lax.axis_size(axis)
        each = -(-size // devices)
        filled = _filled((slots, weights), size, devices * each)
        start = lax.axis_index(axis) * each
        slots, weights = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, each), filled)
    mine = weights.shape[0]
    at_once = min(at_once, mine)
    xs = jax.tree.map(
        lambda x: x.reshape(-1, at_once, *x.shape[1:]),
        _filled((slots, weights), mine, -(-mine // at_once) * at_once),
    )

    def several(x: Any) -> tuple[Any, Any]:
        if at_once > 1:
            return jax.vmap(work)(*x)
        return jax.tree.map(lambda leaf: leaf[None], work(*jax.tree.map(lambda leaf: leaf[0], x)))

    if average.gathers:
        (updates, masks), told = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:mine],
            lax.map(lambda x: several(x[0]), xs),
        )
        if axis:
            updates, masks, weights = jax.tree.map(
                lambda leaf: lax.all_gather(leaf, axis, tiled=True)[:size],
                (updates, masks, weights),
            )
        combined = average.combine(updates, masks, weights)
    else:

        def chunk(total: Any, x: Any) -> tuple[Any, Any]:
            (updates, masks), told = several(x[0])
            return average.add(total, updates, masks, x[1]), told

        some = jax.eval_shape(several, jax.tree.map(lambda x: x[0], xs[0]))[0]
        one = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), some)
        total, told = lax.scan(chunk, average.empty(*one), xs)
        told = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:mine], told)
        combined = average.finish(lax.psum(total, axis) if axis else total)
    if axis:
        told = jax.tree.map(lambda leaf: lax.all_gather(leaf, axis, tiled=True)[:size], told)
    return combined, told


def _filled(arrays: Any, size: int, multiple: int) -> Any:
    """Arrays [M, ...] filled up to `multiple` with repeats of the first client; (slots, weights),
    of which the repeats weigh 0."""
    slots, weights = arrays
    fill = multiple - size
    more = jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[:1], fill, axis=0)]), slots)
    return more, jnp.pad(weights, (0, fill))
