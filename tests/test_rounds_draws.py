"""Who takes part in a round, and whose randomness is whose: fair, fresh and independent.

Every test here has fixed seeds; were they drawn anew, each would fail wrongly with a probability of
less than 2e-5.
"""

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from noisefl import keys, make_round

FIXED = {"calibrator": "fixed"}


def many_rounds(config, rounds: int, data=None, seed: int = 11):
    """RoundInfo's draws [R, …] alone: the compiler drops the training that they do not need."""
    step = make_round(fed.TinyCNN(), config).step
    data = fed.federation() if data is None else data
    state, hyper = fed.start(fed.program(fed.config())), fed.hyper(config, warmup_rounds=0)

    def drawn(key):
        _, info = step(key, state, data, hyper)
        return info.clients, info.server_counts, info.calibration.draw

    ks = jax.vmap(lambda t: keys.stream(keys.root(seed), "round", t))(jnp.arange(rounds))
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(drawn), compiler_options=fed.QUICK)(ks))


@pytest.mark.parametrize(
    ("changes", "in_a", "in_b", "servers"),
    [
        ({}, 2, 2, 2),
        ({"client_fraction": 0.625}, 3, 2, 2),
        ({"client_fraction": 0.375, "group_sizes": "full"}, 3, 3, 1),
    ],
)
def test_groups_are_disjoint_and_every_client_is_as_likely_as_any(changes, in_a, in_b, servers):
    """a_t, b_t: "disjoint random sets of clients, m in all"; s_t borrows from all K."""
    rounds, k = 3000, len(fed.COUNTS)
    clients, borrowed, _ = many_rounds(fed.config(**changes, **FIXED), rounds)
    assert clients.shape == (rounds, in_a + in_b)
    assert all(len(set(row)) == in_a + in_b for row in clients.tolist())
    assert clients.min() == 0
    assert clients.max() == k - 1
    for group in (clients[:, :in_a], clients[:, in_a:], clients):
        size = group.shape[1]
        count, expected = np.bincount(group.ravel(), minlength=k), rounds * size / k
        # without replacement within a round the counts vary less, by (K − size) / (K − 1)
        statistic = ((count - expected) ** 2 / expected).sum() * (k - 1) / (k - size)
        assert stats.chi2.sf(statistic, k - 1) > 1e-6

    # every server-side client draws one client of its own, independently
    assert borrowed.shape == (rounds, servers)
    drawn = np.searchsorted(np.sort(fed.COUNTS), borrowed)
    assert (np.sort(fed.COUNTS)[drawn] == borrowed).all()
    joint = np.bincount(drawn @ k ** np.arange(servers), minlength=k**servers)
    assert stats.chisquare(joint).pvalue > 1e-6
    # and whom it draws says nothing of who trains: one table of both
    pair = np.bincount(drawn[:, 0] * k + clients[:, 0], minlength=k * k)
    assert stats.chisquare(pair).pvalue > 1e-6


def test_no_two_draws_of_a_round_share_a_stream(monkeypatch):
    """DESIGN.md: "sub-keys are named once"; draws that share a key can still look independent."""
    asked, stream = [], keys.stream

    def noting(key, purpose, index=None):
        asked.append(purpose)
        return stream(key, purpose, index)

    monkeypatch.setattr(keys, "stream", noting)
    config = fed.config()
    init, step = make_round(fed.TinyCNN(), config)
    state, key = init(keys.root(1)), keys.root(2)
    jax.eval_shape(step, key, state, fed.federation(), fed.hyper(config))
    assert {"groups", "server", "calibration", "client"} <= set(asked)
    assert [asked.count(name) for name in ("groups", "server", "calibration")] == [1, 1, 1]


def test_uniform_server_weights_are_the_mean_client():
    config = fed.config(server_weights="uniform", server_clients=3, **FIXED)
    _, counts, _ = many_rounds(config, 2)
    np.testing.assert_allclose(counts, np.full((2, 3), np.mean(fed.COUNTS)), rtol=1e-6)


def test_cohorts_of_rounds_and_seeds_all_differ():
    """10 of 40 clients: two sets of 4 seeds × 25 rounds agree with probability 6e-6."""
    config = fed.config(num_clients=40, client_fraction=0.25, **FIXED)
    data = fed.federation((2,) * 40)
    cohorts = [many_rounds(config, 25, data, seed)[0] for seed in range(4)]
    assert len({frozenset(row.tolist()) for row in np.concatenate(cohorts)}) == 100


def test_batch_orders_of_clients_rounds_and_seeds_all_differ():
    """48 orders of 12 samples: two agree with probability 2.4e-6."""
    config, data = fed.config(), fed.federation((12,) * 8)
    orders = [
        np.concatenate(fed.local_batches(key, k, data, config)).tolist()
        for seed in range(2)
        for key in fed.round_keys(3, seed)
        for k in range(8)
    ]
    assert len({tuple(order) for order in orders}) == 48


def test_noise_of_rounds_seeds_tries_and_layers_is_independent():
    """ξ ~ N(0, σ²), drawn afresh: 90 draws of 226 numbers, no two of which are correlated.

    A pair's sum of products over √226 is close to N(0, 1): of 4005 pairs one is beyond 6 with
    probability 1e-5; so is one of the 27 · 192 pairs of entries of two layers over √90.
    """
    config = fed.config(noise_layers="all", **FIXED)
    by_round = [many_rounds(config, 25, seed=seed)[2] for seed in range(2)]
    draws = [{path: leaf[t] for path, leaf in some.items()} for some in by_round for t in range(25)]
    base = fed.start(fed.program(fed.config())).base
    for key in fed.round_keys(4, seed=20):
        for j in range(10):
            unit = fed.unit_noise(key, j, base, config)
            draws.append({(a, b): leaf for a in unit for b, leaf in unit[a].items()})
    table = np.stack(
        [np.concatenate([draw[path].ravel() for path in sorted(draw)]) for draw in draws]
    )
    assert table.shape == (90, 226)
    z = (table @ table.T)[np.triu_indices(90, 1)] / np.sqrt(226)
    assert np.abs(z).max() < 6
    assert stats.kstest(table.ravel(), "norm").pvalue > 1e-6
    stem, head = (
        np.stack([draw[layer, "kernel"].ravel() for draw in draws]) for layer in ("stem", "head")
    )
    assert np.abs(stem.T @ head).max() / np.sqrt(90) < 6
