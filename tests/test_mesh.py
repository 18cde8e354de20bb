"""The mesh: who holds which lanes, who writes them, and that arrays come back as they went."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from noisefl import mesh

ROOT = Path(__file__).parents[1]

# In a process of its own: the number of devices is fixed by the first use of one.
FOUR_DEVICES = """
import jax, numpy as np, pytest
from noisefl import mesh

devices = jax.devices()
assert len(devices) == 4

on = mesh.make()
assert (on.shape[mesh.LANES], on.shape[mesh.CLIENTS]) == (4, 1)
assert mesh.own_lanes(on, 8).tolist() == mesh.writes(on, 8).tolist() == list(range(8))

square = mesh.make(2)
assert (square.shape[mesh.LANES], square.shape[mesh.CLIENTS]) == (2, 2)
assert sorted(device.id for device in square.devices.flat) == [0, 1, 2, 3]
assert mesh.own_lanes(square, 6).tolist() == mesh.writes(square, 6).tolist() == list(range(6))
assert mesh.make(4).shape[mesh.LANES] == 1
for clients in (0, -1, 3, 5, 8):
    with pytest.raises(ValueError, match=f"client_devices={clients}: .*number of devices, 4"):
        mesh.make(clients)

# Lanes lie where the mesh says, each on both of its clients' devices, and come back in order.
tree = {"a": np.arange(24.0).reshape(8, 3), "b": np.arange(8, dtype=np.int32) ** 2}
for on in (mesh.make(), square, mesh.make(2, devices[::-1]), mesh.make(1, devices[1:3])):
    across, clients = on.devices.shape
    placed = mesh.put(tree, mesh.over_lanes(on))
    for name, leaf in placed.items():
        found = {shard.device: np.asarray(shard.data) for shard in leaf.addressable_shards}
        assert set(found) == set(on.devices.flat)
        for row, part in zip(on.devices, np.split(tree[name], across), strict=True):
            for device in row:
                np.testing.assert_array_equal(found[device], part)
    for back in (mesh.own(placed), mesh.everyones(placed)):
        jax.tree.map(np.testing.assert_array_equal, back, tree)
        assert all(type(leaf) is np.ndarray for leaf in back.values())
    for shard in mesh.put(tree["a"], mesh.everywhere(on)).addressable_shards:
        np.testing.assert_array_equal(shard.data, tree["a"])
print("good")
"""


@pytest.mark.parametrize(
    ("devices", "lanes", "clients", "share"),
    [(2, 1, 10, 2), (2, 2, 10, 1), (2, 3, 10, 1), (8, 3, 10, 2), (8, 1, 4, 4), (1, 1, 10, 1)],
)
def test_devices_that_lanes_leave_idle(devices, lanes, clients, share):
    assert mesh.idle(devices, lanes, clients) == share


def test_four_devices():
    found = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (found.returncode, found.stdout) == (0, "good\n"), found.stderr


def test_one_device():
    on = mesh.make(devices=jax.devices()[:1])
    assert dict(on.shape) == {mesh.LANES: 1, mesh.CLIENTS: 1}
    assert mesh.own_lanes(on, 3).tolist() == mesh.writes(on, 3).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"^client_devices=2: must divide the .* devices, 1$"):
        mesh.make(2, jax.devices()[:1])


def test_what_lies_on_the_devices_is_not_copied():
    """Images of MNIST are put there once, not once a batch."""
    on = mesh.make(devices=jax.devices()[:1])
    images = jnp.arange(6)
    placed = mesh.put(images, mesh.everywhere(on))
    assert placed.unsafe_buffer_pointer() == images.unsafe_buffer_pointer()


# Several processes, as far as their numbers go; tests/test_distributed.py has real ones.


def made_of(processes: list[list[int]]) -> Any:
    """A mesh [lanes, clients] of devices of these processes."""
    return SimpleNamespace(
        devices=np.array([[SimpleNamespace(process_index=p) for p in row] for row in processes]),
        shape={mesh.LANES: len(processes), mesh.CLIENTS: len(processes[0])},
    )


@pytest.mark.parametrize(
    ("processes", "lanes", "written"),
    [
        ([[0], [0], [1], [1]], 8, {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}),
        ([[0, 0], [1, 1]], 2, {0: [0], 1: [1]}),
        ([[0, 1]], 3, {0: [0, 1, 2], 1: []}),  # whose clients span both: the first writes
        ([[1, 0], [0, 1]], 4, {0: [2, 3], 1: [0, 1]}),
        ([[2], [0], [1], [0]], 4, {0: [1, 3], 1: [2], 2: [0]}),
    ],
)
def test_each_lane_is_written_by_one_process(monkeypatch, processes, lanes, written):
    for process, mine in written.items():
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert mesh.writes(made_of(processes), lanes).tolist() == mine
    assert sorted(lane for mine in written.values() for lane in mine) == list(range(lanes))


def test_own_lanes_are_those_of_all_own_devices(monkeypatch):
    """In order and each once, though the devices of its clients hold copies."""
    places = {"d": slice(4, 6), "c": slice(0, 2), "b": slice(4, 6), "a": slice(0, 2)}
    asked = []

    def indices(shape):
        asked.append(shape)
        return {device: (place,) for device, place in places.items()}

    sharding = SimpleNamespace(addressable_devices_indices_map=indices)
    monkeypatch.setattr(mesh, "over_lanes", lambda on: sharding)
    assert mesh.own_lanes(cast(Any, "a mesh"), 8).tolist() == [0, 1, 4, 5]
    assert asked == [(8,)]


def test_memory_is_what_the_device_reports():
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 12345, "bytes_in_use": 1})
    assert mesh.memory_a_device(cast(Any, SimpleNamespace(local_devices=[device]))) == 12345


def test_memory_of_a_cpu_is_its_share_of_the_machine(monkeypatch):
    pages = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(mesh.os, "sysconf", pages.__getitem__)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    for stats in (None, {}):
        device = SimpleNamespace(memory_stats=lambda stats=stats: stats)
        on = cast(Any, SimpleNamespace(local_devices=[device]))
        assert mesh.memory_a_device(on) == 1000 * 4096 // 4
