"""Who takes part; and `mapped`: one average however clients are mapped, over devices as well."""

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


def work(k: jax.Array, sign: jax.Array) -> tuple[tuple[dict, None], jax.Array]:
    """A made-up client: an update and a score that tell who it was."""
    update = {"w": sign * jnp.array([1.0, 2.0]) * k, "b": jnp.float32(k) ** 2}
    return (update, None), 10 * k + sign


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

    def one(_):
        given = (jnp.asarray(ks), jnp.asarray(signs)), rule, jnp.asarray(weights)
        return cohort.mapped(work, *given, at_once, DEVICES if devices else "")

    several = jax.vmap(one, axis_name=DEVICES)
    found = jax.jit(several if devices else one)(jnp.arange(max(devices, 1)))
    for device in range(max(devices, 1)):  # all know all of it
        total, scores = fed.lane(found, device) if devices else found
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

    def counted(k: jax.Array, sign: jax.Array) -> tuple[tuple[dict, None], jax.Array]:
        jax.debug.callback(lambda k: trained.append(int(k)), k)
        return work(k, sign)

    def one(_):
        given = (jnp.asarray(ks), jnp.asarray(signs)), average.Mean(), jnp.asarray(weights)
        return cohort.mapped(counted, *given, 1, DEVICES)

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
