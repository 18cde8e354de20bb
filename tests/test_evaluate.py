"""`evaluate` against NumPy's argmax, on sizes that no batch divides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from noisefl import evaluate

PIXELS, CLASSES = 4, 3


def apply(variables, images):
    return images.reshape(images.shape[0], -1) @ variables["params"]["w"]


def problem(size: int):
    rng = np.random.default_rng(size)
    images = rng.integers(0, 256, (size, 2, 2, 1)).astype(np.uint8)
    labels = rng.integers(0, CLASSES, size).astype(np.int32)
    return {"w": rng.normal(size=(PIXELS, CLASSES)).astype(np.float32)}, images, labels


def expected(params, images, labels) -> np.ndarray:
    """Which rows are right, bool [N]."""
    logits = images.reshape(len(images), -1) / 255.0 @ params["w"].astype(np.float64)
    return np.argmax(logits, axis=1) == labels


@pytest.mark.parametrize("size", [1, 7, 12, 50])
@pytest.mark.parametrize("batch", [1, 3, 12, 49, 1000])
def test_is_argmax_for_every_size_and_batch(size, batch):
    params, images, labels = problem(size)
    right = expected(params, images, labels)
    arrays = jnp.asarray(images), jnp.asarray(labels)
    count = evaluate.count_correct(apply, params, *arrays, batch)
    assert (count.dtype, count.shape) == (jnp.int32, ())
    assert count == np.sum(right)
    accuracy = evaluate.accuracy(apply, params, *arrays, batch)
    assert accuracy.dtype == jnp.float32
    assert accuracy == np.float32(np.mean(right))


def test_the_last_rows_count():
    """One right answer, at any place: in a whole batch or in the remainder."""
    for place in range(7):
        images = jnp.zeros((7, 2, 2, 1), jnp.uint8).at[place].set(255)
        params = {"w": jnp.zeros((PIXELS, CLASSES)).at[:, 2].set(1.0)}
        labels = jnp.full(7, 2)  # a black image gives ties, and the first class wins those
        assert evaluate.count_correct(apply, params, images, labels, 3) == 1


def test_no_pass_is_larger_than_the_batch():
    sizes = set()

    def spy(variables, images):
        sizes.add(images.shape[0])
        return apply(variables, images)

    params, images, labels = problem(50)
    evaluate.count_correct(spy, params, jnp.asarray(images), jnp.asarray(labels), 12)
    assert sizes == {12, 2}


def test_a_nan_logit_is_wrong():
    params, images, labels = problem(20)
    right = expected(params, images, labels)
    dark = np.asarray(images)[:, 0, 0, 0] < 100

    def sometimes_nan(variables, images):
        logits = apply(variables, images)
        # One NaN, in a class that is not asked for: argmax alone would return its index or skip it.
        return logits.at[:, 1].set(
            jnp.where(images[:, 0, 0, 0] * 255 < 99.5, jnp.nan, logits[:, 1])
        )

    assert 0 < np.sum(right & ~dark) < np.sum(right)
    arrays = jnp.asarray(images), jnp.asarray(labels)
    assert evaluate.count_correct(sometimes_nan, params, *arrays, 6) == np.sum(right & ~dark)
    dead = {"w": jnp.full((PIXELS, CLASSES), jnp.nan)}
    assert evaluate.count_correct(apply, dead, arrays[0], jnp.zeros(20, int), 6) == 0


def test_composes_with_jit_and_vmap():
    params, images, labels = problem(11)
    arrays = jnp.asarray(images), jnp.asarray(labels)
    stacked = {"w": jnp.stack([params["w"], -params["w"], 0 * params["w"]])}
    mapped = jax.jit(jax.vmap(lambda p: evaluate.count_correct(apply, p, *arrays, 4)))(stacked)
    lanes = [{"w": np.asarray(w)} for w in stacked["w"]]
    assert mapped.tolist() == [int(np.sum(expected(lane, images, labels))) for lane in lanes]


def test_scale_is_a_share_of_white():
    images = jnp.arange(256, dtype=jnp.uint8)
    scaled = evaluate.scale(images)
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(scaled, np.arange(256) / 255.0, rtol=1e-6)
    assert (scaled[0], scaled[255]) == (0, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_is_finite(bad):
    params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"bias": jnp.zeros(3)}}
    assert evaluate.is_finite(params)
    params["b"]["bias"] = params["b"]["bias"].at[2].set(bad)
    assert not evaluate.is_finite(params)
