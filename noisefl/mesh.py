"""Devices and hosts: a mesh of lanes × clients, and arrays that are spread over it.

Lanes need no communication. The clients of one lane may be split over several devices, whose sums
meet in one `psum` a round. Several hosts run the same program on one mesh under JAX's own
distributed runtime (`jax.distributed.initialize`), each on the lanes of its own devices.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from noisefl.errors import refuse

LANES, CLIENTS = "lanes", "clients"


def make(clients: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh [lanes, clients] of all devices, of all processes where there are several.

    Args:
      clients: devices that share the clients of one lane; the others are lanes.
      devices: default `jax.devices()`.

    Raises:
      ValueError: `clients` does not divide the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if clients < 1 or len(devices) % clients:
        allowed = f"must divide the number of devices, {len(devices)}"
        raise refuse("client_devices", clients, allowed)
    shape = (len(devices) // clients, clients)
    return jax.make_mesh(shape, (LANES, CLIENTS), (AxisType.Auto,) * 2, devices=devices)


def idle(devices: int, lanes: int, clients: int) -> int:
    """Devices that each of L lanes may have, where there are more of them than lanes; at most one a
    client."""
    return max(min(devices // lanes, clients), 1)


def target(mesh: Mesh) -> str:
    """The platform of its devices, which need not be there: "cpu", "gpu" or "tpu"."""
    platform = mesh.devices.flat[0].platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def over_lanes(mesh: Mesh) -> NamedSharding:
    """Of arrays [L, ...]: split over the lanes' devices, copied over the clients'."""
    return NamedSharding(mesh, PartitionSpec(LANES))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def own_lanes(mesh: Mesh, lanes: int) -> np.ndarray:
    """int [l]: which of L lanes lie on devices of this process, in order.

    Args:
      mesh: of `make`.
      lanes: L, a multiple of the mesh's lanes.
    """
    places = over_lanes(mesh).addressable_devices_indices_map((lanes,)).values()
    mine = {lane for place in places if place for lane in range(lanes)[place[0]]}
    return np.array(sorted(mine), int)


def writes(mesh: Mesh, lanes: int) -> np.ndarray:
    """int [l]: which of L lanes this process is to record; each lane is one process's.

    A lane whose clients span processes is recorded by that of its first device.
    """
    first = [device.process_index for device in mesh.devices[:, 0]]
    each = lanes // len(first)
    return np.flatnonzero(np.repeat(first, each) == jax.process_index())


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays on the devices; of arrays over lanes, each process gives its own lanes only.

    Args:
      tree: arrays [l, ...] of `own_lanes`, or whole ones for `everywhere`.
      sharding: `over_lanes` or `everywhere`.
    """

    def one(leaf: Any) -> jax.Array:
        if jax.process_count() == 1:  # may be on a device already
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(one, tree)


def own(tree: Any) -> Any:
    """NumPy arrays [l, ...] of the lanes of this process, in the order of `own_lanes`."""

    def gather(array: jax.Array) -> np.ndarray:
        parts = {}
        for shard in array.addressable_shards:
            parts.setdefault(shard.index[0].start or 0, shard.data)
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    return jax.tree.map(gather, tree)


def memory_a_device(on: Mesh) -> int:
    """Bytes that a device may hold, the least of all processes'; a CPU's is its share of the
    machine's memory."""
    device = on.local_devices[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        own = int(stats["bytes_limit"])
    else:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        own = pages // jax.local_device_count()
    if jax.process_count() == 1:
        return own
    mebibytes = multihost_utils.process_allgather(np.int32(own >> 20))  # no int64 without x64
    return int(np.min(mebibytes)) << 20


def everyones(tree: Any) -> Any:
    """NumPy arrays [L, ...] of arrays over lanes, those of other processes included; of keys, their
    data."""

    def plain(leaf: Any) -> Any:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    tree = jax.tree.map(plain, tree)
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)
