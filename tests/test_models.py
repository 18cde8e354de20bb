"""`models`: published sizes, `flax.linen` as the reference, one contract over all models."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from noisefl import models
from noisefl.models import MODELS, Conv, Layer, layer_order, max_pool

MNIST = (28, 28, 1)
SMALL = (12, 12, 1)  # the smallest on which LeNet-5 still has something to convolve


def flatten_dict(params) -> dict[tuple[str, ...], Any]:
    return traverse_util.flatten_dict(params)


def shapes(model, image_shape=MNIST) -> dict[str, tuple[int, ...]]:
    images = jnp.zeros((1, *image_shape))
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return {"/".join(path): leaf.shape for path, leaf in flatten_dict(params).items()}


def size(model, layer="") -> int:
    return sum(int(np.prod(s)) for name, s in shapes(model).items() if name.startswith(layer))


@pytest.mark.parametrize(
    ("name", "layer", "parameters"),
    [
        ("mcmahan", "", 1_663_370),  # McMahan et al. 2017, section 3
        ("mcmahan", "conv1/", 832),
        ("lenet5", "", 61_706),
        ("mlp", "", 199_210),  # McMahan et al. 2017, section 3
    ],
)
def test_published_number_of_parameters(name, layer, parameters):
    assert size(models.by_name(name, 10), layer) == parameters


def random_like(key, params, scale=1.0):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten(
        [scale * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("size", "channels"), [(1, 2), (2, 3), (3, 1), (4, 2), (5, 3)])
def test_conv_is_flax_conv(size, channels, padding):
    ours = Conv(3, size, padding)
    theirs = nn.Conv(3, (size, size), padding=padding, precision="highest")
    images = jax.random.normal(jax.random.key(1), (2, 7, 6, channels))
    params = theirs.init(jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), images)) == jax.tree.map(
        jnp.shape, params
    )
    stacked = jax.vmap(lambda key: random_like(key, params))(jax.random.split(jax.random.key(2), 3))

    def value_and_gradients(module):
        def loss(params, images):
            out = module.apply(params, images)
            weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return jnp.sum(out * weights), out

        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        single = gradient(jax.tree.map(lambda leaf: leaf[0], stacked), images)
        return single, jax.vmap(gradient, (0, None))(stacked, images)

    (one, many), (one_flax, many_flax) = (
        jax.jit(lambda module=module: value_and_gradients(module))() for module in (ours, theirs)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), one, one_flax)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), many, many_flax
    )


@pytest.mark.parametrize("shape", [(1, 2, 2, 1), (2, 4, 6, 3), (2, 5, 7, 2), (3, 3, 2, 1)])
def test_max_pool_is_flax_max_pool(shape):
    def theirs(x):
        return nn.max_pool(x, (2, 2), strides=(2, 2))

    # A permutation: no ties, where the gradient of a maximum is a matter of taste.
    x = jax.random.permutation(jax.random.key(0), jnp.arange(np.prod(shape)) - 5.0).reshape(shape)
    np.testing.assert_array_equal(max_pool(x), theirs(x))

    def weighted(pool):
        return lambda x: jnp.sum(pool(x) * jnp.arange(1.0, pool(x).size + 1).reshape(pool(x).shape))

    np.testing.assert_array_equal(jax.grad(weighted(max_pool))(x), jax.grad(weighted(theirs))(x))


@pytest.mark.parametrize("name", MODELS)
def test_contract(name):
    """What every model of the registry keeps; a new one is under it by being registered."""
    model: Any = models.by_name(name, 7)
    images = jax.random.uniform(jax.random.key(0), (5, *SMALL))
    stacked = jax.jit(jax.vmap(lambda key: model.init(key, images)["params"]))(
        jax.random.split(jax.random.key(1), 3)
    )
    first, *others = (jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(3))
    traces = []

    @jax.jit
    def logits(params, images):
        traces.append(None)
        return model.apply({"params": params}, images)

    out = logits(first, images)
    assert (out.shape, out.dtype) == ((5, 7), jnp.float32)
    assert np.all(np.isfinite(out))
    assert not np.allclose(out[0], out[1], rtol=1e-3)  # it looks at the image
    np.testing.assert_allclose(out, model.apply({"params": first}, images), rtol=1e-4, atol=1e-5)

    singles = [out, *(logits(params, images) for params in others)]
    assert len(traces) == 1
    mapped = jax.vmap(logits, (0, None))(stacked, images)
    np.testing.assert_allclose(mapped, singles, rtol=1e-4, atol=1e-5)

    # An image's logits do not depend on the others of its batch.
    np.testing.assert_allclose(logits(first, images[::-1])[::-1], out, rtol=1e-4, atol=1e-5)

    def loss(params):
        return -jnp.mean(jax.nn.log_softmax(model.apply({"params": params}, images))[:, 2])

    for path, gradient in flatten_dict(jax.jit(jax.grad(loss))(first)).items():
        assert np.all(np.isfinite(gradient)), path
        assert np.any(gradient != 0), path


@pytest.mark.parametrize("name", MODELS)
def test_same_key_same_parameters(name):
    model, images = models.by_name(name, 3), jnp.zeros((1, *SMALL))
    init = jax.jit(model.init)
    first, again, other = (init(jax.random.key(seed), images) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), first, again))
    assert not jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), first, other))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mcmahan", "conv1* conv2* dense1 dense2"),
        ("lenet5", "conv1* conv2* dense1 dense2 dense3"),
        ("mlp", "dense1 dense2 dense3"),
    ],
)
def test_layers_of_the_models(name, expected):
    found = layer_order(models.by_name(name, 10), MNIST)
    assert " ".join(".".join(path) + "*" * convolution for path, convolution in found) == expected


class Inner(nn.Module):
    def setup(self):
        self.early = nn.Dense(4)
        self.late = nn.Dense(4)

    def __call__(self, x):
        return self.early(nn.relu(self.late(x)))  # called against the order of definition


class Backwards(nn.Module):
    """Its names sort against its call order; one layer is called twice, one has no kernel."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(2, (3, 3), name="z_conv")(x)
        x = nn.LayerNorm(name="y_norm")(x)
        x = Conv(2, 3, name="x_conv")(x).reshape(x.shape[0], -1)
        x = Inner(name="m_inner")(x)
        shared = nn.Dense(4, name="b_shared")
        return nn.Dense(3, name="a_dense")(shared(shared(x)))


def test_layers_are_in_call_order():
    assert layer_order(Backwards(), (4, 4, 1)) == (
        Layer(("z_conv",), True),
        Layer(("x_conv",), True),
        Layer(("m_inner", "late"), False),
        Layer(("m_inner", "early"), False),
        Layer(("b_shared",), False),
        Layer(("a_dense",), False),
    )


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"^model='mcmahn': must be one of .*did you mean mcmahan"):
        models.by_name("mcmahn", 10)
    with pytest.raises(ValueError, match=r"one of lenet5, mcmahan, mlp, two_conv$"):
        models.by_name("", 10)
