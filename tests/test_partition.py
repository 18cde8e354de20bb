"""`partition`: what every way promises, and what each alone does.

Statistical tests run on fixed seeds, so they pass or fail for good; their margins are stated in
standard errors of the quantity under the documented distribution.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisefl.data import PARTITIONS, partition


def members(part):
    """The clients as a list of index arrays, padding cut off."""
    return [row[:count] for row, count in zip(part.indices, part.counts, strict=True)]


def ten_of(per_class):
    return np.random.default_rng(0).permutation(np.repeat(np.arange(10), per_class))


@st.composite
def problems(draw):
    n = draw(st.integers(1, 200))
    labels = draw(st.lists(st.integers(0, draw(st.integers(0, 12))), min_size=n, max_size=n))
    k = draw(st.integers(1, n))
    return {
        "labels": np.array(labels),
        "num_clients": k,
        "seed": draw(st.integers(0, 2**63)),
        "shards_per_client": draw(st.integers(1, n // k)),
        "dirichlet_alpha": draw(st.floats(1e-6, 1e6)),
        "size_sigma": draw(st.floats(0, 100)),
        "writers": np.arange(n) % draw(st.integers(k, n)),
    }


@pytest.mark.parametrize("how", PARTITIONS)
@settings(max_examples=40)
@given(problem=problems())
def test_every_image_goes_to_exactly_one_client(how, problem):
    part = partition(how=how, **problem)
    n, k = len(problem["labels"]), problem["num_clients"]
    assert part.indices.dtype == part.counts.dtype == np.int32
    assert part.counts.shape == (k,)
    assert part.indices.shape == (k, part.counts.max())
    assert part.counts.min() >= 1
    np.testing.assert_array_equal(np.sort(np.concatenate(members(part))), np.arange(n))
    if how == "iid":
        assert part.counts.max() - part.counts.min() <= 1
    padding = np.arange(part.indices.shape[1]) >= part.counts[:, None]
    assert not part.indices[padding].any()
    again = partition(how=how, **problem)
    np.testing.assert_array_equal(part.indices, again.indices)
    np.testing.assert_array_equal(part.counts, again.counts)


@pytest.mark.parametrize("how", PARTITIONS)
def test_seeds_differ(how):
    writers = np.arange(500) % 30
    parts = [partition(ten_of(50), 10, how, seed, writers=writers) for seed in range(20)]
    tables = {tuple(np.concatenate(members(part)).tolist()) for part in parts}
    assert len(tables) == 20


def test_iid_labels_are_a_random_sample():
    # Counts of a label in a client are hypergeometric; 1000 cells, none beyond 5 standard errors
    # (a chance below 1e-3 over all cells, were the seed not fixed).
    labels = ten_of(1000)
    part = partition(labels, 100, "iid", 0)
    counts = np.array([np.bincount(labels[client], minlength=10) for client in members(part)])
    error = np.sqrt(100 * 0.1 * 0.9 * (10000 - 100) / (10000 - 1))
    assert np.abs(counts - 10).max() < 5 * error
    assert 0.8 < counts.std() / error < 1.2  # and not more even than chance


# --- shards ---------------------------------------------------------------------------------------


def test_shards_are_those_of_mcmahan():
    """60,000 images, 100 clients: 200 contiguous shards of exactly 300 in label order."""
    histogram = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    labels = np.random.default_rng(3).permutation(np.repeat(np.arange(10), histogram))
    part = partition(labels, 100, "shards", 0)
    assert part.counts.tolist() == [600] * 100
    rank = np.empty(60000, int)
    rank[np.lexsort((np.arange(60000), labels))] = np.arange(60000)  # by label, then by index
    seen = []
    for client in members(part):
        shards, sizes = np.unique(rank[client] // 300, return_counts=True)
        assert sizes.tolist() == [300, 300]
        seen += shards.tolist()
    assert sorted(seen) == list(range(200))


@pytest.mark.parametrize("shards_per_client", [1, 2, 5])
def test_shards_bound_the_labels_of_a_client(shards_per_client):
    labels = ten_of(200)  # each class is a whole number of shards
    part = partition(labels, 20, "shards", 1, shards_per_client=shards_per_client)
    kinds = [len(np.unique(labels[client])) for client in members(part)]
    assert max(kinds) <= shards_per_client
    if shards_per_client > 1:
        assert max(kinds) > 1  # dealt at random, not in order


def test_shards_spread_a_remainder():
    counts = partition(np.zeros(103, int), 5, "shards", 0, shards_per_client=2).counts
    assert counts.sum() == 103
    assert set(counts.tolist()) <= {20, 21, 22}


# --- Dirichlet ------------------------------------------------------------------------------------


def shares(labels, part):
    """Share of each class that each client holds: [K, C]."""
    counts = np.array([np.bincount(labels[client], minlength=10) for client in members(part)])
    return counts / counts.sum(0)


def test_large_alpha_is_a_uniform_mix():
    labels = ten_of(1000)
    part = partition(labels, 20, "dirichlet", 0, dirichlet_alpha=1e6)
    assert np.abs(shares(labels, part) * 1000 - 50).max() <= 2


def test_small_alpha_is_few_labels():
    labels = ten_of(1000)
    part = partition(labels, 100, "dirichlet", 0, dirichlet_alpha=1e-4)
    assert (shares(labels, part).max(0) > 0.9).all()  # each class is with one client, nearly,
    assert (part.counts == 1).sum() >= 80  # and those left without one are given one image


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0])
def test_dirichlet_shares_have_the_moments_of_the_distribution(alpha):
    # Mean 1/K and variance (1/K)(1 − 1/K)/(K·alpha + 1), on 300 classes of 400 images and K = 5.
    # 5 standard errors: a chance of 6e-7 each, were the seeds not fixed.
    classes, k = 300, 5
    labels = np.repeat(np.arange(classes), 400)
    part = partition(labels, k, "dirichlet", 0, dirichlet_alpha=alpha)
    share = np.bincount(labels[part.indices[0, : part.counts[0]]], minlength=classes) / 400
    variance = (1 / k) * (1 - 1 / k) / (k * alpha + 1)
    assert abs(share.mean() - 1 / k) < 5 * np.sqrt(variance / classes)
    square = (share - 1 / k) ** 2
    assert abs(square.mean() - variance) < 5 * square.std() / np.sqrt(classes)


# --- log-normal -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.2])
def test_lognormal_sizes(sigma):
    # Log sizes of 1000 clients: standard deviation within 5 standard errors (a chance of 6e-7, were
    # the seed not fixed) plus 1 % for rounding and the guaranteed image; skewness near 0.
    counts = partition(np.zeros(1_000_000, int), 1000, "lognormal", 0, size_sigma=sigma).counts
    logs = np.log(counts)
    assert abs(logs.std(ddof=1) - sigma) < 5 * sigma / np.sqrt(2 * 999) + 0.01 * sigma
    skewness = np.mean(((logs - logs.mean()) / logs.std()) ** 3)
    assert abs(skewness) < 5 * np.sqrt(6 / 1000)


def test_lognormal_without_spread_is_equal_sizes():
    counts = partition(np.zeros(1003, int), 100, "lognormal", 0, size_sigma=0).counts
    assert counts.max() - counts.min() <= 1


def test_lognormal_labels_are_iid():
    labels = ten_of(1000)
    part = partition(labels, 5, "lognormal", 0, size_sigma=1)
    for client in members(part):
        mix = np.bincount(labels[client], minlength=10) / len(client)
        assert np.abs(mix - 0.1).max() < 5 * np.sqrt(0.09 / len(client))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"how": "shard"}, r"partition='shard'.*did you mean shards"),
        ({"num_clients": 0}, "num_clients=0"),
        ({"num_clients": 101}, "num_clients=101.*100"),
        ({"seed": -1}, "seed=-1"),
        ({"how": "shards", "shards_per_client": 0}, "shards_per_client=0"),
        ({"how": "shards", "shards_per_client": 11}, "shards_per_client=11.*1 to 10"),
        ({"how": "dirichlet", "dirichlet_alpha": 0.0}, "dirichlet_alpha=0.0"),
        ({"how": "dirichlet", "dirichlet_alpha": float("nan")}, "dirichlet_alpha=nan"),
        ({"how": "dirichlet", "dirichlet_alpha": float("inf")}, "dirichlet_alpha=inf"),
        ({"how": "lognormal", "size_sigma": -0.1}, "size_sigma=-0.1"),
        ({"how": "lognormal", "size_sigma": float("nan")}, "size_sigma=nan"),
        ({"seed": None}, "seed=None"),  # which NumPy would take for any seed
        ({"num_clients": 2.5}, "num_clients=2.5"),
        ({"labels": np.zeros((100, 2), int)}, "labels=array.*must be integers"),
        ({"how": "writers", "writers": np.arange(101)}, r"writers=array.*must be integers \[100\]"),
    ],
)
def test_refusals(changes, says):
    arguments = {"labels": ten_of(10), "num_clients": 10, "how": "iid", "seed": 0} | changes
    with pytest.raises(ValueError, match=f"^{says}") as caught:
        partition(**arguments)
    assert "\n" not in str(caught.value)


# --- writers --------------------------------------------------------------------------------------


def test_writers_are_never_divided():
    """Of as many clients as writers each is one; of fewer each is some whole ones."""
    writers = np.random.default_rng(1).integers(100, 112, 300)
    for num_clients in (12, 5):
        part = partition(np.zeros(300, int), num_clients, "writers", 3, writers=writers)
        seen = [set(writers[client]) for client in members(part)]
        assert sum(map(len, seen)) == 12
        assert set().union(*seen) == set(writers)
        assert {len(one) for one in seen} == ({1} if num_clients == 12 else {2, 3})


def test_writers_that_are_not_there():
    with pytest.raises(ValueError, match=r"^partition='writers': the data set does not say who"):
        partition(ten_of(5), 3, "writers", 0)
    with pytest.raises(ValueError, match=r"^num_clients=4: must be 1 to 3, the writers of the"):
        partition(ten_of(3), 4, "writers", 0, writers=np.arange(30) % 3)
