"""`augmentation`: statistics of flips and shifts, keys, and what no augmentation may do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from noisefl import keys, local, models
from noisefl.augmentation import Augmentation, FlipCrop, Plain
from noisefl.optimizers import SGD
from noisefl.parts import implementations

RNG = np.random.default_rng(4)
IMAGES = jnp.asarray(RNG.integers(1, 256, (6, 5, 7, 2)).astype(np.uint8))


@pytest.mark.parametrize("cls", implementations(Augmentation))
def test_contract(cls):
    """Same shape and type; the key decides; an image depends on no other; jit and vmap."""
    made, key = cls(), keys.root(1)
    out = jax.jit(made.change)(key, IMAGES)
    assert (out.shape, out.dtype) == (IMAGES.shape, jnp.uint8)
    np.testing.assert_array_equal(out, made.change(key, IMAGES))
    others = [made.change(keys.root(seed), IMAGES) for seed in range(2, 5)]
    assert cls.identity == all(np.array_equal(out, other) for other in others)
    changed = IMAGES.at[3].set(0)
    np.testing.assert_array_equal(
        np.delete(made.change(key, changed), 3, axis=0), np.delete(out, 3, axis=0)
    )
    lanes = jax.vmap(lambda k: made.change(k, IMAGES))(jnp.stack([key, keys.root(2)]))
    np.testing.assert_array_equal(lanes[0], out)


def shifted(image, row, column):
    """By a loop over pixels."""
    out = np.zeros_like(image)
    for r, c in np.ndindex(image.shape[:2]):
        if 0 <= r + row < image.shape[0] and 0 <= c + column < image.shape[1]:
            out[r, c] = image[r + row, c + column]
    return out


def test_every_flip_and_every_shift_is_equally_likely():
    """Of 4,000 draws each, by chi-square; false alarm 1e-6 a question. A new number compiles
    nothing."""
    image = np.asarray(IMAGES[0])
    known = {
        shifted(side, row, column).tobytes(): (number, row, column)
        for number, side in enumerate((image, image[:, ::-1]))
        for row in range(-2, 3)
        for column in range(-2, 3)
    }
    assert len(known) == 50
    change = jax.jit(lambda made, key: made.change(key, jnp.stack([image] * 4000)))

    def counted(flip, shift, seed):
        out = np.asarray(change(FlipCrop(flip=flip, shift=shift), keys.root(seed)))
        found = [known[one.tobytes()] for one in out]
        return np.array([found.count(place) for place in known.values()]).reshape(2, 5, 5)

    seen = counted(0.5, 2, 1)
    assert stats.chisquare(seen.ravel()).pvalue > 1e-6
    seen = counted(0.25, 1, 2)
    inner = seen[:, 1:4, 1:4]
    assert inner.sum() == 4000
    share = np.array([0.75, 0.25])[:, None, None] * np.ones((3, 3)) / 9
    assert stats.chisquare(inner.ravel(), 4000 * share.ravel()).pvalue > 1e-6
    assert counted(0.0, 0, 3)[0, 2, 2] == 4000
    assert counted(1.0, 0, 4)[1, 2, 2] == 4000
    cached: Any = change
    assert cached._cache_size() == 1


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"^flip=1.5: must be a number, at least 0 and at most 1$"):
        FlipCrop(flip=1.5)
    with pytest.raises(ValueError, match=r"^shift=-1: must be a whole number, at least 0"):
        FlipCrop(shift=-1)


def test_local_training_sees_other_images_in_every_step():
    """With one image and one label, steps of plain descent on it differ by its shift alone; at
    probability 0 and shift 0 training is what it is without."""
    labels, rows = jnp.zeros(6, jnp.int32), jnp.zeros(4, jnp.int32)
    own = local.Own(IMAGES, labels, rows, jnp.int32(4))

    def init(key, images):
        return {"w": jnp.zeros((70, 3))}

    model = models.functions((init, lambda p, x: x.reshape(x.shape[0], -1) @ p["w"]))

    def trained(augmentation, seed=0):
        made = local.Training(SGD(0.1), batch_size=1, augmentation=augmentation)
        return np.asarray(
            made.train(keys.root(seed), jnp.int32(1), model, init(None, None), own, "step")["w"]
        )

    plain = trained(Plain())
    np.testing.assert_array_equal(trained(FlipCrop(flip=0.0, shift=0)), plain)
    moved = trained(FlipCrop(flip=0.0, shift=2))
    assert np.any(moved != plain)
    np.testing.assert_array_equal(moved, trained(FlipCrop(flip=0.0, shift=2)))
    assert np.any(moved != trained(FlipCrop(flip=0.0, shift=2), seed=1))
    # Of one step each gradient is of rank one, a shifted image; of four equal ones so would be
    # their sum.
    for_class = moved.reshape(5, 7, 2, 3)[..., 0]
    assert len({*np.flatnonzero(for_class.ravel())}) > np.count_nonzero(IMAGES[0]) - 30
    assert np.linalg.matrix_rank(np.stack([plain[:, 0], moved[:, 0]]), tol=1e-4) == 2
