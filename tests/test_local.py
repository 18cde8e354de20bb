"""`local`: the batches a client trains on, and its training against plain NumPy.

The model is softmax regression, whose gradient is a line of NumPy.
"""

import functools

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from noisefl import local, models, optimizers
from noisefl.local import Own
from noisefl.parts import implementations


@functools.cache
def compiled_batches(padded: int, batch: int, epochs: int, order: str):
    training = local.Training(batch_size=batch, local_epochs=epochs, batch_order=order)
    return jax.jit(lambda key, count: training.batches(key, count, padded))


def batches(seed, count, padded, batch, epochs, order):
    drawn = compiled_batches(padded, batch, epochs, order)(jax.random.key(seed), count)
    return map(np.asarray, drawn)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    share=st.floats(0, 1),
    sizes=st.sampled_from([(1, 1), (5, 3), (12, 20), (12, 3)]),
    order=st.sampled_from(["once", "every_epoch"]),
)
def test_each_epoch_is_a_permutation_of_the_clients_samples(seed, share, sizes, order):
    (padded, batch), epochs = sizes, 2
    count, steps = 1 + round(share * (padded - 1)), -(-padded // batch)
    positions, valid = batches(seed, count, padded, batch, epochs, order)
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


def test_keys_decide_the_order_and_epochs_are_split_anew_only_on_demand():
    for order, distinct in (("once", 1), ("every_epoch", 3)):
        positions, _ = batches(0, 12, 12, 4, 3, order)
        assert len({epoch.tobytes() for epoch in positions.reshape(3, -1)}) == distinct
    orders = [next(batches(seed, 12, 12, 4, 3, "once")).tobytes() for seed in (*range(20), 3)]
    assert len(set(orders)) == 20
    assert orders[3] == orders[20]


def test_every_order_is_equally_likely():
    """Chi-square over the 24 orders of 4 samples; false alarm 1e-6."""
    keys = jax.random.split(jax.random.key(0), 6000)
    positions, _ = jax.vmap(lambda key: compiled_batches(5, 3, 1, "once")(key, 4))(keys)
    orders = np.asarray(positions).reshape(6000, -1)[:, :4] @ [64, 16, 4, 1]
    _, observed = np.unique(orders, return_counts=True)
    assert len(observed) == 24
    assert stats.chisquare(observed).pvalue > 1e-6


# Training.

CLASSES, SIZE = 3, 11
RNG = np.random.default_rng(2)
IMAGES = RNG.integers(1, 256, (SIZE, 2, 2, 1)).astype(np.uint8)
LABELS = RNG.integers(0, CLASSES, SIZE).astype(np.int32)
PARAMS = {
    "w": RNG.normal(size=(4, CLASSES)).astype(np.float32),
    "b": RNG.normal(size=CLASSES).astype(np.float32),
}
# Which of a step's four slots are valid: ragged ends, holes, several epochs, nothing at all.
PATTERNS = {
    "full": [[1, 1, 1, 1]] * 3,
    "ragged end": [[1, 1, 1, 1], [1, 1, 1, 0]],
    "hole": [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
    "epochs": [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]] * 2,
    "late": [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]],
    "one": [[0, 0, 1, 0]],
    "none": [[0, 0, 0, 0]],
}
VALID = np.stack([np.pad(p, ((0, 6 - len(p)), (0, 0))) for p in PATTERNS.values()]).astype(bool)
SAMPLES = RNG.integers(0, SIZE, VALID.shape).astype(np.int32)  # [patterns, S, B]
STEPS = VALID.any(2).sum(1)


def apply(params, images):
    return images.reshape(images.shape[0], -1) @ params["w"] + params["b"]


def own(rows=None) -> Own:
    rows = jnp.arange(SIZE) if rows is None else jnp.asarray(rows)
    return Own(jnp.asarray(IMAGES), jnp.asarray(LABELS), rows, jnp.int32(len(rows)))


def functions(apply) -> models.Functions:
    return models.functions((lambda key, images: PARAMS, apply))


MODEL, STEPS_KEY = functions(apply), jax.random.key(1)


def descend(rule, samples, valid, gather="step", model=MODEL):
    optimizer = rule.transformation(jnp.int32(1))
    return local.descend(STEPS_KEY, model, optimizer, PARAMS, own(), samples, valid, gather)


single = jax.jit(descend, static_argnames=("gather", "model"))
lanes = jax.jit(
    lambda rule, samples, valid, gather="step", model=MODEL: jax.vmap(
        lambda s, v: descend(rule, s, v, gather, model)
    )(samples, valid),
    static_argnames=("gather", "model"),
)


def gradient(params, batch):
    x = IMAGES[batch].reshape(len(batch), -1) / 255.0
    logits = x @ params["w"] + params["b"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    error = (p / p.sum(1, keepdims=True) - np.eye(CLASSES)[LABELS[batch]]) / len(batch)
    return {"w": x.T @ error, "b": error.sum(0)}


def naive(samples, valid, rate=0.5, momentum=0.0, clip=np.inf):
    """Heavy-ball descent in float64, over the steps that have a valid sample and no others."""
    params = {name: x.astype(np.float64) for name, x in PARAMS.items()}
    buffer = {name: np.zeros_like(x) for name, x in params.items()}
    for batch in (row[mask] for row, mask in zip(samples, valid, strict=True) if mask.any()):
        found = gradient(params, batch)
        norm = np.sqrt(sum(np.sum(g**2) for g in found.values()))
        for name in params:
            buffer[name] = momentum * buffer[name] + found[name] * min(1, clip / norm)
            params[name] = params[name] - rate * buffer[name]
    return params


def close(ours, theirs):
    for name, wanted in theirs.items():
        np.testing.assert_allclose(ours[name], wanted, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("gather", ["step", "client"])
def test_training_is_the_numpy_loop_over_the_steps_with_data(gather):
    """Alone, and side by side, where the loop goes on for the longest lane."""
    seen = []
    for momentum, clip in ((0.0, 1e6), (0.9, 1e6), (0.0, 0.1), (0.5, 0.2)):
        rule = optimizers.SGD(0.5, momentum=momentum, clip_norm=clip)
        mapped = lanes(rule, SAMPLES, VALID, gather)
        for number in range(len(PATTERNS)):
            wanted = naive(SAMPLES[number], VALID[number], 0.5, momentum, clip)
            alone = single(rule, SAMPLES[number], VALID[number], gather)
            close(alone, wanted)
            close(fed.lane(mapped, number), wanted)
            other = single(rule, SAMPLES[number], VALID[number], "step")
            fed.assert_same(alone, other)  # gathering changes no bit
            if not STEPS[number]:
                fed.assert_same(alone, PARAMS)
                fed.assert_same(fed.lane(mapped, number), PARAMS)
        seen.append(mapped["w"][0])
    assert len({np.asarray(w).tobytes() for w in seen}) == 4  # momentum and clipping do bite
    plain = single(optimizers.SGD(0.5), SAMPLES[0], VALID[0], gather)
    close(plain, naive(SAMPLES[0], VALID[0]))


@pytest.mark.parametrize(
    "optimizer", [optax.adam(0.05), optimizers.Optax(optax.adam, {"learning_rate": 0.05})]
)
def test_any_optax_optimizer_is_taken(optimizer):
    """Adam's NumPy loop; its bias correction counts the steps with data alone."""
    rule = local.Training(optimizer=optimizer).optimizer
    for number in (2, 3, 6):
        p = {name: value.astype(np.float64) for name, value in PARAMS.items()}
        m, v, t = dict.fromkeys(p, 0.0), dict.fromkeys(p, 0.0), 0
        for row, mask in zip(SAMPLES[number], VALID[number], strict=True):
            if not mask.any():
                continue
            g, t = gradient(p, row[mask]), t + 1
            for name in p:
                m[name] = 0.9 * m[name] + 0.1 * g[name]
                v[name] = 0.999 * v[name] + 0.001 * g[name] ** 2
                step = (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
                p[name] = p[name] - 0.05 * step
        ours = single(rule, SAMPLES[number], VALID[number])
        for name in p:
            np.testing.assert_allclose(ours[name], p[name], rtol=1e-4, atol=2e-5)


def test_masked_steps_and_slots_change_no_bit_whatever_they_hold():
    rule = optimizers.SGD(0.5, momentum=0.9, clip_norm=1e6)
    some = VALID[2].any(1)
    order = np.concatenate([np.flatnonzero(some), np.flatnonzero(~some)])
    whole = single(rule, SAMPLES[2], VALID[2])
    fed.assert_same(single(rule, SAMPLES[2][order], VALID[2][order]), whole)
    fed.assert_same(single(rule, np.where(VALID[2], SAMPLES[2], 8), VALID[2]), whole)


def test_steps_without_data_are_not_computed():
    """A forward pass of image 0 is NaN, and NaN times a mask of zero still is; and every forward
    pass calls home. Side by side it may be run for a lane that is done, but not be kept."""
    calls = []
    samples = np.where(VALID.any(2, keepdims=True), np.maximum(SAMPLES, 1), 0)

    def poisoned(params, images):
        jax.debug.callback(lambda pixel: calls.append(pixel), images[0, 0, 0, 0])
        is_first = images[:, :1, 0, 0] == IMAGES[0, 0, 0, 0] / 255
        return jnp.where(is_first, jnp.nan, apply(params, images))

    assert np.sum(IMAGES[:, 0, 0, 0] == IMAGES[0, 0, 0, 0]) == 1
    rule, model = optimizers.SGD(0.5), functions(poisoned)
    for number in range(len(PATTERNS)):
        calls.clear()
        close(single(rule, samples[number], VALID[number], "step", model),
              naive(samples[number], VALID[number]))  # fmt: skip
        jax.effects_barrier()
        assert len(calls) == STEPS[number]
    calls.clear()
    mapped = lanes(rule, samples, VALID, "step", model)
    jax.effects_barrier()
    assert len(calls) == STEPS.max() * len(PATTERNS) < VALID.shape[0] * VALID.shape[1]
    for number in range(len(PATTERNS)):
        close(fed.lane(mapped, number), naive(samples[number], VALID[number]))


def test_the_learning_rate_decays_by_round():
    rule, unit = optimizers.SGD(0.5, learning_rate_decay=0.9), {"w": jnp.array([1.0, -2.0])}
    for t in (1, 2, 50):
        optimizer = rule.transformation(jnp.int32(t))
        updates, _ = optimizer.update(unit, optimizer.init(unit))
        expected = -0.5 * 0.9 ** (t - 1) * np.array([1.0, -2.0])
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)  # pyright: ignore


@pytest.mark.parametrize("gather", ["step", "client"])
def test_a_rate_multiplies_every_step(gather):
    """Momentum's too: it is what is added to the parameters that is multiplied."""
    some = jnp.asarray(SAMPLES[0]), jnp.asarray(VALID[0])
    for momentum in (0.0, 0.5):
        half, whole = (optimizers.SGD(learning_rate=x, momentum=momentum) for x in (0.25, 0.5))
        rule = whole.transformation(jnp.int32(1))

        def damped(rate, rule=rule):
            return local.descend(STEPS_KEY, MODEL, rule, PARAMS, own(), *some, gather, rate)

        found = jax.jit(damped)(jnp.float32(0.5))
        fed.assert_same(found, single(half, *some, gather), **fed.CLOSE)


@pytest.mark.parametrize("cls", [*filter(fed.ours, implementations(optimizers.Optimizer))])
@pytest.mark.parametrize("training", [*filter(fed.ours, implementations(local.Training))])
def test_contract_of_training_and_optimizers(training, cls):
    """Reads the client's own rows alone, in its own batches; the key decides; jit is eager."""
    made, rows = training(optimizer=cls(), local_epochs=2, batch_size=2), jnp.array([4, 2, 9, 0, 0])
    assert made.samples(jnp.int32(3)) == 6

    def train(key, rows, images):
        held = fed.replaced(own(rows), count=jnp.int32(3), images=images)
        return made.train(key, jnp.int32(1), MODEL, PARAMS, held, "step")

    images = jnp.asarray(IMAGES)
    found = jax.jit(train)(jax.random.key(0), rows, images)
    fed.assert_same(found, train(jax.random.key(0), rows, images), **fed.CLOSE)
    others = images.at[jnp.array([1, 3, 5, 6, 7, 8, 10])].set(0)
    fed.assert_same(jax.jit(train)(jax.random.key(0), rows, others), found)
    positions, valid = made.batches(jax.random.key(0), jnp.int32(3), 5)
    rule, samples = made.optimizer.transformation(jnp.int32(1)), rows[positions]
    batched = local.descend(STEPS_KEY, MODEL, rule, PARAMS, own(rows), samples, valid)
    fed.assert_same(found, batched, **fed.CLOSE)
