"""`models`: published sizes, `flax.linen` as the reference, one contract over all models."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

import noisefl
from noisefl import models
from noisefl.models import MODELS, max_pool

MNIST = (28, 28, 1)
SMALL = (12, 12, 1)  # the smallest on which LeNet-5 still has something to convolve


def flatten_dict(params) -> dict[tuple[str, ...], Any]:
    return traverse_util.flatten_dict(params)


def shapes(model, image_shape=MNIST) -> dict[str, tuple[int, ...]]:
    images = jnp.zeros((1, *image_shape))
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return {"/".join(path): leaf.shape for path, leaf in flatten_dict(params).items()}


def size(model, layer="", image_shape=MNIST) -> int:
    found = shapes(model, image_shape).items()
    return sum(int(np.prod(s)) for name, s in found if name.startswith(layer))


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


@pytest.mark.parametrize(
    ("model", "image_shape", "parameters"),
    [
        # MLPerf Tiny (arXiv 2106.07597): 78,666, two running statistics of 240 channels with them.
        (models.ResNet8(), (32, 32, 3), 78_666 - 2 * 240),
        (models.ResNet18(), (32, 32, 3), 11_173_962),  # He et al. 2016, in its form for CIFAR-10
        (models.ResNet18(1000, imagenet=True), (224, 224, 3), 11_689_512),
        (models.VGG11(), (32, 32, 3), 9_231_114),
        # DeiT-Ti (arXiv 2012.12877)
        (models.ViT(1000, 16, 192, 12, 3, 4), (224, 224, 3), 5_717_416),
    ],
    ids=["resnet8", "resnet18", "resnet18_imagenet", "vgg11", "deit_ti"],
)
def test_published_number_of_parameters_elsewhere(model, image_shape, parameters):
    assert size(model, image_shape=image_shape) == parameters


def run(function, *inputs) -> Any:
    return jax.tree.map(np.asarray, jax.jit(function)(*inputs))


@pytest.mark.parametrize("shape", [(1, 2, 2, 1), (2, 4, 6, 3), (2, 5, 7, 2), (3, 3, 2, 1)])
def test_max_pool_is_flax_max_pool(shape):
    def theirs(x):
        return nn.max_pool(x, (2, 2), strides=(2, 2))

    # A permutation: no ties, where the gradient of a maximum is a matter of taste.
    x = np.random.default_rng(0).permutation(np.prod(shape)).astype(np.float32).reshape(shape) - 5

    def both(x):
        outs, pullbacks = zip(*(jax.vjp(pool, x) for pool in (max_pool, theirs)), strict=True)
        g = jnp.arange(1.0, outs[0].size + 1).reshape(outs[0].shape)
        return outs, [pullback(g) for pullback in pullbacks]

    for ours, flax in run(both, x):
        jax.tree.map(np.testing.assert_array_equal, ours, flax)


NARROW: dict[str, dict[str, Any]] = {  # where the size proves nothing
    "resnet8": {"width": 4}, "resnet18": {"width": 4}, "vgg11": {"width": 4},
    "vit": {"width": 16, "depth": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_contract(name):
    """What every model of the registry keeps; a new one is under it by being registered."""
    model: Any = MODELS[name](**{"num_classes": 7, **NARROW.get(name, {})})
    images = np.random.default_rng(0).uniform(size=(5, *SMALL)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1))[np.array([0, 0, 1])]

    def logits(params, images):
        return model.apply({"params": params}, images)

    def loss(params):
        return -jnp.mean(jax.nn.log_softmax(logits(params, images))[:, 2])

    def all_of_it(keys):
        params = jax.vmap(lambda key: model.init(key, images)["params"])(keys)
        inputs = params, jnp.stack([images, images[::-1], images])
        singles = jax.lax.map(lambda x: logits(*x), inputs)
        gradient = jax.grad(loss)(jax.tree.map(lambda leaf: leaf[0], params))
        return params, singles, jax.vmap(logits)(*inputs), gradient

    params, singles, mapped, gradient = run(all_of_it, keys)
    assert (singles.shape, singles.dtype) == ((3, 5, 7), jnp.float32)
    assert np.all(np.isfinite(singles))
    assert not np.allclose(singles[0, 0], singles[0, 1], rtol=1e-3)  # it looks at the image
    np.testing.assert_allclose(mapped, singles, rtol=1e-4, atol=1e-5)
    # An image's logits do not depend on the others of its batch.
    np.testing.assert_allclose(singles[1, ::-1], singles[0], rtol=1e-4, atol=1e-5)
    # The same key, the same parameters; another key, others.
    for path, leaf in flatten_dict(params).items():
        np.testing.assert_array_equal(leaf[0], leaf[1])
        assert path[-1] in ("bias", "scale") or np.any(leaf[0] != leaf[2]), path
    for path, leaf in flatten_dict(gradient).items():
        assert np.all(np.isfinite(leaf)), path
        assert np.any(leaf != 0), path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mcmahan", "conv1* conv2* dense1 dense2"),
        ("lenet5", "conv1* conv2* dense1 dense2 dense3"),
        ("mlp", "dense1 dense2 dense3"),
    ],
)
def test_layers_of_the_models(name, expected):
    found = models.functions(models.by_name(name, 10)).layers(MNIST)
    assert " ".join(".".join(one.path) + "*" * one.convolution for one in found) == expected
    for layer in found:
        assert layer.parameters == ((*layer.path, "bias"), (*layer.path, "kernel"))


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"^model='mcmahn': must be one of .*did you mean mcmahan"):
        models.by_name("mcmahn", 10)
    with pytest.raises(
        ValueError, match=r"one of lenet5, mcmahan, mlp, resnet18, .*, two_conv, vgg11, vit$"
    ):
        models.by_name("", 10)


# `functions`: a model as pure functions


def test_functions_of_a_module():
    model: Any = models.by_name("mlp", 3)
    made = models.functions(model)
    assert made.name == "MLP"
    images = np.random.default_rng(0).uniform(size=(2, *SMALL)).astype(np.float32)

    def all_of_it(key):
        params = model.init(key, images)
        return params["params"], made.init(key, SMALL), model.apply(params, images)

    params, ours, logits = run(all_of_it, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, ours, params)
    np.testing.assert_allclose(run(made.apply, params, images), logits, rtol=1e-5, atol=1e-6)


def init(key, images):
    return {"head": jax.random.normal(key, images.shape[1:3])}


def apply(params, images):
    return jnp.einsum("bhwc,ho->bo", images, params["head"])


def test_functions_of_a_pair():
    made = models.functions((init, apply))
    assert made.written.apply is apply

    def both(key):
        return made.init(key, (4, 6, 1)), init(key, jnp.zeros((1, 4, 6, 1)))

    jax.tree.map(np.testing.assert_array_equal, *run(both, jax.random.key(0)))


@pytest.mark.parametrize(
    ("model", "said"),
    [("lenet5", "str"), ((init,), "tuple"), ((init, apply, init), "tuple"), ((init, 3), "tuple"),
     ([init, apply], "list"), (MODELS["mlp"], "type"), (None, "NoneType")],
)  # fmt: skip
def test_what_is_no_model(model, said):
    with pytest.raises(ValueError, match=rf"^model='{said}': must be a Flax .* \(init, apply\)$"):
        models.functions(model)


def test_normalised_pixels():
    """Each channel less its mean, over its deviation, whatever the model is written in."""
    channels = (0.2, 0.5), (0.1, 2.0)
    plain, made = (models.functions((init, apply), channels=c) for c in (None, channels))
    images = np.random.default_rng(0).uniform(size=(3, 4, 6, 2)).astype(np.float32)
    params = plain.init(jax.random.key(0), (4, 6, 2))
    wanted = apply(
        params, (images - np.array([0.2, 0.5], np.float32)) / np.array([0.1, 2.0], np.float32)
    )
    np.testing.assert_allclose(run(made.apply, params, images), wanted, rtol=1e-5, atol=1e-5)
    assert not np.allclose(run(plain.apply, params, images), wanted)
    assert made.layers((4, 6, 2)) == plain.layers((4, 6, 2))
    experiment = noisefl.Experiment(pixels="normalised")
    with pytest.raises(
        ValueError, match=r"^pixels='normalised': needs the channels: experiment\.n"
    ):
        _ = experiment.functions
    ready = experiment.normalised(noisefl.load("mnist"))
    assert ready.channels == ((0.13066,), (0.308108,))
    assert ready.functions.name == "LeNet5"
