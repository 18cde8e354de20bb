"""`client`: the batches a client trains on, and its training against plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from noisefl import Config, Hyper, client
from noisefl.config import as_arrays


@functools.cache
def compiled_batches(padded: int, batch: int, epochs: int, order: str):
    config = Config(batch_size=batch, local_epochs=epochs, batch_order=order)
    return jax.jit(lambda key, count: client.batches(key, count, padded, config))


def batches(seed, count, padded, batch, epochs, order):
    return map(
        np.asarray, compiled_batches(padded, batch, epochs, order)(jax.random.key(seed), count)
    )


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    share=st.floats(0, 1),
    padded=st.sampled_from([1, 5, 12]),
    batch=st.sampled_from([1, 3, 20]),
    epochs=st.just(2),
    order=st.sampled_from(["once", "every_epoch"]),
)
def test_each_epoch_is_a_permutation_of_the_clients_samples(
    seed, share, padded, batch, epochs, order
):
    count = 1 + round(share * (padded - 1))
    positions, valid = batches(seed, count, padded, batch, epochs, order)
    steps = -(-padded // batch)
    assert positions.shape == valid.shape == (epochs * steps, batch)
    assert (positions.dtype, valid.dtype) == (np.int32, np.bool_)
    assert np.all((positions >= 0) & (positions < padded))
    # Full batches first, then the remainder, then nothing: as a list of batches would be.
    mask = (np.arange(steps * batch) < count).reshape(steps, batch)
    for epoch in range(epochs):
        rows = slice(epoch * steps, (epoch + 1) * steps)
        np.testing.assert_array_equal(valid[rows], mask)
        assert sorted(positions[rows][mask]) == list(range(count))
    if order == "once":
        np.testing.assert_array_equal(positions, np.tile(positions[:steps], (epochs, 1)))


def test_epochs_are_split_anew_only_on_demand():
    for order, distinct in (("once", 1), ("every_epoch", 3)):
        positions, _ = batches(0, 12, 12, 4, 3, order)
        assert len({epoch.tobytes() for epoch in positions.reshape(3, -1)}) == distinct


def test_keys_decide_the_order():
    orders = {next(batches(seed, 12, 12, 4, 1, "once")).tobytes() for seed in range(20)}
    assert len(orders) == 20
    again = {next(batches(3, 12, 12, 4, 1, "once")).tobytes() for _ in range(2)}
    assert len(again) == 1


def test_every_order_is_equally_likely():
    """Chi-square over the 24 orders of 4 samples; false alarm 1e-6."""
    keys = jax.random.split(jax.random.key(0), 6000)
    positions, _ = jax.vmap(lambda key: compiled_batches(5, 3, 1, "once")(key, 4))(keys)
    orders = np.asarray(positions).reshape(6000, -1)[:, :4] @ [64, 16, 4, 1]
    _, observed = np.unique(orders, return_counts=True)
    assert len(observed) == 24
    assert stats.chisquare(observed).pvalue > 1e-6


# Training: softmax regression, whose gradient is a line of NumPy.

CLASSES = 3


def apply(variables, images):
    params = variables["params"]
    return images.reshape(images.shape[0], -1) @ params["w"] + params["b"]


def problem(size=9, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, 2, 2, 1)).astype(np.uint8)
    labels = rng.integers(0, CLASSES, size).astype(np.int32)
    params = {"w": rng.normal(size=(4, CLASSES)), "b": rng.normal(size=CLASSES)}
    return {name: value.astype(np.float32) for name, value in params.items()}, images, labels


def numpy_gradient(params, images, labels):
    x = images.reshape(len(images), -1) / 255.0
    logits = x @ params["w"] + params["b"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    error = p / p.sum(1, keepdims=True) - np.eye(CLASSES)[labels]
    return {"w": x.T @ error / len(x), "b": error.mean(0)}


def numpy_training(params, images, labels, batches, rate, momentum=0.0, clip=None):
    """Minibatch SGD with a heavy-ball buffer, each batch a list of its valid samples."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    buffer = {name: np.zeros_like(value) for name, value in params.items()}
    for batch in batches:
        gradient = numpy_gradient(params, images[batch], labels[batch])
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        for name in params:
            g = gradient[name] * (min(1, clip / norm) if clip else 1)
            buffer[name] = momentum * buffer[name] + g
            params[name] = params[name] - rate * buffer[name]
    return params


SAMPLES = np.array([[3, 1, 8], [0, 2, 7], [5, 4, 4], [6, 0, 0]], np.int32)
VALID = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
BATCHES = [row[mask] for row, mask in zip(SAMPLES, VALID, strict=True)]


def train(optimizer, params, samples=SAMPLES, valid=VALID):
    _, images, labels = problem()
    data = jnp.asarray(images), jnp.asarray(labels)
    run = jax.jit(lambda p, s, v: client.update(apply, optimizer, p, *data, s, v))
    return jax.tree.map(np.asarray, run(params, samples, valid))


def close(ours, theirs):
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_one_step_is_the_closed_form():
    params, images, labels = problem()
    trained = train(optax.sgd(0.7), params, SAMPLES[2:3], VALID[2:3])
    gradient = numpy_gradient(params, images[[5, 4]], labels[[5, 4]])
    close(trained, {name: params[name] - 0.7 * gradient[name] for name in params})


@pytest.mark.parametrize(
    ("momentum", "clip"), [(None, None), (0.8, None), (None, 0.1), (0.5, 0.2), (0.9, 100.0)]
)
def test_sgd_is_the_numpy_loop(momentum, clip):
    params, images, labels = problem()
    config = Config(momentum=momentum is not None, clipping=clip is not None)
    hyper = Hyper(learning_rate=0.4, momentum=momentum or 0.3, clip_norm=clip or 0.01)
    trained = train(client.sgd(config)(as_arrays(hyper), jnp.int32(1)), params)
    close(trained, numpy_training(params, images, labels, BATCHES, 0.4, momentum or 0.0, clip))
    # Momentum and clipping do bite, or do nothing when switched off.
    plain = numpy_training(params, images, labels, BATCHES, 0.4)
    same = np.allclose(trained["w"], plain["w"], rtol=1e-4)
    assert same == (momentum is None and clip is None)


def test_adam_is_the_numpy_loop():
    params, images, labels = problem()
    p = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in p.items()}
    v = {name: np.zeros_like(value) for name, value in p.items()}
    for t, batch in enumerate(BATCHES, 1):
        g = numpy_gradient(p, images[batch], labels[batch])
        for name in p:
            m[name] = 0.9 * m[name] + 0.1 * g[name]
            v[name] = 0.999 * v[name] + 0.001 * g[name] ** 2
            step = (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
            p[name] = p[name] - 0.05 * step
    ours = train(optax.adam(0.05), params)
    for name in p:
        np.testing.assert_allclose(ours[name], p[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.5), optax.sgd(0.5, 0.9), optax.adam(0.1)])
def test_masked_steps_change_nothing(optimizer):
    """Bitwise, optimizer state included: a pause in the middle would show in what follows."""
    params, _, _ = problem()
    plain = train(optimizer, params)
    rest, nothing = np.array([[1, 2, 3]], np.int32), np.zeros((1, 3), bool)
    padded = train(
        optimizer,
        params,
        np.concatenate([SAMPLES[:2], rest, SAMPLES[2:], rest, rest]),
        np.concatenate([VALID[:2], nothing, VALID[2:], nothing, nothing]),
    )
    for name in plain:
        np.testing.assert_array_equal(padded[name], plain[name])
    idle = train(optimizer, params, rest, nothing)
    for name in params:
        np.testing.assert_array_equal(idle[name], params[name])


def test_what_lies_in_invalid_slots_is_not_read():
    params, _, _ = problem()
    other = np.where(VALID, SAMPLES, 8)
    assert np.any(other != SAMPLES)
    ours, theirs = train(optax.sgd(0.5), params), train(optax.sgd(0.5), params, other)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_the_learning_rate_decays_by_round():
    hyper = as_arrays(Hyper(learning_rate=0.5, learning_rate_decay=0.9))
    gradient = {"w": jnp.array([1.0, -2.0])}
    for t in (1, 2, 3, 50):
        optimizer = client.sgd(Config())(hyper, jnp.int32(t))
        updates, _ = optimizer.update(gradient, optimizer.init(gradient))
        expected = -0.5 * 0.9 ** (t - 1) * np.array([1.0, -2.0])
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)  # pyright: ignore


def test_update_maps_over_clients():
    params, images, labels = problem()
    both = jnp.stack([SAMPLES, SAMPLES[::-1]]), jnp.stack([VALID, VALID[::-1]])
    data = jnp.asarray(images), jnp.asarray(labels)
    mapped = jax.vmap(lambda s, v: client.update(apply, optax.sgd(0.4), params, *data, s, v))(*both)
    for lane, rows in enumerate((BATCHES, BATCHES[::-1])):
        single = {name: leaf[lane] for name, leaf in mapped.items()}
        close(single, numpy_training(params, images, labels, rows, 0.4))
