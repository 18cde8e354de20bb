"""`client.update` on ragged steps: what is skipped is not computed, what is not is NumPy's loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from noisefl import client

CLASSES, BATCH, SIZE = 3, 4, 11
RATE = 0.5
U = 2.0**-24


def apply(variables, images):
    params = variables["params"]
    return images.reshape(images.shape[0], -1) @ params["w"] + params["b"]


def problem():
    rng = np.random.default_rng(2)
    images = rng.integers(1, 256, (SIZE, 2, 2, 1)).astype(np.uint8)
    labels = rng.integers(0, CLASSES, SIZE).astype(np.int32)
    params = {"w": rng.normal(size=(4, CLASSES)), "b": rng.normal(size=CLASSES)}
    return {name: x.astype(np.float32) for name, x in params.items()}, images, labels


def naive(samples, valid, momentum=0.0):
    """Heavy-ball descent in float64, over the steps that have a valid sample and no others."""
    params, images, labels = problem()
    params = {name: x.astype(np.float64) for name, x in params.items()}
    buffer = {name: np.zeros_like(x) for name, x in params.items()}
    for row, mask in zip(samples, valid, strict=True):
        if not mask.any():
            continue
        x = images[row[mask]].reshape(mask.sum(), -1) / 255.0
        logits = x @ params["w"] + params["b"]
        p = np.exp(logits - logits.max(1, keepdims=True))
        error = (p / p.sum(1, keepdims=True) - np.eye(CLASSES)[labels[row[mask]]]) / mask.sum()
        gradient = {"w": x.T @ error, "b": error.sum(0)}
        for name in params:
            buffer[name] = momentum * buffer[name] + gradient[name]
            params[name] = params[name] - RATE * buffer[name]
    return params


# Which of a step's four slots are valid; the samples are drawn below.
PATTERNS: dict[str, list[list[int]]] = {
    "full": [[1, 1, 1, 1]] * 3,
    "ragged end": [[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    "hole": [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
    "epochs": [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]] * 2,
    "late": [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]],
    "one": [[0, 0, 1, 0]],
    "none": [[0, 0, 0, 0]] * 3,
}


def steps(pattern: str) -> tuple[np.ndarray, np.ndarray]:
    valid = np.array(PATTERNS[pattern], bool)
    samples = np.random.default_rng(len(pattern)).integers(0, SIZE, valid.shape)
    return samples.astype(np.int32), valid


def train(optimizer, samples, valid, gather="step", model: Any = apply, lanes=False):
    params, images, labels = problem()
    data = jnp.asarray(images), jnp.asarray(labels)

    def run(samples, valid):
        return client.update(model, optimizer, params, *data, samples, valid, gather)

    trained = jax.jit(jax.vmap(run) if lanes else run)(samples, valid)
    return {name: np.asarray(leaf) for name, leaf in trained.items()}


def stacked() -> tuple[np.ndarray, np.ndarray]:
    """All patterns side by side, with 0 to 4 steps of data, padded to one length."""
    longest = max(map(len, PATTERNS.values()))
    rows = [[np.pad(x, ((0, longest - len(x)), (0, 0))) for x in steps(name)] for name in PATTERNS]
    samples, valid = (np.stack(part) for part in zip(*rows, strict=True))
    assert len({int(v.any(1).sum()) for v in valid}) >= 4
    return samples, valid


def close(ours, theirs, count, momentum):
    """A step's gradient is a sum of at most 4 samples of 4 products, below 1 in size, through a
    softmax: some 40 roundings. Momentum carries each at most 1 / (1 − μ) times, and training on a
    convex loss does not make errors larger: ‖I − η H‖ ≤ 1 as η < 2 / ‖H‖.

    A parameter stays below 8 in size, and is rounded itself once or twice a step.
    """
    room = count * U * (40 * RATE / (1 - momentum) + 2 * 8)
    for name, wanted in theirs.items():
        assert np.max(np.abs(wanted)) < 8
        np.testing.assert_allclose(ours[name], wanted, rtol=0, atol=room)


def same(ours, theirs):
    for name, wanted in theirs.items():
        np.testing.assert_array_equal(ours[name], wanted)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("gather", ["step", "client"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_only_steps_with_data(pattern, gather, momentum):
    samples, valid = steps(pattern)
    trained = train(optax.sgd(RATE, momentum or None), samples, valid, gather)
    close(trained, naive(samples, valid, momentum), int(valid.any(1).sum()), momentum)
    if not valid.any():
        same(trained, problem()[0])


@pytest.mark.parametrize("optimizer", [optax.sgd(RATE, 0.9), optax.adam(0.1)], ids=["sgd", "adam"])
@pytest.mark.parametrize("pattern", ["hole", "epochs", "none"])
def test_gathering_changes_no_bit(pattern, optimizer):
    samples, valid = steps(pattern)
    same(
        train(optimizer, samples, valid, "client"),
        train(optimizer, samples, valid, "step"),
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("gather", ["step", "client"])
def test_lanes_of_different_lengths(gather, momentum):
    """Under vmap the loop goes on for the longest lane; the others must stand still."""
    samples, valid = stacked()
    optimizer = optax.sgd(RATE, momentum or None)
    mapped = train(optimizer, samples, valid, gather, lanes=True)
    for lane, name in enumerate(PATTERNS):
        ours = {key: leaf[lane] for key, leaf in mapped.items()}
        count = int(valid[lane].any(1).sum())
        close(ours, naive(samples[lane], valid[lane], momentum), count, momentum)
        single = train(optimizer, *steps(name), gather)
        # Each is so far from the loop in float64, and they from each other twice as far.
        close(ours, {k: x.astype(np.float64) for k, x in single.items()}, 2 * count, momentum)
        if not count:
            same(ours, problem()[0])


def counter() -> optax.GradientTransformation:
    """Step number t of a client adds t to every parameter, whatever the gradient."""

    def update(updates, state, params=None):
        del params
        state = state + 1
        return jax.tree.map(lambda u: jnp.zeros_like(u) + state, updates), state

    return optax.GradientTransformation(lambda params: jnp.float32(0), update)


@pytest.mark.parametrize("gather", ["step", "client"])
def test_the_optimizers_state_counts_steps_with_data(gather):
    """1 + 2 + … + n of n steps, by closed form: whole numbers, added to zero, are exact."""

    def total(samples, valid):
        data = jnp.zeros((SIZE, 2, 2, 1), jnp.uint8), jnp.zeros(SIZE, jnp.int32)
        zero = {"w": jnp.zeros((4, CLASSES)), "b": jnp.zeros(CLASSES)}
        return client.update(apply, counter(), zero, *data, samples, valid, gather)["b"][0]

    samples, valid = stacked()
    n = valid.any(2).sum(1)
    np.testing.assert_array_equal(jax.jit(jax.vmap(total))(samples, valid), n * (n + 1) / 2)
    for lane in range(len(n)):
        assert jax.jit(total)(samples[lane], valid[lane]) == n[lane] * (n[lane] + 1) / 2


def test_images_of_skipped_steps_may_be_anything():
    """A forward pass of image 0 is NaN, and NaN times a mask of zero still is: none may be run.

    Under vmap it may be run for a lane that is done, but not be kept.
    """
    samples, valid = stacked()
    samples = np.where(valid.any(2, keepdims=True), np.maximum(samples, 1), 0)

    def poisoned(variables, images):
        logits = apply(variables, images)
        return jnp.where(images[:, :1, 0, 0] == problem()[1][0, 0, 0, 0] / 255, jnp.nan, logits)

    assert np.sum(problem()[1][:, 0, 0, 0] == problem()[1][0, 0, 0, 0]) == 1
    mapped = train(optax.sgd(RATE, 0.9), samples, valid, model=poisoned, lanes=True)
    for lane in range(len(samples)):
        wanted = naive(samples[lane], valid[lane], 0.9)
        count = int(valid[lane].any(1).sum())
        single = train(optax.sgd(RATE, 0.9), samples[lane], valid[lane], model=poisoned)
        close(single, wanted, count, 0.9)
        close({name: leaf[lane] for name, leaf in mapped.items()}, wanted, count, 0.9)


@pytest.mark.parametrize("gather", ["step", "client"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_skipped_steps_are_not_computed(pattern, gather):
    """A forward pass that calls home: as often as there are steps with data."""
    samples, valid = steps(pattern)
    calls = []

    def spy(variables, images):
        jax.debug.callback(lambda pixel: calls.append(pixel), images[0, 0, 0, 0])
        return apply(variables, images)

    train(optax.sgd(RATE), samples, valid, gather, spy)
    jax.effects_barrier()
    assert len(calls) == valid.any(1).sum()


def test_no_lane_is_computed_once_all_are_done():
    samples, valid = stacked()
    most = int(valid.any(2).sum(1).max())
    assert most < valid.shape[1]
    calls = []

    def spy(variables, images):
        jax.debug.callback(lambda pixel: calls.append(pixel), images[0, 0, 0, 0])
        return apply(variables, images)

    train(optax.sgd(RATE), samples, valid, model=spy, lanes=True)
    jax.effects_barrier()
    assert len(calls) == most * len(samples)
