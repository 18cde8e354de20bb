"""Who takes part in a round, and whose randomness is whose: fair, fresh and independent.

Every test here has fixed seeds; were they drawn anew, each would fail wrongly with a probability of
less than 2e-5.
"""

from typing import Any

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import noisefl
from noisefl import calibrate, keys, noise, schemes
from noisefl.cohort import Cohort
from noisefl.experiment import Experiment

PAIR = schemes.Noised(calibrator=calibrate.Unverified(), on=noise.layers("all"))
TINY = fed.TINY.replace(scheme=schemes.Warmup(PAIR, warmup_rounds=0))


@jax.jit
def drawn(root, rounds, state, data, experiment):
    """RoundInfo's draws [R, …] alone: the compiler drops the training that they do not need."""

    def one(t):
        _, info = noisefl.step(root, state.replace(round=t), data, experiment)
        return info.members.clients, info.told["server_counts"], info.issue.secret.draw.common[0]

    return jax.vmap(one)(rounds)


def many_rounds(experiment: Experiment, rounds: int, data: Any = None, seed: int = 11):
    data = fed.federation() if data is None else data
    state = noisefl.init(fed.KEY, experiment, data)
    found = drawn(keys.root(seed), jnp.arange(rounds), state, data, experiment)
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize(
    ("cohort", "in_a", "in_b", "servers"),
    [
        (Cohort(clients_per_round=5), 3, 2, 2),
        (Cohort(clients_per_round=3, groups="full"), 3, 3, 1),
    ],
    ids=["odd", "full"],
)
def test_groups_are_disjoint_and_every_client_is_as_likely_as_any(cohort, in_a, in_b, servers):
    """a_t, b_t: "disjoint random sets of clients, m in all"; s_t borrows from all K."""
    rounds, k = 3000, len(fed.COUNTS)
    clients, borrowed, _ = many_rounds(TINY.replace(cohort=cohort), rounds)
    assert clients.shape == (rounds, in_a + in_b)
    assert all(len(set(row)) == in_a + in_b for row in clients.tolist())
    assert (clients.min(), clients.max()) == (0, k - 1)
    for group in (clients[:, :in_a], clients[:, in_a:], clients):
        size = group.shape[1]
        count, expected = np.bincount(group.ravel(), minlength=k), rounds * size / k
        # without replacement within a round the counts vary less, by (K − size) / (K − 1)
        statistic = ((count - expected) ** 2 / expected).sum() * (k - 1) / (k - size)
        assert stats.chi2.sf(statistic, k - 1) > 1e-6

    # every server-side client draws one client of its own, independently
    assert borrowed.shape == (rounds, servers)
    kinds, drawn = np.unique(borrowed, return_inverse=True)
    drawn = drawn.reshape(borrowed.shape)
    chance = np.array([np.mean(np.array(fed.COUNTS) == n) for n in kinds])
    joint = np.bincount(drawn @ len(kinds) ** np.arange(servers), minlength=len(kinds) ** servers)
    expected = chance
    for _ in range(servers - 1):
        expected = np.outer(chance, expected).ravel()
    assert stats.chisquare(joint, rounds * expected).pvalue > 1e-6
    # and whom it draws says nothing of who trains: one table of both
    pair = np.bincount(drawn[:, 0] * k + clients[:, 0], minlength=len(kinds) * k)
    assert stats.chisquare(pair, rounds * np.repeat(chance, k) / k).pvalue > 1e-6


def test_no_two_draws_of_a_round_share_a_stream(monkeypatch):
    """Draws that share a key can still look independent, so the streams themselves are counted."""
    asked, stream = [], keys.stream

    def noting(key, purpose, index=None):
        asked.append(purpose)
        return stream(key, purpose, index)

    monkeypatch.setattr(keys, "stream", noting)
    data = fed.federation()
    bare = TINY.replace(scheme=PAIR)  # a warm-up traces what is inside of it twice
    state = noisefl.init(keys.root(1), bare, data)
    asked.clear()
    jax.eval_shape(noisefl.step, keys.root(1), state, data, bare)
    names = ("rounds", "round", "groups", "server", "calibration")
    assert [asked.count(name) for name in names] == [1] * len(names)
    assert "client" in asked


def test_cohorts_of_rounds_and_seeds_all_differ():
    """10 of 40 clients: two sets of 4 seeds × 25 rounds agree with probability 6e-6."""
    wide = TINY.replace(cohort=Cohort(clients_per_round=10))
    data = fed.federation((2,) * 40)
    cohorts = [many_rounds(wide, 25, data, seed)[0] for seed in range(4)]
    assert len({frozenset(row.tolist()) for row in np.concatenate(cohorts)}) == 100


def test_noise_of_rounds_seeds_and_layers_is_independent():
    """ξ ~ N(0, σ²), drawn afresh: 90 draws of 226 numbers, no two of which are correlated.

    A pair's sum of products over √226 is close to N(0, 1): of 4005 pairs one is beyond 6 with
    probability 1e-5.
    """
    by_round = [many_rounds(TINY, 45, seed=seed)[2] for seed in range(2)]
    table = np.concatenate([
        np.concatenate([leaf.reshape(45, -1) for _, leaf in sorted(some.items())], axis=1)
        for some in by_round
    ])  # fmt: skip
    assert table.shape == (90, 226)
    z = (table @ table.T)[np.triu_indices(90, 1)] / np.sqrt(226)
    assert np.abs(z).max() < 6
    assert stats.kstest(table.ravel(), "norm").pvalue > 1e-6
