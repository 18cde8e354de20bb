"""`noise`: where it goes, that it is the noise it claims to be, and that it comes off again."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from scipy import stats

from noisefl import Config, models, noise
from noisefl.config import CHOICES

DISTRIBUTIONS, SCALES = CHOICES["noise_distribution"], CHOICES["noise_scale"]
SIGMAS = 5  # a statistic beyond 5 standard errors has probability 6e-7
P_VALUE = 1e-6


def target(model, layers, parameters="kernel+bias") -> str:
    config = Config(noise_layers=layers, noise_parameters=parameters)
    return " ".join("/".join(path) for path in noise.target(model, config))


@pytest.mark.parametrize(
    ("model", "layers", "parameters", "expected"),
    [
        ("mcmahan", "first", "kernel+bias", "conv1/bias conv1/kernel"),
        ("mcmahan", "first", "kernel", "conv1/kernel"),
        ("mcmahan", "last", "kernel+bias", "dense2/bias dense2/kernel"),
        ("mcmahan", "all", "kernel", "conv1/kernel conv2/kernel dense1/kernel dense2/kernel"),
        ("mlp", "first", "kernel+bias", "dense1/bias dense1/kernel"),
        ("mlp", "last", "kernel", "dense3/kernel"),
        ("mcmahan", "conv2", "kernel+bias", "conv2/bias conv2/kernel"),  # a layer path
        ("mcmahan", "dense.*/kernel", "kernel+bias", "dense1/kernel dense2/kernel"),
        ("mcmahan", r"conv\d", "kernel", "conv1/kernel conv2/kernel"),
        ("mcmahan", "conv1/bias|dense2", "kernel+bias", "conv1/bias dense2/bias dense2/kernel"),
    ],
)
def test_target(model, layers, parameters, expected):
    assert target(models.by_name(model, 10), layers, parameters) == expected


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Conv(2, (3, 3), name="conv")(x))


class Nested(nn.Module):
    """The first convolution is inside a block, after a dense layer, and sorts last."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2, name="embed")(x)
        x = Block(name="z_block")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(3, name="a_head")(x.reshape(x.shape[0], -1))


def test_target_of_a_nested_model():
    assert target(Nested(), "first", "kernel") == "z_block/conv/kernel"
    assert target(Nested(), "last", "kernel") == "a_head/kernel"
    assert target(Nested(), "z_block/.*", "kernel") == "z_block/conv/kernel"
    assert target(Nested(), "norm") == "norm/bias norm/scale"


@pytest.mark.parametrize("pattern", ["conv", "conv3", "kernel", "CONV1", "conv1/kern"])
def test_a_pattern_must_match_a_whole_path(pattern):
    """`conv` matches conv1 in part only."""
    with pytest.raises(ValueError, match=r"^noise_layers=.*conv1, conv2, dense1, dense2$"):
        target(models.McMahanCNN(), pattern)


def test_no_kernel_among_the_matches():
    with pytest.raises(ValueError, match=r"^noise_layers='conv1/bias'"):
        target(models.McMahanCNN(), "conv1/bias", "kernel")


def test_an_invalid_expression():
    with pytest.raises(ValueError, match=r"^noise_layers='conv\(': not a regular expr.*\)$") as e:
        target(models.McMahanCNN(), "conv(")
    assert "\n" not in str(e.value)


# Draws: two leaves of equal size to compare with each other, and one that carries no noise.

PATHS = (("a", "bias"), ("a", "kernel"))
BIG = {
    "a": {"kernel": jnp.zeros((100, 400)), "bias": jnp.zeros(40_000)},
    "b": {"kernel": jnp.zeros((2, 2))},
}


@functools.cache
def big_draw(distribution: str, seed: int = 0) -> dict[tuple[str, ...], np.ndarray]:
    drawn = noise.draw(jax.random.key(seed), BIG, PATHS, distribution)
    return {name: np.asarray(leaf, np.float64) for name, leaf in drawn.items()}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_distribution(distribution):
    """Mean, variance and the whole distribution function, each leaf on its own."""
    reference, kurtosis = {
        "gaussian": (stats.norm(), 3.0),
        "uniform": (stats.uniform(-np.sqrt(3), 2 * np.sqrt(3)), 1.8),
        "laplace": (stats.laplace(scale=np.sqrt(0.5)), 6.0),
    }[distribution]
    drawn = big_draw(distribution)
    assert {name: leaf.shape for name, leaf in drawn.items()} == {
        ("a", "bias"): (40_000,),
        ("a", "kernel"): (100, 400),
    }
    for leaf in drawn.values():
        root_n = np.sqrt(leaf.size)
        assert abs(leaf.mean()) * root_n < SIGMAS
        assert abs(np.mean(leaf**2) - 1) * root_n / np.sqrt(kurtosis - 1) < SIGMAS
        assert stats.kstest(leaf.ravel(), reference.cdf).pvalue > P_VALUE


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_draws_and_leaves_are_independent(distribution):
    first, other = big_draw(distribution), big_draw(distribution, seed=1)
    rows = [leaf.ravel() for drawn in (first, other) for leaf in drawn.values()]
    rows.append(np.roll(rows[0], 1))  # and within a leaf
    correlations = np.corrcoef(rows)[np.triu_indices(len(rows), 1)]
    assert np.max(np.abs(correlations)) * np.sqrt(40_000) < SIGMAS
    again = big_draw.__wrapped__(distribution)
    np.testing.assert_array_equal(first[PATHS[1]], again[PATHS[1]])


def flatten_dict(params) -> dict[noise.Path, Any]:
    return traverse_util.flatten_dict(params)


PARAMS = {
    "conv1": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.array([0.0, 1.0, 2.0])},
    "dense1": {"kernel": jnp.full((4, 2), -0.5), "bias": jnp.zeros(2)},
    "dense2": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
}
ALL = tuple(sorted(flatten_dict(PARAMS)))
TWO = (("conv1", "bias"), ("conv1", "kernel"), ("dense2", "kernel"))


def dyadic(key, params, bits=10):
    """Multiples of 2⁻⁴ below 2⁶: their sums and halves are exact in float32."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    draw = [
        jax.random.randint(k, leaf.shape, -(2**bits), 2**bits) / 16
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return tree.unflatten(draw)


def equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_plus_and_minus_average_to_the_base():
    """Two colluding clients, one of each group: exact where sums are."""
    base = dyadic(jax.random.key(0), PARAMS)
    xi = {path: flatten_dict(dyadic(jax.random.key(1), PARAMS))[path] for path in TWO}
    plus, minus = (noise.apply(base, xi, sign) for sign in (1, -1))
    for path in TWO:
        np.testing.assert_array_equal(flatten_dict(plus)[path], flatten_dict(base)[path] + xi[path])
    equal(jax.tree.map(lambda a, b: (a + b) / 2, plus, minus), base)


def test_noise_touches_nothing_else():
    xi = noise.scaled(
        PARAMS, noise.draw(jax.random.key(0), PARAMS, TWO, "gaussian"), jnp.float32(3), "absolute"
    )
    before, after = flatten_dict(PARAMS), flatten_dict(noise.apply(PARAMS, xi, 1))
    assert set(before) == set(after)
    for path in before:
        changed = np.asarray(before[path] != after[path])
        assert changed.all() if path in TWO else not changed.any(), path


def test_removal_restores_an_untrained_base_bitwise():
    base = jax.tree.map(lambda leaf: leaf / 3, PARAMS)
    drawn = noise.draw(jax.random.key(0), base, TWO, "gaussian")
    xi = noise.scaled(base, drawn, jnp.float32(1e6), "absolute")
    for sign in (1, -1):
        start = noise.apply(base, xi, sign)
        equal(noise.remove(start, start, base), base)
        naive = flatten_dict(noise.apply(start, xi, -sign))
        assert any(np.any(naive[path] != flatten_dict(base)[path]) for path in TWO)


def test_removal_keeps_what_was_learnt():
    base, learnt = dyadic(jax.random.key(0), PARAMS), dyadic(jax.random.key(1), PARAMS)
    xi = {path: flatten_dict(dyadic(jax.random.key(2), PARAMS))[path] for path in TWO}
    start = noise.apply(base, xi, -1)
    trained = jax.tree.map(jnp.add, start, learnt)
    equal(noise.remove(trained, start, base), jax.tree.map(jnp.add, base, learnt))


def test_unit_scale():
    absolute = noise.unit_scale(PARAMS, ALL, "absolute")
    assert {path: float(scale) for path, scale in absolute.items()} == dict.fromkeys(ALL, 1.0)
    relative = noise.unit_scale(PARAMS, ALL, "relative")
    # Squares: conv1 6·4 + 0 + 1 + 4 over 9, dense1 8/4 over 10, dense2 55 + 3 over 9.
    rms = {"conv1": (29 / 9) ** 0.5, "dense1": 0.2**0.5, "dense2": (58 / 9) ** 0.5}
    for path in ALL:
        assert relative[path] == pytest.approx(rms[path[0]], rel=1e-6)
    # Only what carries noise counts: the kernel alone has RMS 2.
    alone = noise.unit_scale(PARAMS, (("conv1", "kernel"),), "relative")
    assert alone == {("conv1", "kernel"): pytest.approx(2.0, rel=1e-6)}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("paths", [TWO[:2], TWO, ALL])
def test_relative_strength(paths, scale):
    """r·(RMS of W) is the RMS of ξ: in closed form for "absolute", and r itself for "relative"."""
    values = np.concatenate([np.ravel(flatten_dict(PARAMS)[path]) for path in paths])
    expected = 0.7 if scale == "relative" else 0.7 / np.sqrt(np.mean(values**2))
    r = noise.relative_strength(PARAMS, paths, scale, jnp.float32(0.7))
    assert (r.shape, r.dtype) == ((), jnp.float32)
    assert r == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_contract(distribution, scale):
    """Linear in the strength, scaled by layer; jit and vmap give what eager calls give."""

    def xi(key, strength):
        drawn = noise.draw(key, PARAMS, TWO, distribution)
        return noise.scaled(PARAMS, drawn, strength, scale)

    keys, strengths = jax.random.split(jax.random.key(0), 3), jnp.array([0.0, 0.5, 3.0])
    mapped = jax.jit(jax.vmap(xi))(keys, strengths)
    assert set(mapped) == set(TWO)
    for lane in range(3):
        drawn = noise.draw(keys[lane], PARAMS, TWO, distribution)
        eager = xi(keys[lane], strengths[lane])
        doubled = xi(keys[lane], 2 * strengths[lane])
        for path in TWO:
            rms = {"conv1": 29 / 9, "dense2": 55 / 6}[path[0]] ** 0.5
            by = rms if scale == "relative" else 1.0
            expected = strengths[lane] * by * drawn[path]
            np.testing.assert_allclose(eager[path], expected, rtol=1e-5)
            np.testing.assert_allclose(mapped[path][lane], eager[path], rtol=1e-5)
            np.testing.assert_array_equal(doubled[path], 2 * eager[path])
            assert np.all(eager[path] == 0) == (lane == 0)
