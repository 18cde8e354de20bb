"""`aggregate` against the sums of ALGORITHM.md, written out client by client."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from noisefl import Config, aggregate

COUNTS = np.array([30, 10, 40, 20, 60], np.int32)
SIGNS = np.array([1, 1, 1, -1, -1], np.float32)


def test_shares_are_n_k_over_n():
    shares = aggregate.shares(jnp.asarray(COUNTS))
    assert shares.dtype == jnp.float32
    np.testing.assert_allclose(shares, np.array([3, 1, 4, 2, 6]) / 16, rtol=1e-7)


def test_shares_of_many_samples():
    """Sums beyond 2²⁴, where float32 no longer counts one by one."""
    counts = np.array([600_001, 60_000_000, 3], np.int32)
    np.testing.assert_allclose(
        aggregate.shares(jnp.asarray(counts)), counts / counts.sum(dtype=np.int64), rtol=1e-6
    )


def test_halves_give_each_group_one_half():
    shares = jnp.asarray(COUNTS / COUNTS.sum(), jnp.float32)
    halves = np.asarray(aggregate.halves(shares, jnp.asarray(SIGNS)))
    # Group a holds 80 samples and b 80 of 160; the second case is uneven.
    np.testing.assert_allclose(halves, COUNTS / 160, rtol=1e-6)
    uneven = np.array([3, 1, 4, 1, 1]) / 10
    halves = np.asarray(aggregate.halves(jnp.asarray(uneven, jnp.float32), jnp.asarray(SIGNS)))
    np.testing.assert_allclose(halves, [3 / 16, 1 / 16, 4 / 16, 1 / 4, 1 / 4], rtol=1e-6)
    assert np.dot(halves, SIGNS) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("server_clients", [1, 3, 12])  # 12 are more than K
def test_server_clients_are_the_explicit_sum(server_clients):
    rng = np.random.default_rng(0)
    models = rng.normal(size=(len(COUNTS), 3, 2))
    owner = rng.normal(size=(3, 2))
    borrowed = rng.choice(COUNTS, server_clients)
    total = COUNTS.sum() + borrowed.sum()
    expected = sum(n / total * w for n, w in zip(COUNTS, models, strict=True))
    expected = expected + sum(n / total * owner for n in borrowed)

    average = np.tensordot(COUNTS / COUNTS.sum(), models, 1)
    result = aggregate.include_server_clients(
        {"w": jnp.asarray(average, jnp.float32)},
        {"w": jnp.asarray(owner, jnp.float32)},
        jnp.float32(COUNTS.sum()),
        jnp.float32(borrowed.sum()),
    )
    np.testing.assert_allclose(result["w"], expected, rtol=1e-5, atol=1e-6)


def test_without_server_clients_the_average_is_untouched():
    average = {"w": jax.random.normal(jax.random.key(0), (1000,)) * 1e3}
    owner = {"w": jax.random.normal(jax.random.key(1), (1000,))}
    borrowed = aggregate.borrowed_counts(
        jax.random.key(2),
        jnp.asarray(COUNTS),
        Config(num_clients=5, client_fraction=1, server_clients=0),
    )
    assert borrowed.shape == (0,)
    result = aggregate.include_server_clients(average, owner, jnp.float32(160), jnp.sum(borrowed))
    np.testing.assert_array_equal(result["w"], average["w"])


def test_equal_models_stay_what_they_are():
    model = {"w": jnp.linspace(-3, 3, 50)}
    result = aggregate.include_server_clients(model, model, jnp.float32(70), jnp.float32(33))
    np.testing.assert_allclose(result["w"], model["w"], rtol=1e-6)


def config(server_clients: int, weights: str = "borrowed") -> Config:
    return Config(
        num_clients=5, client_fraction=1.0, server_clients=server_clients, server_weights=weights
    )


def test_borrowed_counts_are_drawn_from_the_whole_population():
    """Chi-square over which client was borrowed from; false alarm 1e-6 each."""
    draws = jax.vmap(lambda k: aggregate.borrowed_counts(k, jnp.asarray(COUNTS), config(3)))(
        jax.random.split(jax.random.key(0), 4000)
    )
    draws = np.asarray(draws)
    assert (draws.dtype, draws.shape) == (np.float32, (4000, 3))
    for column in draws.T:
        observed = [np.sum(column == n) for n in COUNTS]
        assert sum(observed) == 4000
        assert stats.chisquare(observed).pvalue > 1e-6
    # Each server-side client draws for itself: all 25 pairs, independently.
    pairs = [np.sum((draws[:, 0] == a) & (draws[:, 1] == b)) for a in COUNTS for b in COUNTS]
    assert stats.chisquare(pairs).pvalue > 1e-6


def test_more_server_clients_than_clients():
    borrowed = aggregate.borrowed_counts(jax.random.key(0), jnp.asarray(COUNTS), config(40))
    assert borrowed.shape == (40,)
    assert set(np.asarray(borrowed).tolist()) <= set(COUNTS.tolist())


def test_uniform_counts_are_the_mean():
    uniform = config(3, "uniform")
    counts = jnp.asarray([1, 2, 4, 4, 4])
    borrowed = aggregate.borrowed_counts(jax.random.key(0), counts, uniform)
    np.testing.assert_array_equal(borrowed, np.full(3, 3, np.float32))
    assert borrowed.dtype == jnp.float32
