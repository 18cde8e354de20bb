"""The probe of a real model: what calibrators are told is what the noised model itself says."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from noisefl import models, noise
from noisefl.calibrate import Probe
from noisefl.probing import Copies, Judge

MODEL, SHAPE = models.by_name("mlp", 10), (6, 5, 1)
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (50, *SHAPE), np.uint8), RNG.integers(0, 10, 50)
SOME = np.array([3, 49, 7, 7, 20, 0, 11])
forward = jax.jit(MODEL.apply)
LAST = noise.layers("last", relative=True)
CASES = {
    "last": LAST,
    "first, absolute, kernel alone": noise.Where(noise_parameters="kernel"),
}
SIGNS = (1.0, -1.0, 0.5)  # of three variants


def probe_of(where: noise.Where, base: Any) -> Probe:
    functions = models.functions(MODEL)
    paths = where.paths(functions, SHAPE)
    judge = Judge(functions, SHAPE, jnp.asarray(IMAGES), jnp.asarray(LABELS), 3)

    def copy(draw: Any, strength: jax.Array, variant: jax.Array) -> Any:
        return noise.apply(base, where.scaled(base, draw, strength), jnp.asarray(SIGNS)[variant])

    def draw(key: jax.Array) -> Any:
        return where.draw(key, base, paths)

    return judge.probe(base, Copies(len(SIGNS), "linear", paths, draw, copy))


def told(base: Any, draw: noise.Draw, signed: float, where: noise.Where) -> np.ndarray:
    """Logits of W + signed · ξ, layer by layer in NumPy: the RMS is of each noised layer."""
    copy = jax.tree.map(np.array, base)
    layers: dict[str, list[str]] = {}
    for layer, name in draw:
        layers.setdefault(layer, []).append(name)
    for layer, names in layers.items():
        rms = 1.0
        if where.noise_scale == "relative":
            every = np.concatenate([np.ravel(base[layer][name]) for name in names])
            rms = np.sqrt(np.mean(np.square(every, dtype=np.float64)))
        for name in names:
            copy[layer][name] = copy[layer][name] + signed * rms * np.asarray(draw[layer, name])
    return np.asarray(forward({"params": copy}, IMAGES / np.float32(255)))


@pytest.mark.parametrize("case", CASES)
def test_every_answer_is_that_of_the_noised_model_and_billed(case):
    """With what copies share kept, and without; draws side by side; on all images and on few."""
    where, some = CASES[case], jnp.asarray(SOME)

    @jax.jit
    def asked(key, base):
        probe = probe_of(where, base)
        draw, strength, first = probe.draw(key), jnp.float32(1.5), jnp.bool_(True)
        twice = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), draw)
        answers = [
            probe.accuracy(draw, strength),
            probe.bare(),
            probe.logits_of(twice, strength, some),
        ]
        for shared in (None, probe.below(some)):
            answers += [
                probe.logits(draw, strength, some, shared),
                probe.clean(some, shared),
                probe.look(draw, strength, jnp.int32(1), some, first, shared),
            ]
        return draw, [(found, billed.bill) for found, billed in answers]

    base = MODEL.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))["params"]
    draw, (accuracy, bare, many, *few) = asked(jax.random.key(5), base)
    wanted = np.stack([told(base, draw, 1.5 * sign, where) for sign in SIGNS])
    plain = told(base, draw, 0, where)
    assert np.abs(wanted[0] - wanted[1]).max() > 0.1

    def holds(answer, expected, bill, atol=2e-5):
        found, paid = answer
        np.testing.assert_allclose(found, expected, atol=atol)
        assert (int(paid.tries), int(paid.evaluations), int(paid.samples)) == bill

    for logits, clean, look in (few[:3], few[3:]):
        holds(logits, wanted[:, SOME], (0, 3, 21))
        holds(clean, plain[SOME], (0, 1, 7))
        holds(look, wanted[1, SOME], (0, 1, 7))
    twice = np.stack([told(base, draw, 3.0 * sign, where)[SOME] for sign in SIGNS])
    holds(many, np.stack([wanted[:, SOME], twice]), (0, 6, 42), atol=4e-5)
    holds(accuracy, np.mean(wanted.argmax(-1) == LABELS, axis=1), (1, 3, 150), atol=1e-6)
    holds(bare, np.mean(plain.argmax(-1) == LABELS), (1, 1, 50), atol=1e-6)

    # A dead copy has no accuracy: wrong on all images, it would hold any cap.
    dead = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), base)
    _, ((accuracy, _), (bare, _), *_) = asked(jax.random.key(5), dead)
    assert np.isnan(accuracy).all()
    assert np.isnan(bare)
