"""Lanes: the data and numbers of many runs, stacked, and dealt out to the devices of a mesh."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from noisefl import mesh, strategy
from noisefl.data import Federation, Images
from noisefl.errors import refuse


def stack(lanes: Sequence[Federation], columns: int = 0) -> Federation:
    """The data of L lanes: a leading axis [L] on clients, counts and validation.

    Training and test images are one copy for all; each lane's table and validation split differ.

    Args:
      lanes: one a lane.
      columns: tables are padded to the widest, and at least to this: that of all lanes of a
        program, where these are only some of them.

    Raises:
      ValueError: lanes of different data sets, or shapes that one program cannot hold.
    """
    first = lanes[0]
    for lane in lanes[1:]:
        for name, one, other in _pairs(first.images, lane.images):
            if one is not other and not (one.shape == other.shape and jnp.array_equal(one, other)):
                raise refuse("data", name, "must be the same in all lanes of a program")
        for name in ("counts", "validation_labels"):
            if getattr(lane, name).shape != getattr(first, name).shape:
                raise refuse("data", name, "must have the same shape in all lanes of a program")
    widest = max(columns, *(lane.clients.shape[1] for lane in lanes))
    tables = [np.asarray(lane.clients) for lane in lanes]
    stacked: Any = {
        "clients": np.stack([np.pad(t, ((0, 0), (0, widest - t.shape[1]))) for t in tables]),
        "counts": np.stack([np.asarray(lane.counts) for lane in lanes]),
        "validation_images": np.stack([np.asarray(lane.validation_images) for lane in lanes]),
        "validation_labels": np.stack([np.asarray(lane.validation_labels) for lane in lanes]),
    }
    return Federation(images=first.images, **stacked)


def _pairs(first: Images, second: Images) -> Iterator[tuple[str, Any, Any]]:
    for name in vars(first):
        yield name, getattr(first, name), getattr(second, name)


def axes(own: Any, shared: Any) -> Federation:
    """A tree for vmap or `shard_map`: `own` of what each lane has, `shared` of the images."""
    return Federation(shared, own, own, own, own)


def select(tree: Any, lanes: Any) -> Any:
    """The given lanes of arrays [L, ...]; of a `Federation`, of what has a lane axis."""
    if isinstance(tree, Federation):
        chosen = jax.tree.map(lambda leaf: leaf[lanes], replace(tree, images=()))
        return replace(chosen, images=tree.images)
    return jax.tree.map(lambda leaf: leaf[lanes], tree)


def put(data: Federation, on: Mesh) -> Federation:
    """Data of `stack`, lanes of this process, on the devices of a mesh."""
    own = mesh.put(replace(data, images=()), mesh.over_lanes(on))
    return replace(own, images=mesh.put(data.images, mesh.everywhere(on)))


def shapes(tree: Any, lanes: int, on: Mesh) -> Any:
    """Those of a program's arguments: arrays [l, ...] of any lanes as [L, ...] on a mesh; of a
    `Federation`, the images as they are, on every device."""

    def of(tree: Any, sharding: NamedSharding, *leading: int) -> Any:
        def one(x: Any) -> jax.ShapeDtypeStruct:
            shape = (*leading, *np.shape(x)[len(leading) :])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

        return jax.tree.map(one, tree)

    if isinstance(tree, Federation):
        own = of(replace(tree, images=()), mesh.over_lanes(on), lanes)
        return replace(own, images=of(tree.images, mesh.everywhere(on)))
    return of(tree, mesh.over_lanes(on), lanes)


def width(total: int, on: Mesh, lanes_at_once: int | None = None) -> int:
    """Lanes of one program, a multiple of the mesh's: all on accelerators, on a CPU a few a device.

    The lanes are dealt out evenly: 20 lanes that go 16 at a time go 10 and 10.

    Args:
      total: L.
      on: the mesh.
      lanes_at_once: largest number, rounded up to the mesh; default as above.
    """
    across = on.shape[mesh.LANES]
    most = lanes_at_once or strategy.lanes_a_device(total, mesh.target(on)) * across
    batches = math.ceil(total / max(most, across))
    return math.ceil(math.ceil(total / batches) / across) * across


def own_places(on: Mesh, lanes: int, filled: int) -> np.ndarray:
    """int [l]: of the lanes of this process in a program, which of the `filled` to put there; the
    first of them stands in where there are fewer than the program has room for."""
    places = mesh.own_lanes(on, lanes)
    return np.where(places < filled, places, 0)
