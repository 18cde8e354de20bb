"""`layout`: what is stacked and what is shared, and how lanes are dealt out."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from noisefl import layout, mesh
from noisefl.data import Federation

SHARED = ("train_images", "train_labels", "test_images", "test_labels")


def changed(data: Any, **arrays: Any) -> Any:
    """The federation with other arrays, those of its images included."""
    shared = {name: arrays.pop(name) for name in SHARED if name in arrays}
    return data.replace(images=data.images.replace(**shared), **arrays)


def columns(data: Federation, more: int) -> Federation:
    """The same clients in a wider table; what stands in the padding is never read."""
    table = np.asarray(data.clients)
    return changed(data, clients=jnp.asarray(np.pad(table, ((0, 0), (0, more)))))


def test_stack_pads_tables_and_shares_images(tiny_data):
    order = np.arange(6)[::-1]
    turned = changed(
        columns(tiny_data, 5),
        counts=tiny_data.counts[order],
        validation_images=tiny_data.validation_images[::-1],
        validation_labels=tiny_data.validation_labels[::-1],
    )
    stacked = layout.stack([tiny_data, turned, tiny_data])
    assert stacked.clients.shape == (3, 6, 14)
    for lane, one in enumerate((tiny_data, turned, tiny_data)):
        width = one.clients.shape[1]
        np.testing.assert_array_equal(stacked.clients[lane, :, :width], one.clients)
        assert not np.any(stacked.clients[lane, :, width:])
        for name in ("counts", "validation_images", "validation_labels"):
            np.testing.assert_array_equal(getattr(stacked, name)[lane], getattr(one, name))
            assert getattr(stacked, name).dtype == getattr(one, name).dtype
    for name in SHARED:
        assert getattr(stacked, name) is getattr(tiny_data, name)


def test_stack_pads_to_more_columns_where_other_lanes_have_them(tiny_data):
    """Processes of one program stack their own lanes alone, and batches go one by one."""
    assert layout.stack([tiny_data], 14).clients.shape == (1, 6, 14)
    assert layout.stack([tiny_data, columns(tiny_data, 5)], 11).clients.shape == (2, 6, 14)


def test_stack_takes_equal_copies(tiny_data):
    copied = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), tiny_data)
    assert layout.stack([tiny_data, copied]).train_images is tiny_data.train_images


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda d: {"train_images": d.train_images.at[3, 1, 1].add(1)}, "train_images"),
        (lambda d: {"train_labels": d.train_labels.at[-1].add(1)}, "train_labels"),
        (lambda d: {"test_images": d.test_images[:-1]}, "test_images"),
        (lambda d: {"test_labels": d.test_labels.at[0].add(1)}, "test_labels"),
        (lambda d: {"counts": d.counts[:-1], "clients": d.clients[:-1]}, "counts"),
        (
            lambda d: {
                "validation_images": d.validation_images[1:],
                "validation_labels": d.validation_labels[1:],
            },
            "validation_labels",
        ),
    ],
)
def test_stack_refuses_what_one_program_cannot_hold(tiny_data, change, name):
    other = changed(tiny_data, **change(tiny_data))
    with pytest.raises(ValueError, match=f"^data='{name}': must .* in all lanes of a program$"):
        layout.stack([tiny_data, tiny_data, other])


def test_select_takes_lanes_of_what_has_them(tiny_data):
    other = changed(tiny_data, counts=tiny_data.counts[::-1])
    chosen = layout.select(layout.stack([tiny_data, other]), np.array([1, 1, 0]))
    np.testing.assert_array_equal(chosen.counts, [other.counts, other.counts, tiny_data.counts])
    assert chosen.train_images is tiny_data.train_images
    tree = layout.select({"a": np.arange(6).reshape(3, 2)}, 2)
    assert tree["a"].tolist() == [4, 5]


def test_axes_and_put_spread_lanes_and_copy_images(tiny_data):
    on = mesh.make(devices=jax.devices()[:1])
    stacked = layout.stack([tiny_data, tiny_data])
    placed = layout.put(stacked, on)
    wanted = layout.axes(mesh.over_lanes(on), mesh.everywhere(on))
    for name, leaf in vars(placed).items():
        for array in jax.tree.leaves(leaf):
            assert array.sharding == getattr(wanted, name)
            assert (name == "images") == (array.sharding == mesh.everywhere(on))
    jax.tree.map(np.testing.assert_array_equal, placed, stacked)


# How many at once


def across(devices: int, platform: str = "cpu") -> Any:
    each = np.full((devices, 1), SimpleNamespace(platform=platform))
    return SimpleNamespace(shape={mesh.LANES: devices, mesh.CLIENTS: 1}, devices=each)


@pytest.mark.parametrize(
    ("total", "devices", "at_once", "wanted"),
    [
        (20, 1, 16, 10),  # 10 and 10, not 16 and 4
        (20, 1, 20, 20),
        (20, 1, 7, 7),  # 7, 7, 6
        (21, 4, 8, 8),  # 8, 8, 5
        (9, 4, 8, 8),  # 5 and 4, in multiples of 4
        (3, 4, 16, 4),
        (3, 4, 1, 4),  # no device stands idle
        (1, 1, None, 1),
        (60, 1, None, 8),  # 8 on a device of a CPU, or a few less
        (60, 2, None, 16),
        (9, 1, None, 5),
    ],
)
def test_lanes_are_dealt_out_evenly(total, devices, at_once, wanted):
    assert layout.width(total, across(devices), at_once) == wanted


@given(st.integers(1, 300), st.integers(1, 16), st.integers(1, 64))
@example(12, 4, 5)
def test_width_fills_the_mesh_and_wastes_little(total, devices, at_once):
    width = layout.width(total, across(devices), at_once)
    assert width % devices == 0
    assert 1 <= width <= math.ceil(max(at_once, devices) / devices) * devices
    batches = math.ceil(total / max(at_once, devices))
    assert batches * width >= total  # no more batches than needed
    assert batches * (width - devices) < total  # and none wider than needed


def test_accelerators_take_more_at_once():
    """Whatever machine it is asked on."""
    assert layout.width(200, across(1, "gpu")) == 200
    assert layout.width(300, across(1, "cuda")) == 150
    assert layout.width(300, across(2, "tpu")) == 300


@pytest.mark.parametrize(
    ("own", "filled", "wanted"),
    [
        ([0, 1, 2, 3], 4, [0, 1, 2, 3]),
        ([0, 1, 2, 3], 2, [0, 1, 0, 0]),
        ([4, 5, 6, 7], 6, [4, 5, 0, 0]),
        ([4, 5, 6, 7], 3, [0, 0, 0, 0]),
    ],
)
def test_places_without_a_lane_are_filled_with_the_first(monkeypatch, own, filled, wanted):
    monkeypatch.setattr(mesh, "own_lanes", lambda on, lanes: np.array(own))
    assert layout.own_places(across(1), 8, filled).tolist() == wanted
