"""`evaluate` against NumPy's argmax, on sizes that no batch divides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from noisefl import evaluate

PIXELS, CLASSES = 4, 3


def apply(params, images):
    return images.reshape(images.shape[0], -1) @ params["w"]


def problem(size: int):
    rng = np.random.default_rng(size)
    images = rng.integers(0, 256, (size, 2, 2, 1)).astype(np.uint8)
    labels = rng.integers(0, CLASSES, size).astype(np.int32)
    return {"w": rng.normal(size=(PIXELS, CLASSES)).astype(np.float32)}, images, labels


def expected(params, images, labels) -> np.ndarray:
    """Which rows are right, bool [N]."""
    logits = images.reshape(len(images), -1) / 255.0 @ params["w"].astype(np.float64)
    return np.argmax(logits, axis=1) == labels


@pytest.mark.parametrize(
    ("size", "batch"),
    [(1, 1), (1, 1000), (7, 3), (7, 1000), (12, 1), (12, 3), (12, 12), (50, 12), (50, 49)],
)
def test_is_argmax_for_every_size_and_batch(size, batch):
    params, images, labels = problem(size)
    right = expected(params, images, labels)

    @jax.jit
    def both(params, images, labels):
        count = evaluate.count_correct(apply, params, images, labels, batch)
        return count, evaluate.accuracy(apply, params, images, labels, batch)

    count, accuracy = both(params, images, labels)
    assert (count.dtype, count.shape) == (jnp.int32, ())
    assert count == np.sum(right)
    assert accuracy.dtype == jnp.float32
    assert accuracy == np.float32(np.mean(right))


@pytest.mark.parametrize(("size", "devices"), [(1, 2), (7, 2), (12, 3), (13, 5), (3, 4)])
def test_images_split_over_an_axis_are_all_counted_once(size, devices):
    params, *arrays = problem(size)
    right = expected(params, *arrays)
    images, labels = map(jnp.asarray, arrays)

    def one(_):
        accuracy = evaluate.accuracy(apply, params, images, labels, 2, axis="devices")
        return accuracy, evaluate.mine(images, jnp.arange(size), "devices")

    found, (pixels, places) = jax.vmap(one, axis_name="devices")(jnp.arange(devices))
    assert found.tolist() == [np.float32(np.mean(right))] * devices
    filled = places.ravel()
    assert filled[filled >= 0].tolist() == list(range(size))
    assert places.shape == (devices, -(-size // devices))
    np.testing.assert_array_equal(pixels[places >= 0], images)


def test_the_last_rows_count():
    """One right answer, at any place: in a whole batch or in the remainder."""
    params = {"w": jnp.zeros((PIXELS, CLASSES)).at[:, 2].set(1.0)}
    labels = jnp.full(7, 2)  # a black image gives ties, and the first class wins those
    one_white = 255 * jnp.eye(7, dtype=jnp.uint8)[:, :, None, None, None]
    images = jnp.broadcast_to(one_white, (7, 7, 2, 2, 1))
    found = jax.lax.map(lambda x: evaluate.count_correct(apply, params, x, labels, 3), images)
    assert found.tolist() == [1] * 7


def test_batches_of_any_shape_come_back_in_order():
    """Slices of several inputs go together; outputs may have further axes."""
    numbers = jnp.arange(7)
    pairs = jnp.stack([numbers, numbers], axis=1)

    def one(x, y):
        return x[:, None] * y

    found = evaluate.in_batches(one, (numbers, pairs), 3)
    np.testing.assert_array_equal(found, np.arange(7)[:, None] ** 2 * np.ones((1, 2), int))


@pytest.mark.parametrize("size", [23, 100, 1000])
def test_shares_are_the_nearest_float32(size):
    """With vmap and without: 650 of 1000 is not above a cap of 0.65, whoever maps over runs."""
    counts = np.arange(size + 1)
    wanted = (counts / size).astype(np.float32)
    of = lambda count: evaluate.share(count, size)  # noqa: E731
    for mapped in (jax.vmap(of), lambda counts: jax.lax.map(of, counts)):
        np.testing.assert_array_equal(jax.jit(mapped)(counts), wanted)


def test_no_pass_is_larger_than_the_batch():
    sizes = set()

    def spy(params, images):
        sizes.add(images.shape[0])
        return apply(params, images)

    jax.eval_shape(lambda p, x, y: evaluate.count_correct(spy, p, x, y, 12), *problem(50))
    assert sizes == {12, 2}


def test_a_nan_logit_is_wrong():
    params, images, labels = problem(20)
    right = expected(params, images, labels)
    dark = np.asarray(images)[:, 0, 0, 0] < 100

    def sometimes_nan(params, images):
        logits = apply(params, images)
        # One NaN, in a class that is not asked for: argmax alone would return its index or skip it.
        return logits.at[:, 1].set(
            jnp.where(images[:, 0, 0, 0] * 255 < 99.5, jnp.nan, logits[:, 1])
        )

    assert 0 < np.sum(right & ~dark) < np.sum(right)
    count = jax.jit(evaluate.count_correct, static_argnums=(0, 4))
    assert count(sometimes_nan, params, images, labels, 6) == np.sum(right & ~dark)
    dead = {"w": np.full((PIXELS, CLASSES), np.nan, np.float32)}
    assert count(apply, dead, images, np.zeros(20, np.int32), 6) == 0


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


def test_is_finite():
    params = {"a": {"kernel": np.ones((2, 2))}, "b": {"bias": np.zeros(3)}}
    is_finite = jax.jit(evaluate.is_finite)
    assert is_finite(params)
    for bad in (np.nan, np.inf, -np.inf):
        params["b"]["bias"][2] = bad
        assert not is_finite(params)
