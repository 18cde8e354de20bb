"""Owners against the sums of ALGORITHM.md, written out client by client."""

from typing import Any

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from noisefl import owner
from noisefl.cohort import Members
from noisefl.parts import implementations

COUNTS = np.array([30, 10, 40, 20, 60], np.int32)
MEMBERS = Members(jnp.arange(5), jnp.array([0, 0, 0, 1, 1]), jnp.asarray(COUNTS), 5)


class Judge:
    """A model is as accurate as its first number says."""

    def accuracy(self, params: Any) -> jax.Array:
        return params["w"].reshape(-1)[0]


def update(rule, before, base, protected=True, carry=None, key=0):
    carry = rule.init(before) if carry is None else carry
    judge: Any = Judge()
    return rule.update(
        jax.random.key(key), before, base, MEMBERS, jnp.asarray(COUNTS), jnp.bool_(protected),
        judge, carry,
    )  # fmt: skip


@pytest.mark.parametrize("number", [0, 1, 3, 12])  # 12 are more than K
def test_server_clients_are_the_explicit_sum(number):
    rng = np.random.default_rng(0)
    models, before = rng.normal(size=(5, 3, 2)), rng.normal(size=(3, 2))
    average = np.tensordot(COUNTS / COUNTS.sum(), models, 1)
    held = update(
        owner.ServerClients(str(number)),
        {"w": jnp.asarray(before, jnp.float32)},
        {"w": jnp.asarray(average, jnp.float32)},
    )
    borrowed = np.asarray(held.told["server_counts"])
    assert borrowed.shape == (number,)
    assert set(borrowed.tolist()) <= set(COUNTS.tolist())
    total = COUNTS.sum() + borrowed.sum()
    expected = sum(n / total * w for n, w in zip(COUNTS, models, strict=True))
    expected = expected + sum(n / total * before for n in borrowed)
    np.testing.assert_allclose(held.owner["w"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(held.base["w"], jnp.asarray(average, jnp.float32))
    if number == 0:
        np.testing.assert_array_equal(held.owner["w"], held.base["w"])


@pytest.mark.parametrize(("text", "number"), [
    ("3", 3), ("0", 0), ("m", 9), ("4m", 36), ("m/2", 4), ("3*m/2", 13), (7, 7),
])  # fmt: skip
def test_numbers_of_server_clients(text, number):
    assert owner.ServerClients(text).number(9) == number


@pytest.mark.parametrize("text", ["", "-1", "m/0", "1.5", "mm", "n/2", "99999999999"])
def test_other_numbers_are_refused(text):
    with pytest.raises(ValueError, match=r"^server_clients="):
        owner.ServerClients(text).number(9)


def test_warm_up_gives_the_owner_the_base_even_after_a_nan():
    before, base = {"w": jnp.full(3, jnp.nan)}, {"w": jnp.arange(3.0)}
    np.testing.assert_array_equal(
        update(owner.ServerClients("m"), before, base, protected=False).owner["w"], base["w"]
    )


def test_uniform_counts_are_the_mean():
    rule = owner.ServerClients("3", "uniform")
    borrowed = rule.borrowed(jax.random.key(0), jnp.asarray([1, 2, 4, 4, 4]), 3)
    np.testing.assert_array_equal(borrowed, np.full(3, 3, np.float32))


@pytest.mark.parametrize("protected", [True, False])
def test_keep_best_replaces_only_by_what_is_no_worse(protected):
    """A tie replaces, and a NaN does not."""
    rule = owner.KeepBest(owner.ServerClients("0"))
    kept, carry = {"w": jnp.array([0.7, 0])}, None
    found = ((0.6, 0), (0.7, 2), (0.9, 3), (0.8, 3), (0.9, 5), (jnp.nan, 5))
    for number, (accuracy, expected) in enumerate(found, 1):
        held = update(rule, kept, {"w": jnp.array([accuracy, number])}, protected, carry)
        kept, carry = held.owner, held.carry
        assert kept["w"][1] == (expected if protected else number)


def test_feeds_back_starts_from_the_owner():
    before, base = {"w": jnp.array([2.0])}, {"w": jnp.array([0.0])}
    held = update(owner.FeedsBack(owner.ServerClients("m")), before, base)
    assert 0 < held.owner["w"][0] < 2
    np.testing.assert_array_equal(held.base["w"], held.owner["w"])


@pytest.mark.parametrize("cls", [*filter(fed.ours, implementations(owner.Owner))])
def test_contract(cls):
    """Any owner: jit is eager, shapes stay, equal models stay what they are, lanes are runs."""
    rule, model = cls(), {"w": jnp.linspace(0.1, 0.9, 4)}
    other = {"w": jnp.linspace(0.9, 0.2, 4)}
    eager = update(rule, model, other)
    fed.assert_same(jax.jit(lambda a, b: update(rule, a, b))(model, other), eager, rtol=1e-6)
    assert eager.owner["w"].shape == eager.base["w"].shape == (4,)
    np.testing.assert_allclose(update(rule, model, model).owner["w"], model["w"], rtol=1e-6)
    lanes = jax.vmap(lambda a: update(rule, {"w": a}, other))(jnp.stack([model["w"], other["w"]]))
    np.testing.assert_allclose(lanes.owner["w"][0], eager.owner["w"], rtol=1e-6)
