"""`blocks`: what its docstring promises of any labels, and statistics of the order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from noisefl.calibrate.blocks import STRATA, Blocks, blocks

UNLIKELY = 1e-6  # chance of a correct library to fail one test of all bounds in it
KEYS = 4000


def shuffled(counts, seed: int = 0) -> np.ndarray:
    """Labels with that many images of each class."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


LABELS = {  # labels, C; few shapes, as each is compiled
    "one image": ([4], 10),
    "two images": ([9, 0], 10),
    "two of a class": ([1, 1], 2),
    "three images": ([2, 0, 2], 3),
    "fewer than strata": (shuffled([2, 0, 1, 3, 1]), 62),
    "one class": ([0] * 20, 1),
    "two classes": (shuffled([20, 20]), 2),
    "nine to one": (shuffled([36, 4]), 2),
    "last class alone": ([1] * 40, 2),
    "three classes": (shuffled([12, 15, 13]), 3),
    "ten classes": (shuffled([18] * 10), 10),
    "ten unequal classes": (shuffled([20, 15, 18, 17, 19, 16, 18, 14, 21, 22]), 10),
    "a heavy class": (shuffled([100, 5, 9, 7, 8, 12, 6, 9, 11, 13]), 10),
    "a rare class": (shuffled([20, 20, 1, 19, 20, 20, 20, 20, 20, 20]), 10),
    "empty classes": (shuffled([0, 40, 0, 0, 30, 30, 0, 0, 80, 0]), 10),
    "first class alone": ([0] * 180, 10),
    "sixty-two": (shuffled([7] * 62), 62),
    "sixty-two unequal": (np.random.default_rng(1).zipf(1.3, 434) % 62, 62),
}
ALONE = ("two classes", "nine to one", "three classes", "ten classes", "ten unequal classes")
MOST = 10**6  # images wanted: more than there are


@functools.cache
def compiled(classes: int, images: int):
    return jax.jit(lambda key, labels: blocks(key, labels, classes, images))


def deal(labels, classes: int, images: int, seed: int = 0) -> Blocks:
    labels = jnp.asarray(labels, jnp.int32)
    return jax.tree.map(np.asarray, compiled(classes, images)(jax.random.key(seed), labels))


def groups(labels, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(images of each stratum, stratum of each class), as a single block's weights tell.

    One block needs one image a stratum, so that it is never of every tenth image; neighbours make
    up a stratum, so that the counts of classes, added up, meet those of strata.
    """
    weights = deal(labels, classes, 1).weights
    held = np.rint(weights * len(labels)).astype(int)
    np.testing.assert_allclose(held / len(labels), weights, rtol=1e-6)
    after = np.cumsum(np.bincount(labels, minlength=classes))
    assert set(np.cumsum(held)) <= {0, *after}, "a class is in two strata"
    return held, np.searchsorted(np.cumsum(held), after)


CASES = [
    (name, images)
    for name, (labels, _) in LABELS.items()
    for images, least in ((1, 0), (35, 180), (MOST, 3))
    if len(labels) >= least
]


@pytest.mark.parametrize(("name", "images"), CASES)
def test_what_is_promised_of_any_labels(name, images):
    labels, classes = np.asarray(LABELS[name][0]), LABELS[name][1]
    size, out = len(labels), deal(labels, classes, images)
    strata = min(STRATA, classes, size)
    most = max(1, min(images, size) // strata)
    assert out.images.shape == (most, strata)
    assert (out.images.dtype, out.weights.dtype) == (np.int32, np.float32)
    assert out.weights.sum() == pytest.approx(1, abs=1e-6)
    assert out.weights.min() >= 0
    assert 0 <= out.images.min() <= out.images.max() < size
    assert 1 <= out.number <= most
    read = out.images[: out.number, out.weights > 0]
    assert len(np.unique(read)) == read.size

    of_strata, of_class = groups(labels, classes)
    held = of_strata
    fewest = held[held > 0].min()
    if fewest < most // 2:  # of every tenth image
        assert out.number == most
        held = np.bincount(np.arange(size) % strata)
        np.testing.assert_allclose(out.weights, held / size, rtol=1e-6)
        expected = np.broadcast_to(np.arange(strata), read.shape)
        np.testing.assert_array_equal(read % strata, expected)
    else:
        assert out.number == min(most, fewest)
        np.testing.assert_allclose(out.weights, held / size, rtol=1e-6)
        expected = np.broadcast_to(np.flatnonzero(held), read.shape)
        np.testing.assert_array_equal(of_class[labels[read]], expected)
    # Strata are classes, or of about a tenth.
    counts = np.bincount(labels, minlength=classes)
    assert np.all(np.abs(of_strata - size / len(of_strata)) <= counts.max())
    if name in ALONE:
        np.testing.assert_array_equal(of_strata, counts)
        np.testing.assert_array_equal(of_class, np.arange(classes))


def test_lanes_of_a_vmap_are_single_deals():
    """Lanes with strata of classes beside one of every tenth image."""
    names = ["ten unequal classes", "a heavy class", "empty classes", "first class alone"]
    many = jnp.asarray([LABELS[name][0] for name in names], jnp.int32)
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    mapped = jax.vmap(compiled(10, 150))(keys, many)
    for lane, labels in enumerate([*many]):
        picked = jax.tree.map(lambda leaf, lane=lane: leaf[lane], mapped)
        jax.tree.map(np.testing.assert_array_equal, picked, deal(labels, 10, 150, lane))
    by_class = np.ptp(np.asarray(mapped.weights), axis=1) > 0
    assert by_class.tolist() == [True, False, True, True]


def many_deals(labels, classes: int, images: int) -> Blocks:
    """KEYS deals of one split."""
    keys = jax.random.split(jax.random.key(3), KEYS)
    out = jax.vmap(compiled(classes, images), (0, None))(keys, jnp.asarray(labels, jnp.int32))
    return jax.tree.map(np.asarray, out)


def equally_likely(outcomes: np.ndarray, kinds: int):
    """Each of so many kinds is as frequent as the others in KEYS independent outcomes."""
    counts = np.unique(outcomes, return_counts=True)[1]
    assert len(outcomes) == KEYS
    assert len(counts) == kinds
    low, high = stats.binom.ppf([UNLIKELY / 1e3, 1 - UNLIKELY / 1e3], KEYS, 1 / kinds)
    assert low <= counts.min() <= counts.max() <= high


def test_each_image_of_a_stratum_is_equally_likely_anywhere():
    counts = [12, 10, 8]
    labels = shuffled(counts)
    images = np.asarray(many_deals(labels, 3, 24).images, np.int64)
    for column, count in enumerate(counts):
        for row in (0, 1, 7):
            assert np.all(labels[images[:, row, column]] == column)
            equally_likely(images[:, row, column], count)
        two = images[:, 0, column] * 100 + images[:, 1, column]  # in order, without replacement
        equally_likely(two, count * (count - 1))
    for column in (0, 1):  # and strata are independent
        both = images[:, 3, column] * 100 + images[:, 3, column + 1]
        equally_likely(both, counts[column] * counts[column + 1])


def test_of_every_second_image_the_order_is_random():
    images = np.asarray(many_deals(LABELS["nine to one"][0], 2, MOST).images, np.int64)
    for row, column in ((0, 0), (0, 1), (19, 1)):
        equally_likely(images[:, row, column], 20)
    first, second = images[:, 4, 0], images[:, 5, 0]  # in one stratum no two are the same
    equally_likely((second - first) % 40, 19)
    equally_likely(images[:, 4, 0] * 40 + images[:, 4, 1], 20 * 20)


@pytest.mark.parametrize("name", ["two classes", "ten classes", "one class"])
def test_a_full_deal_of_equal_strata_is_the_split(name):
    """A row with a NaN logit counts as wrong."""
    labels, classes = np.asarray(LABELS[name][0]), LABELS[name][1]
    logits = np.random.default_rng(4).normal(size=(len(labels), classes)).astype(np.float32)
    logits[::7, 0] = np.nan
    right = (np.argmax(logits, axis=1) == labels) & ~np.isnan(logits[:, 0])
    out = deal(labels, classes, MOST)
    assert out.number == len(out.images)
    order = out.images.reshape(-1)
    accuracy = jax.tree.map(jnp.asarray, out).accuracy(logits[order], labels[order])
    assert accuracy == pytest.approx(right.mean(), abs=1e-6)


@pytest.mark.parametrize("name", ["ten unequal classes", "a heavy class", "a rare class"])
@pytest.mark.parametrize("images", [35, 150])
def test_a_block_has_the_accuracy_of_the_split_as_its_mean(name, images):
    """Where right answers are a matter of the class: all of the odd ones, and 30% of the even."""
    labels, classes = LABELS[name]
    odd = np.asarray(labels) % 2 == 1
    right = odd | (np.random.default_rng(4).random(len(labels)) < 0.3)
    out = many_deals(labels, classes, images)
    shares = np.einsum("ktb,kb->kt", right[out.images], out.weights)[:, : out.number[0]]
    assert np.all(out.number == out.number[0])
    error = shares.std(axis=0) / np.sqrt(KEYS) + 1e-6
    off = np.abs(shares.mean(axis=0) - right.mean()) / error
    assert off.max() < stats.norm.isf(UNLIKELY / 50)
    assert error.max() < 0.01


@pytest.mark.parametrize("cut", [(0, 2), (2, None), (3, 13), (16, None), (17, None), (15, 99)])
def test_slices(cut):
    whole = deal(LABELS["ten unequal classes"][0], 10, MOST)
    assert (len(whole.images), whole.number) == (18, 14)
    start, stop = cut
    part = jax.jit(lambda w: w.slice(start, stop))(whole)
    np.testing.assert_array_equal(part.images, whole.images[start:stop])
    np.testing.assert_array_equal(part.weights, whole.weights)
    assert part.number == len(range(14)[start:stop])
