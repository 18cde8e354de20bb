"""The probe of a real model: what calibrators are told is what the noised model itself says."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from noisefl import Config, models, noise, split
from noisefl.calibrate import Probe
from noisefl.probing import make_probe

MODEL = models.by_name("mlp", 10)
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (50, 28, 28, 1), np.uint8), RNG.integers(0, 10, 50)
SOME = np.array([3, 49, 7, 7, 20, 0, 11])
LAST = Config(noise_layers="last", noise_scale="relative", eval_batch=3)
CASES = {
    "last": LAST,
    "last, absolute": dataclasses.replace(LAST, noise_scale="absolute"),
    "first": dataclasses.replace(LAST, noise_layers="first"),
    "kernel alone": dataclasses.replace(LAST, noise_parameters="kernel"),
}


def probe_of(config: Config, base: Any) -> Probe:
    data: Any = SimpleNamespace(
        validation_images=jnp.asarray(IMAGES), validation_labels=jnp.asarray(LABELS)
    )
    paths = noise.target(MODEL, config)
    return make_probe(MODEL, split.at(MODEL, paths, (28, 28, 1)), base, paths, data, config)


@pytest.fixture(scope="module")
def base() -> Any:
    return MODEL.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]


def told(base: Any, draw: noise.Draw, signed: float, config: Config) -> np.ndarray:
    """Logits of W + signed · ξ, layer by layer in NumPy: the RMS is of each noised layer."""
    copy = jax.tree.map(np.array, base)
    layers: dict[str, list[str]] = {}
    for layer, name in draw:
        layers.setdefault(layer, []).append(name)
    for layer, names in layers.items():
        rms = 1.0
        if config.noise_scale == "relative":
            every = np.concatenate([np.ravel(base[layer][name]) for name in names])
            rms = np.sqrt(np.mean(np.square(every, dtype=np.float64)))
        for name in names:
            copy[layer][name] = copy[layer][name] + signed * rms * np.asarray(draw[layer, name])
    return np.asarray(MODEL.apply({"params": copy}, IMAGES / np.float32(255)))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_noised_model(case, base):
    config = CASES[case]
    probe = probe_of(config, base)
    draw = probe.draw(jax.random.key(5))
    strengths = [1.5, -1.5, 0.0, 0.2]
    wanted = np.stack([told(base, draw, s, config)[SOME] for s in strengths])
    assert np.abs(wanted[0] - wanted[1]).max() > 0.1
    asked = (draw, jnp.asarray(strengths), jnp.asarray(SOME))
    kept = probe.of(jnp.asarray(SOME))
    for logits in (
        probe.logits(*asked),
        jax.jit(probe.logits)(*asked),
        kept(*asked[:2]),
        jax.vmap(probe.logits, (None, 0, None))(draw, asked[1][:, None], asked[2])[:, 0],
    ):
        np.testing.assert_allclose(logits, wanted, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_accuracies_are_those_of_the_noised_model(case, base):
    config = CASES[case]
    probe = probe_of(config, base)
    draw = probe.draw(jax.random.key(6))
    reading = probe.accuracy(draw, jnp.float32(0.7))
    for found, signed in ((reading.plus, 0.7), (reading.minus, -0.7)):
        right = told(base, draw, signed, config).argmax(axis=1) == LABELS
        assert found == pytest.approx(np.mean(right), abs=1e-6)
    assert (reading.evaluations, reading.samples) == (2, 100)


def test_a_dead_copy_has_no_accuracy(base):
    """Wrong on all images, it would hold any cap."""
    dead = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), base)
    probe = probe_of(LAST, dead)
    reading = probe.accuracy(probe.draw(jax.random.key(0)), jnp.float32(1))
    assert np.isnan([reading.plus, reading.minus]).all()
