"""Lanes: the data and numbers of many runs, stacked, and dealt out to the devices of a mesh."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from noisefl import mesh, strategy
from noisefl.config import refuse
from noisefl.data import FederatedData

OF_A_LANE = ("clients", "counts", "validation_images", "validation_labels")


def stack(lanes: Sequence[FederatedData], columns: int = 0) -> FederatedData:
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
        for name in ("train_images", "train_labels", "test_images", "test_labels"):
            one, other = getattr(first, name), getattr(lane, name)
            if one is not other and not (one.shape == other.shape and jnp.array_equal(one, other)):
                raise refuse("data", name, "must be the same in all lanes of a program")
        for name in ("counts", "validation_labels"):
            if getattr(lane, name).shape != getattr(first, name).shape:
                raise refuse("data", name, "must have the same shape in all lanes of a program")
    widest = max(columns, *(lane.clients.shape[1] for lane in lanes))

    def of_all(name: str) -> np.ndarray:
        arrays = [np.asarray(getattr(lane, name)) for lane in lanes]
        if name == "clients":
            arrays = [np.pad(a, ((0, 0), (0, widest - a.shape[1]))) for a in arrays]
        return np.stack(arrays)

    return first.replace(**{name: of_all(name) for name in OF_A_LANE})  # pyright: ignore


def select(tree: Any, lanes: Any) -> Any:
    """The given lanes of arrays [L, ...]; of `FederatedData`, of what has a lane axis."""
    if isinstance(tree, FederatedData):
        chosen = {name: getattr(tree, name)[lanes] for name in OF_A_LANE}
        return tree.replace(**chosen)  # pyright: ignore
    return jax.tree.map(lambda leaf: leaf[lanes], tree)


def put(data: FederatedData, on: Mesh) -> FederatedData:
    """Data of `stack`, lanes of this process, on the devices of a mesh."""
    over, everywhere = mesh.over_lanes(on), mesh.everywhere(on)
    return data.replace(  # pyright: ignore
        **{
            name: mesh.put(leaf, over if name in OF_A_LANE else everywhere)
            for name, leaf in vars(data).items()
        }
    )


def width(total: int, on: Mesh, lanes_at_once: int | None = None) -> int:
    """Lanes of one program, a multiple of the mesh's: all on accelerators, on a CPU a few a device.

    The lanes are dealt out evenly: 20 lanes that go 16 at a time go 10 and 10.

    Args:
      total: L.
      on: the mesh.
      lanes_at_once: largest number, rounded up to the mesh; default as above.
    """
    across = on.shape[mesh.LANES]
    most = lanes_at_once or strategy.lanes_a_device(total) * across
    batches = math.ceil(total / max(most, across))
    return math.ceil(math.ceil(total / batches) / across) * across


def own_places(on: Mesh, lanes: int, filled: int) -> np.ndarray:
    """int [l]: of the lanes of this process in a program, which of the `filled` to put there; the
    first of them stands in where there are fewer than the program has room for."""
    places = mesh.own_lanes(on, lanes)
    return np.where(places < filled, places, 0)
