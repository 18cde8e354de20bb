"""Thieves who train from a copy or from answers: closed cases, and NumPy of the test's own."""

import math
from typing import Any

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_nets as nets
from thief_cases import (
    ALL,
    HEAD,
    KEY,
    LINEN,
    OWN,
    W,
    logits,
    moved,
    noise,
    one,
    right,
    short,
    spread,
    steal,
    touching,
    view,
)

from noisefl import attacks, models
from noisefl.attacks import ridge

# A head in closed form.


def plain_ridge(x, y, factor):
    """Float64: a penalty of `factor` mean variances on the kernel, none on the bias."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    penalty = factor * np.mean(x.var(axis=0)) * len(x)
    full = np.concatenate([x, np.ones((len(x), 1))], 1)
    penalties = np.diag([penalty] * x.shape[1] + [0.0])
    found = np.linalg.solve(full.T @ full + penalties, full.T @ y)
    return found[:-1], found[-1]


@pytest.mark.parametrize("factor", [1e-4, 0.1, 100.0])
def test_a_head_is_that_of_the_plain_equations(factor):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 1)) + rng.normal(size=(60, 9)) * 10.0 ** rng.uniform(-1, 1, 9)
    y, valid = rng.normal(size=(60, 3)), np.arange(60) < 50
    wanted = plain_ridge(x[valid], y[valid], factor)
    x[~valid], y[~valid] = np.nan, np.nan
    found = jax.jit(ridge.head)(jnp.float32(x), jnp.float32(y), jnp.asarray(valid), factor)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_head_is_recovered_from_its_logits():
    rng = np.random.default_rng(2)
    x = np.maximum(rng.normal(0.5, 1, (400, 84)), 0) * rng.uniform(0.1, 10, 84)  # as after a ReLU
    x[:, 7] = 0  # a dead unit: whatever is multiplied with it is 0
    kernel, bias = rng.normal(size=(84, 10)), rng.normal(size=10)
    kernel[7] = 0
    y = x @ kernel + bias
    found = jax.jit(ridge.head)(jnp.float32(x), jnp.float32(y), jnp.ones(400, bool), 0.0)
    np.testing.assert_allclose(found[0], kernel, atol=2e-5)
    np.testing.assert_allclose(found[1], bias, atol=2e-4)


def test_ridge_replaces_the_head_alone():
    copy = fed.lane(fed.lane(moved(noise(3), [[1]]), 0), 0)
    stolen = steal(attacks.Ridge(0.1), KEY, one(copy), OWN, LINEN)
    fed.assert_same(stolen["stem"], copy["stem"])
    rows = np.asarray(OWN.rows)[:150]
    x = nets.forward(fed.NET, nets.as_float64(W), np.asarray(OWN.images)[rows])[1][-1]
    y = np.eye(fed.CLASSES)[np.asarray(OWN.labels)[rows]] - 1 / fed.CLASSES
    wanted = plain_ridge(x, y, 0.1)
    np.testing.assert_allclose(stolen["head"]["kernel"], wanted[0], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(stolen["head"]["bias"], wanted[1], rtol=1e-3, atol=1e-5)
    assert right(stolen) > 0.9 > right(copy)


class Convolutions(fed.TinyCNN):
    """Its last layer is a convolution."""

    @fed.nn.compact
    def __call__(self, x):
        return fed.nn.Conv(fed.CLASSES, (3, 3), name="stem")(x).mean((1, 2))


class Unbiased(fed.TinyCNN):
    """A head without bias."""

    @fed.nn.compact
    def __call__(self, x):
        return fed.nn.Dense(fed.CLASSES, use_bias=False, name="head")(x.reshape(x.shape[0], -1))


class Straight(fed.TinyCNN):
    """Nothing lies below its only layer but the images."""

    @fed.nn.compact
    def __call__(self, x):
        return fed.nn.Dense(fed.CLASSES, name="head")(x.reshape(x.shape[0], -1))


def test_ridge_refuses_models_without_a_dense_head():
    for model in ((fed.initial, fed.forward), Straight()):
        attacks.Ridge().fit(models.functions(model), fed.IMAGE)
    for model in (Convolutions(), Unbiased()):
        with pytest.raises(ValueError, match=r"^model='"):
            attacks.Ridge().fit(models.functions(model), fed.IMAGE)
    attacks.Ridge().fit(models.functions(models.LeNet5()), (28, 28, 1))


# Training from one copy.

COPY = fed.lane(fed.lane(moved(noise(3, ALL, 0.3), [[1]]), 0), 0)


def test_the_posterior_lies_between_copy_and_fine_tuning():
    seen = one(COPY, spread=spread(np.full((1, 1), 0.3), ALL))
    settings: dict[str, Any] = {"steps": 60, "batch_size": 16}
    tuned = steal(attacks.FineTune(**settings), KEY, seen, OWN, ALL)

    def gone(width: float) -> float:
        thief = attacks.Posterior(width=width, **settings)
        found = steal(thief, KEY, seen, OWN, ALL)
        moves = jax.tree.map(lambda a, b: float(jnp.sum((a - b) ** 2)), found, COPY)
        if width > 1e4:
            fed.assert_same(found, tuned, rtol=1e-3, atol=1e-4)
        return math.sqrt(sum(jax.tree.leaves(moves)))

    moves = [gone(width) for width in (1e-25, 1e-4, 0.1, 1.0, 1e5, 1e25)]
    assert moves[0] == 0
    assert moves[1] < 1e-3
    assert moves == sorted(moves)


def test_the_posterior_is_the_minimum():
    """Where descent has come to rest, n · gradient of cross-entropy is −(w − copy) / σ²."""
    few = fed.replaced(OWN, count=jnp.int32(12))
    known = {"stem": jnp.float32(0.02), "head": jnp.float32(0.2)}  # two layers, two widths
    sigma = {n: jax.tree.map(lambda _, n=n: known[n].reshape(1, 1), W[n]) for n in W}
    thief = attacks.Posterior(rate=0.05, steps=1500, batch_size=64)
    found = steal(thief, KEY, one(COPY, spread=sigma), few, ALL)
    rows = np.asarray(OWN.rows)[:12]
    pixels, labels = np.asarray(OWN.images)[rows], np.asarray(OWN.labels)[rows]
    _, gradient = nets.loss_and_gradient(fed.NET, nets.as_float64(found), pixels, labels)
    for layer in W:
        there = -(found[layer]["kernel"] - COPY[layer]["kernel"]) / known[layer] ** 2
        wanted = 12 * gradient[layer]["kernel"]
        assert np.linalg.norm(there - wanted) < 0.1 * np.linalg.norm(wanted)


def test_the_posterior_of_unknown_noise_and_of_fixed_layers():
    thief = short(attacks.Posterior)
    layer = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(COPY["head"])])
    sigma = np.sqrt(np.mean(np.float64(layer) ** 2)).reshape(1, 1)
    known = steal(thief, KEY, one(COPY, spread=spread(sigma)), OWN, HEAD)
    unknown = spread(np.full((1, 1), np.nan))
    fed.assert_same(steal(thief, KEY, one(COPY, spread=unknown), OWN, HEAD), known, **fed.CLOSE)
    fixed = steal(thief.replace(rest="fixed"), KEY, one(COPY), OWN, HEAD)
    fed.assert_same(fixed["stem"], COPY["stem"])
    for found in (known["stem"], known["head"], fixed["head"]):
        name = "stem" if found is known["stem"] else "head"
        assert not np.array_equal(found["kernel"], COPY[name]["kernel"])


def test_retrain_leaves_untouched_layers_alone():
    for public, kept, changed in ((HEAD, "stem", "head"), (touching("stem"), "head", "stem")):
        stolen = steal(short(attacks.Retrain), KEY, one(COPY), OWN, public)
        fed.assert_same(stolen[kept], COPY[kept])
        for name in ("kernel", "bias"):
            assert not np.array_equal(stolen[changed][name], COPY[changed][name])
    tuned = steal(short(attacks.FineTune), KEY, one(COPY), OWN, ALL)
    fed.assert_same(steal(short(attacks.Retrain), KEY, one(COPY), OWN, ALL), tuned, **fed.CLOSE)


def test_reinitialise_does_not_read_touched_layers():
    thief = short(attacks.Reinitialise)
    stolen = steal(thief, KEY, one(COPY), OWN, HEAD)
    other = {**COPY, "head": jax.tree.map(lambda leaf: 3 * leaf + 1, COPY["head"])}
    fed.assert_same(steal(thief, KEY, one(other), OWN, HEAD), stolen)
    fed.assert_same(stolen["stem"], COPY["stem"])
    other = {**COPY, "stem": jax.tree.map(lambda leaf: 3 * leaf, COPY["stem"])}
    found = steal(thief, KEY, one(other), OWN, HEAD)
    assert not np.array_equal(found["head"]["kernel"], stolen["head"]["kernel"])


def test_scratch_reads_no_copy():
    thief = short(attacks.Scratch)
    stolen = steal(thief, KEY, one(COPY), OWN, HEAD)
    other = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), COPY)
    fed.assert_same(steal(thief, KEY, one(other), OWN, HEAD), stolen)


def test_recalibrate_scales_and_shifts_channels():
    """Of a model with a parameter more, that belongs to no layer."""

    def start(key, images):
        return {**fed.initial(key, images), "gain": jnp.float32(1.5)}

    model = models.functions((start, lambda p, x: p["gain"] * fed.forward(p, x)))
    copy = {**COPY, "gain": jnp.float32(1.5)}
    known = fed.replaced(
        ALL, functions=model, touched=jax.tree.map(lambda _: jnp.bool_(True), copy)
    )
    seen = one(copy, spread=jax.tree.map(lambda _: jnp.zeros((1, 1)), copy))
    stolen = steal(short(attacks.Recalibrate), KEY, seen, OWN, known)
    fed.assert_same(stolen["gain"], copy["gain"])
    for name in ("stem", "head"):
        channels = copy[name]["kernel"].shape[-1]
        ratio = np.reshape(stolen[name]["kernel"] / copy[name]["kernel"], (-1, channels))
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[0], ratio.shape), rtol=1e-5)
        assert np.sum(ratio[0] != 1) >= 2  # a dead channel's is 1
        assert not np.array_equal(stolen[name]["bias"], copy[name]["bias"])


def test_recalibrate_undoes_scaled_channels():
    scales = jnp.asarray([6.0, 0.1, 0.2, 4.0])
    head = {"kernel": W["head"]["kernel"] * scales, "bias": W["head"]["bias"] + scales}
    copy = {**W, "head": head}
    stolen = steal(attacks.Recalibrate(rate=0.1), KEY, one(copy), OWN, HEAD)
    assert right(stolen) > 0.9 > 0.7 > right(copy)


# Answers of the owner.


def test_questions_are_own_images_and_what_is_made_of_them():
    few = fed.replaced(OWN, count=jnp.int32(9))
    asked = jax.jit(attacks.KnockOff(asked=60).questions)(KEY, few, HEAD)
    assert asked.shape == (60, *fed.IMAGE)
    assert asked.dtype == jnp.uint8
    mine = np.asarray(OWN.images)[np.asarray(OWN.rows)[:9]]
    asked = np.asarray(asked)
    assert sorted(map(bytes, asked[:9])) == sorted(map(bytes, mine))
    wide = np.pad(mine, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = [(row, column) for row in range(5) for column in range(5)]
    shifted = {bytes(w[r : r + 8, c : c + 8].copy()) for w in wide for r, c in places}
    assert all(bytes(image) in shifted for image in asked[10::2])
    assert len({bytes(image) for image in asked[10::2]}) > 15
    for image in asked[9::2].astype(np.int32):
        fits = [
            np.ptp(np.abs(image - np.round(s * a + (1 - s) * b))) <= 1
            and np.abs(image - np.round(s * a + (1 - s) * b)).max() <= 1
            for a in mine.astype(np.float64)
            for b in mine.astype(np.float64)
            for s in [_share(image, a, b)]
        ]
        assert any(fits)
    # No more than half are plain, however many there are.
    many = np.asarray(attacks.KnockOff(asked=60).questions(KEY, OWN, HEAD))
    known = {bytes(image) for image in np.asarray(OWN.images)}
    assert 30 <= sum(bytes(image) in known for image in many) < 40


def _share(image: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """The λ of λ a + (1 − λ) b that fits best."""
    d = (a - b).ravel()
    return float(np.clip((image - b).ravel() @ d / max(d @ d, 1), 0, 1))


def test_knock_off_learns_from_answers_alone():
    thief = attacks.KnockOff(asked=400, steps=150)
    broken = view(moved(noise(3, size=2.0), [[1, 1]]))
    questions = thief.questions(KEY, OWN, HEAD)
    answers = jax.nn.softmax(jnp.float32(logits(W, questions)))
    seen = fed.replaced(broken, questions=questions, answers=answers)
    blind = fed.replaced(OWN, labels=jnp.zeros_like(OWN.labels))
    stolen = steal(thief, KEY, seen, blind, HEAD)
    assert right(stolen) > 0.9 > 0.6 > right(fed.lane(fed.lane(broken.copies, 0), 0))
