"""`weighted_sum`: the same sum however the clients are mapped, over devices as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from noisefl import cohort

DEVICES = "devices"


def train(k: jax.Array, sign: jax.Array) -> tuple[dict, jax.Array]:
    """A made-up client: a model and a score that tell who it was."""
    return {"w": sign * jnp.array([1.0, 2.0]) * k, "b": jnp.float32(k) ** 2}, 10 * k + sign


def clients(size: int) -> tuple[jax.Array, jax.Array, np.ndarray]:
    rng = np.random.default_rng(size)
    signs = np.where(np.arange(size) < size / 2, 1.0, -1.0).astype(np.float32)
    weights = rng.uniform(0.1, 1, size).astype(np.float32)
    return jnp.asarray(rng.permutation(size) + 3), jnp.asarray(signs), weights


def by_hand(size: int) -> tuple[dict, np.ndarray]:
    ks, signs, weights = map(np.asarray, clients(size))
    total = {
        "w": np.array([1.0, 2.0]) * np.sum(weights * signs * ks),
        "b": np.sum(weights * ks.astype(float) ** 2),
    }
    return total, 10 * ks + signs


@pytest.mark.parametrize(
    ("size", "devices", "at_once"), [(6, 3, 1), (7, 3, 2), (5, 4, 0), (2, 4, 1), (9, 5, 2)]
)
def test_clients_dealt_out_to_devices(size, devices, at_once):
    """Nine clients on five devices are two each, and one device has none of its own."""
    ks, signs, weights = clients(size)

    def one(_: jax.Array) -> tuple[dict, jax.Array]:
        shares = jnp.asarray(weights)
        return cohort.weighted_sum(train, (ks, signs), shares, at_once, DEVICES)

    totals, scores = jax.vmap(one, axis_name=DEVICES)(jnp.arange(devices))
    wanted, wanted_scores = by_hand(size)
    for device in range(devices):  # all know all of it
        for name, leaf in wanted.items():
            np.testing.assert_allclose(totals[name][device], leaf, rtol=1e-5)
        np.testing.assert_array_equal(scores[device], wanted_scores)


@pytest.mark.parametrize("at_once", [1, 3, 0, 99])
def test_without_devices_it_is_the_same_sum(at_once):
    ks, signs, weights = clients(7)
    total, scores = cohort.weighted_sum(train, (ks, signs), jnp.asarray(weights), at_once)
    wanted, wanted_scores = by_hand(7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), total, wanted)
    np.testing.assert_array_equal(scores, wanted_scores)


def test_each_client_trains_once_a_device():
    """Four clients on two devices: each trains two of them, not all."""
    ks, signs, weights = clients(4)
    trained: list[int] = []

    def counted(k: jax.Array, sign: jax.Array) -> tuple[dict, jax.Array]:
        jax.debug.callback(lambda k: trained.append(int(k)), k)
        return train(k, sign)

    def one(_: jax.Array) -> tuple[dict, jax.Array]:
        return cohort.weighted_sum(counted, (ks, signs), jnp.asarray(weights), 1, DEVICES)

    jax.vmap(one, axis_name=DEVICES)(jnp.arange(2))
    jax.effects_barrier()
    assert sorted(trained) == sorted(np.asarray(ks).tolist())
