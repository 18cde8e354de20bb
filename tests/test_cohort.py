"""Who takes part; and `mapped`: one average however clients are mapped, over devices as well."""

import math

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from noisefl import average, cohort
from noisefl.parts import implementations, part

DEVICES = "devices"


@part
class Gather(average.Average):
    """Gives back all it was given, weights included; no average, so no contract is for it."""

    abstract = True
    gathers = True

    def combine(self, updates, masks, weights):
        return updates, weights


def work(k: jax.Array, sign: jax.Array) -> tuple[tuple[dict, None], jax.Array, jax.Array]:
    """A made-up client: an update, a score and something seen that tell who it was."""
    update = {"w": sign * jnp.array([1.0, 2.0]) * k, "b": jnp.float32(k) ** 2}
    return (update, None), 10 * k + sign, jnp.stack([k, -k])


def clients(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(size)
    signs = np.where(np.arange(size) < size / 2, 1.0, -1.0).astype(np.float32)
    return rng.permutation(size) + 3, signs, rng.uniform(0.1, 1, size).astype(np.float32)


@pytest.mark.parametrize("rule", [average.Mean(), Gather()], ids=["added up", "gathered"])
@pytest.mark.parametrize(
    ("size", "devices", "at_once"), [(7, 0, 1), (7, 0, 3), (7, 0, 99), (7, 3, 2), (2, 4, 1)]
)
def test_every_client_counts_once_in_its_place(size, devices, at_once, rule):
    """Seven clients on three devices are three each, and two on four leave some without any."""
    ks, signs, weights = clients(size)
    places = np.full(size, 3)  # of three places the last stays empty
    places[[size - 1, 0]] = 0, 1

    def one(_):
        given = (jnp.asarray(ks), jnp.asarray(signs)), rule, jnp.asarray(weights)
        over = DEVICES if devices else ""
        return cohort.mapped(work, *given, at_once, over, jnp.asarray(places), 3)

    several = jax.vmap(one, axis_name=DEVICES)
    found = jax.jit(several if devices else one)(jnp.arange(max(devices, 1)))
    for device in range(max(devices, 1)):  # all know all of it
        total, scores, seen = fed.lane(found, device) if devices else found
        wanted = [[ks[size - 1], -ks[size - 1]], [ks[0], -ks[0]], [0, 0]]
        np.testing.assert_array_equal(seen, wanted)
        np.testing.assert_array_equal(scores, 10 * ks + signs)
        if rule.gathers:
            np.testing.assert_array_equal(total[0]["b"], np.float32(ks) ** 2)
            np.testing.assert_array_equal(total[1], weights)
        else:
            both = np.array([1.0, 2.0]) * np.sum(weights * signs * ks)
            np.testing.assert_allclose(total["w"], both, rtol=1e-5)
            np.testing.assert_allclose(total["b"], np.sum(weights * np.float32(ks) ** 2), rtol=1e-5)


def test_each_client_trains_once_a_device():
    """Four clients on two devices: each trains two of them, not all."""
    ks, signs, weights = clients(4)
    trained: list[int] = []

    def counted(k: jax.Array, sign: jax.Array) -> tuple[tuple[dict, None], jax.Array, jax.Array]:
        jax.debug.callback(lambda k: trained.append(int(k)), k)
        return work(k, sign)

    def one(_):
        given = (jnp.asarray(ks), jnp.asarray(signs)), average.Mean(), jnp.asarray(weights)
        nowhere = jnp.zeros(4, jnp.int32)
        return cohort.mapped(counted, *given, 1, DEVICES, nowhere, 0)

    jax.jit(jax.vmap(one, axis_name=DEVICES))(jnp.arange(2))
    jax.effects_barrier()
    assert sorted(trained) == sorted(ks.tolist())


# Who takes part.


@pytest.mark.parametrize("cls", [*filter(fed.ours, implementations(cohort.Cohort))])
@pytest.mark.parametrize(
    ("m", "groups", "sizes"),
    [(4, "half", (2, 2)), (5, "half", (3, 2)), (1, "half", (1, 0)), (3, "full", (3, 3))],
)
def test_members_are_distinct_clients_group_by_group(cls, m, groups, sizes):
    who, counts = cls(clients_per_round=m, groups=groups), jnp.arange(10) + 1
    draw = jax.jit(who.draw)
    members = draw(jax.random.key(0), counts)
    fed.assert_same(members, who.draw(jax.random.key(0), counts))
    assert (who.sizes, members.sampled) == (sizes, m)
    assert members.groups.tolist() == [0] * sizes[0] + [1] * sizes[1]
    assert len(set(members.clients.tolist())) == sum(sizes)
    np.testing.assert_array_equal(members.counts, members.clients + 1)
    drawn = {tuple(draw(jax.random.key(seed), counts).clients.tolist()) for seed in range(20)}
    assert len(drawn) > 5


def test_a_population_smaller_than_the_cohort_is_refused():
    with pytest.raises(ValueError, match=r"^clients_per_round=4: needs 8 distinct clients"):
        cohort.Cohort(clients_per_round=4, groups="full").draw(jax.random.key(0), jnp.ones(7))


# Half of them in every round.


@pytest.mark.parametrize(
    ("m", "groups", "first", "population"),
    [
        (4, "half", (1, 1), 11),
        (10, "half", (3, 3), 30),
        (5, "half", (2, 1), 9),  # groups of 3 and 2
        (7, "half", (2, 2), 7),  # a population of exactly the cohort
        (1, "half", (1, 0), 3),
        (2, "half", (1, 1), 2),
        (3, "full", (2, 2), 8),
        (4, "full", (2, 2), 8),
    ],
)
def test_half_of_each_group_is_of_the_same_clients_in_every_round(m, groups, first, population):
    """Clients 0, 1, … are there always, dealt anew over both groups; the others are of the rest."""
    who = cohort.Cohort(clients_per_round=m, groups=groups, participation="always")
    counts, always = jnp.arange(population) + 5, sum(first)
    in_a, in_b = who.sizes
    drawn = jax.jit(jax.vmap(who.draw, in_axes=(0, None)))
    found = drawn(jax.random.split(jax.random.key(1), 250), counts)
    fed.assert_same(fed.lane(found.clients, 3), who.draw(
        jax.random.split(jax.random.key(1), 250)[3], counts).clients)  # fmt: skip
    assert found.clients.dtype == jnp.int32
    assert found.groups.tolist() == [[0] * in_a + [1] * in_b] * 250
    assert found.sampled == m
    dealt = set()
    for clients, own in zip(np.asarray(found.clients), np.asarray(found.counts), strict=True):
        a, b = clients[:in_a], clients[in_a:]
        stay = [*a[: first[0]], *b[: first[1]]]
        assert sorted(stay) == list(range(always))
        others = [*a[first[0] :], *b[first[1] :]]
        assert len(set(others)) == len(others)
        assert all(always <= k < population for k in others)
        assert own.tolist() == (clients + 5).tolist()
        dealt.add(frozenset(a[: first[0]].tolist()))
    if min(first):  # every way of dealing them occurs, which 250 rounds miss once in 10,000
        assert len(dealt) == math.comb(always, first[0])
    if population == in_a + in_b:
        assert {frozenset(row) for row in found.clients.tolist()} == {frozenset(range(population))}


def chi2(counts: np.ndarray, expected: float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_others_are_drawn_with_equal_probability_and_so_are_the_groups():
    """m = 6 of 17: clients 0 to 3 are always there, and one more of 13 comes to either group.

    3,000 rounds: each of 13 is drawn 461.5 times, and its χ² has 12 degrees of freedom (draws of a
    round exclude each other, which narrows it): above 39.1 once in 10,000. Each of four is in
    group a in half of the rounds, with one degree less for what the others leave: above 21.1 as
    rarely.
    """
    who = cohort.Cohort(clients_per_round=6, participation="always")
    ks = jax.random.split(jax.random.key(7), 3000)
    clients = np.asarray(jax.jit(jax.vmap(who.draw, (0, None)))(ks, jnp.ones(17)).clients)
    np.testing.assert_array_equal(np.sort(clients[:, [0, 1, 3, 4]]), [[0, 1, 2, 3]] * 3000)
    others = clients[:, [2, 5]]
    for drawn, expected in ((others, 6000 / 13), (others[:, :1], 3000 / 13)):
        assert chi2(np.bincount(drawn.ravel(), minlength=17)[4:], expected) < 39.1
    in_a = np.bincount(clients[:, :2].ravel(), minlength=4)[:4]
    assert chi2(in_a, 1500) < 21.1
    pairs = np.bincount(clients[:, :2].min(1) * 4 + clients[:, :2].max(1), minlength=16)
    assert chi2(pairs[pairs > 0], 500) < 25.7  # six pairs in a, five degrees
    assert np.count_nonzero(pairs) == 6
    # Who else comes does not depend on how the first are dealt.
    table = np.zeros((4, 13))
    np.add.at(table, (clients[:, 0], others[:, 0] - 4), 1)
    assert chi2(table, 3000 / 52) < 100.0  # 51 degrees: above it less than once in 10,000


def test_who_is_drawn_freely_is_as_likely_as_any_other():
    """4 of 9, 3,000 times: χ² of 8 degrees, above 31.8 once in 10,000."""
    who = cohort.Cohort(clients_per_round=4)
    ks = jax.random.split(jax.random.key(2), 3000)
    clients = np.asarray(jax.jit(jax.vmap(who.draw, (0, None)))(ks, jnp.ones(9)).clients)
    assert chi2(np.bincount(clients.ravel(), minlength=9), 12000 / 9) < 31.8
    for slot in range(4):
        assert chi2(np.bincount(clients[:, slot], minlength=9), 3000 / 9) < 31.8


def test_a_population_smaller_than_the_cohort_is_refused_whoever_is_there_always():
    who = cohort.Cohort(clients_per_round=5, participation="always")
    with pytest.raises(ValueError, match=r"^clients_per_round=5: needs 5 distinct clients"):
        who.draw(jax.random.key(0), jnp.ones(4))


# What is kept of whom.


@pytest.mark.parametrize("at_once", [1, 2, 3, 99])
@pytest.mark.parametrize("places", [[4, 4, 2, 0, 4], [0, 1, 2, 3, 4], [4] * 5, [3, 2, 1, 0, 4]])
def test_what_the_followed_saw_lies_in_their_places(places, at_once):
    """Of five clients up to four are followed; 4 is nowhere, and an empty place holds zeros. What
    fills up the last chunk, a repeat of the first client, leaves no trace."""
    ks, signs, weights = clients(5)
    given = (jnp.asarray(ks), jnp.asarray(signs)), average.Mean(), jnp.asarray(weights)
    total, _, seen = cohort.mapped(work, *given, at_once, "", jnp.asarray(places), 4)
    wanted = np.zeros((4, 2), int)
    for slot, place in enumerate(places):
        if place < 4:
            wanted[place] = ks[slot], -ks[slot]
    np.testing.assert_array_equal(seen, wanted)
    alone, _, _ = cohort.mapped(work, *given, at_once, "", jnp.zeros(5, int), 0)
    fed.assert_same(total, alone)
