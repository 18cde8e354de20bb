"""`noise`: where it goes, that it is the noise it claims to be, and that it comes off again."""

from typing import Any

import example_parts as examples
import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from scipy import stats

from noisefl import models, noise
from noisefl.parts import implementations, name_of, specs

DISTRIBUTIONS = {
    name_of(cls): cls()
    for cls in (*filter(fed.ours, implementations(noise.Distribution)), examples.Signs)
}
SCALES = specs(noise.Where)["noise_scale"].choices
SIGMAS = 5  # a statistic beyond 5 standard errors has probability 6e-7
P_VALUE = 1e-6


def target(model, layers, parameters="kernel+bias") -> str:
    where = noise.Where(noise_layers=layers, noise_parameters=parameters)
    shape = (28, 28, 1)
    return " ".join("/".join(path) for path in where.paths(models.functions(model), shape))


def where(distribution: str = "gaussian", scale: str = "absolute") -> noise.Where:
    return noise.Where(noise_distribution=DISTRIBUTIONS[distribution], noise_scale=scale)


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
KNOWN = {
    "gaussian": stats.norm(),
    "uniform": stats.uniform(-np.sqrt(3), 2 * np.sqrt(3)),
    "laplace": stats.laplace(scale=np.sqrt(0.5)),
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_distribution(distribution):
    """Mean, variance and the whole distribution function; leaves, draws, neighbours independent."""
    on = where(distribution)
    draws = [on.draw(jax.random.key(seed), BIG, PATHS) for seed in (0, 1, 0)]
    equal(draws[2], draws[0])
    assert set(draws[0]) == set(PATHS)
    rows = [np.asarray(leaf, np.float64).ravel() for drawn in draws[:2] for leaf in drawn.values()]
    for leaf in rows:
        root_n = np.sqrt(leaf.size)
        error = np.sqrt(max(np.mean(leaf**4) - 1, 0))
        assert abs(leaf.mean()) * root_n < SIGMAS
        assert abs(np.mean(leaf**2) - 1) * root_n <= SIGMAS * error + 1e-3
        if distribution in KNOWN:
            assert stats.kstest(leaf, KNOWN[distribution].cdf).pvalue > P_VALUE
    rows.append(np.roll(rows[0], 1))  # and within a leaf
    # What a scheme with a draw for each client keeps is one key for each parameter.
    keys = on.keys(jax.random.key(0), PATHS)
    equal(on.unit(BIG, keys), draws[0])
    for index in range(3):
        rows += [np.ravel(leaf) for leaf in on.unit(BIG, keys, jnp.int32(index)).values()]
    correlations = np.corrcoef(rows)[np.triu_indices(len(rows), 1)]  # pyright: ignore
    assert np.max(np.abs(correlations)) * np.sqrt(40_000) < SIGMAS


def flatten_dict(params) -> dict[noise.Path, Any]:
    return traverse_util.flatten_dict(params)


PARAMS = {
    "conv1": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.array([0.0, 1.0, 2.0])},
    "dense1": {"kernel": jnp.full((4, 2), -0.5), "bias": jnp.zeros(2)},
    "dense2": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
}
ALL = tuple(sorted(flatten_dict(PARAMS)))
TWO = (("conv1", "bias"), ("conv1", "kernel"), ("dense2", "kernel"))
# Squares: conv1 6·4 + 0 + 1 + 4 over 9, dense1 8/4 over 10, dense2 55 + 3 over 9.
RMS = {"conv1": (29 / 9) ** 0.5, "dense1": 0.2**0.5, "dense2": (58 / 9) ** 0.5}


def equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_copies_carry_the_noise_where_it_is_and_average_to_the_base():
    """Two colluding clients, one of each group: exact where sums are, in multiples of 2⁻⁴."""
    rng = np.random.default_rng(0)
    base, drawn = (
        jax.tree.map(lambda w: jnp.float32(rng.integers(1, 999, w.shape) / 16), PARAMS)
        for _ in range(2)
    )
    xi = {path: flatten_dict(drawn)[path] for path in TWO}
    plus, minus = (noise.apply(base, xi, sign) for sign in (1, -1))
    for path, before in flatten_dict(base).items():
        np.testing.assert_array_equal(flatten_dict(plus)[path], before + xi.get(path, 0))  # pyright: ignore
        np.testing.assert_array_equal(flatten_dict(minus)[path], before - xi.get(path, 0))  # pyright: ignore
    equal(jax.tree.map(lambda a, b: (a + b) / 2, plus, minus), base)


def test_unit_scale():
    """Only what carries noise counts: the first kernel alone has RMS 2."""
    absolute = where().unit_scale(PARAMS, ALL)
    assert {path: float(scale) for path, scale in absolute.items()} == dict.fromkeys(ALL, 1.0)
    relative = where(scale="relative").unit_scale(PARAMS, ALL)
    assert relative == {path: pytest.approx(RMS[path[0]], rel=1e-6) for path in ALL}
    alone = where(scale="relative").unit_scale(PARAMS, (("conv1", "kernel"),))
    assert alone == {("conv1", "kernel"): pytest.approx(2.0, rel=1e-6)}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("paths", [TWO[:2], TWO, ALL])
def test_relative_strength(paths, scale):
    """r·(RMS of W) is the RMS of ξ: in closed form for "absolute", and r itself for "relative"."""
    values = np.concatenate([np.ravel(flatten_dict(PARAMS)[path]) for path in paths])
    expected = 0.7 if scale == "relative" else 0.7 / np.sqrt(np.mean(values**2))
    scales = where(scale=scale).unit_scale(PARAMS, paths)
    deviations = {path: jnp.float32(0.7) * unit for path, unit in scales.items()}
    r = where(scale=scale).relative_strength(PARAMS, deviations)
    assert (r.shape, r.dtype) == ((), jnp.float32)
    assert r == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("distribution", "scale"),
    [("gaussian", "absolute"), *((name, "relative") for name in DISTRIBUTIONS)],
)
def test_noise_is_linear_in_its_strength_and_scaled_by_layer(distribution, scale):
    """And jit and vmap give what eager calls give."""
    on, keys = where(distribution, scale), jax.random.split(jax.random.key(0), 3)

    def xi(key, strength):
        return on.scaled(PARAMS, on.draw(key, PARAMS, ALL), strength)

    mapped = jax.jit(jax.vmap(xi))(keys, jnp.array([0.0, 0.5, 3.0]))
    for lane, strength in enumerate((0.0, 0.5, 3.0)):
        drawn, eager = on.draw(keys[lane], PARAMS, ALL), xi(keys[lane], strength)
        for path in ALL:
            by = RMS[path[0]] if scale == "relative" else 1.0
            np.testing.assert_allclose(eager[path], strength * by * drawn[path], rtol=1e-5)
            np.testing.assert_allclose(mapped[path][lane], eager[path], rtol=1e-5)
