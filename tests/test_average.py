"""Averages and server optimizers: a contract of each, over all of them, and their sums by hand."""

import itertools

import example_parts as examples
import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from noisefl import average, server
from noisefl.parts import implementations

RNG = np.random.default_rng(0)
UPDATES = {
    "w": RNG.normal(size=(5, 3, 2)).astype(np.float32),
    "b": RNG.normal(size=(5, 4)).astype(np.float32),
}
MASKS = {name: (RNG.random(leaf.shape) < 0.6).astype(np.float32) for name, leaf in UPDATES.items()}
MASKS["w"][:, 0, 0] = 0  # which nobody held
WEIGHTS = np.array([3, 1, 4, 2, 6], np.float32) / 16


def whole(rule, updates, masks, weights, sizes):
    """The average of clients that come in chunks of these sizes."""
    if rule.gathers:
        return rule.combine(updates, masks, weights)
    first = jax.tree.map(lambda leaf: leaf[0], (updates, masks))
    total, start = rule.empty(*first), 0
    for size in sizes:
        some = jax.tree.map(lambda leaf, a=start, n=size: leaf[a : a + n], (updates, masks))
        total = rule.add(total, *some, weights[start : start + size])
        start += size
    return rule.finish(total)


AVERAGES = [*filter(fed.ours, implementations(average.Average)), examples.Median]


@pytest.mark.parametrize("cls", AVERAGES)
@pytest.mark.parametrize("masks", [None, MASKS], ids=["whole", "masked"])
def test_contract(cls, masks):
    """Any average: chunks and their order do not matter, jit is eager, what nobody held is 0."""
    rule = cls()
    if masks is not None and cls is examples.Median:
        pytest.skip("knows no masks")
    given = jax.tree.map(jnp.asarray, (UPDATES, masks, WEIGHTS))
    found = whole(rule, *given, (5,))  # pyright: ignore
    order = np.array([4, 2, 0, 1, 3])
    mixed = jax.tree.map(lambda leaf: leaf[order], given)
    others = [whole(rule, *given, sizes) for sizes in ((1, 1, 1, 1, 1), (2, 3), (4, 1))]  # pyright: ignore
    others += [whole(rule, *mixed, (5,)), jax.jit(lambda *x: whole(rule, *x, (5,)))(*given)]  # pyright: ignore
    for other in others:
        fed.assert_same(other, found, rtol=1e-5, atol=1e-6)
    same = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), given[0])
    kept = whole(rule, same, None, given[2], (5,))
    fed.assert_same(kept, fed.lane(same, 0), rtol=1e-5)
    if masks is not None:
        assert found["w"][0, 0] == 0


def test_the_mean_is_the_weighted_sum():
    found = whole(average.Mean(), UPDATES, None, WEIGHTS, (2, 3))
    for name, leaf in UPDATES.items():
        expected = sum(p * one for p, one in zip(WEIGHTS, leaf, strict=True))
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-7)


def test_a_masked_mean_is_over_those_who_held_the_coordinate():
    found = whole(average.Mean(), UPDATES, MASKS, WEIGHTS, (5,))
    for name, leaf in UPDATES.items():
        for at in itertools.product(*map(range, leaf.shape[1:])):
            held = MASKS[name][(slice(None), *at)] * WEIGHTS
            values = leaf[(slice(None), *at)]
            expected = np.dot(held, values) / held.sum() if held.sum() else 0
            assert found[name][at] == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("cls", [*filter(fed.ours, implementations(server.Server))])
def test_servers_go_along_the_update(cls):
    """Any server optimizer: no update changes nothing, jit is eager, W moves along the update."""
    rule, base = cls(), {"w": jnp.array([1.0, -2.0, 3.0])}
    nothing, state = rule.step(base, {"w": jnp.zeros(3)}, rule.init(base))
    np.testing.assert_array_equal(nothing["w"], base["w"])
    update = {"w": jnp.array([0.5, -0.25, 0.0])}
    eager = rule.step(base, update, state)
    fed.assert_same(jax.jit(rule.step)(base, update, state), eager, rtol=1e-6)
    moved = np.asarray(eager[0]["w"] - base["w"])
    assert np.all(np.sign(moved) == np.sign(update["w"]))


def test_a_rate_of_one_is_the_source_and_the_rate_is_a_factor():
    base, update = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([0.5, 0.125])}
    for rate in (1.0, 0.5):
        rule = server.SGD(rate)
        new, _ = rule.step(base, update, rule.init(base))
        np.testing.assert_array_equal(new["w"], base["w"] + rate * update["w"])


def test_fedadam_is_the_numpy_loop():
    rule = server.Optax(optax.adam, {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-3})
    rng = np.random.default_rng(1)
    base = {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}
    w, m, v = np.asarray(base["w"], np.float64), np.zeros(3), np.zeros(3)
    state = rule.init(base)
    for t in range(1, 6):
        update = rng.normal(size=3)
        base, state = rule.step(base, {"w": jnp.asarray(update, jnp.float32)}, state)
        m, v = 0.9 * m + 0.1 * update, 0.99 * v + 0.01 * update**2
        w = w + 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-3)
        np.testing.assert_allclose(base["w"], w, rtol=1e-4)
