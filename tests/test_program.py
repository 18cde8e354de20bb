"""`models.program`: models as users write them, in linen, in nnx and as plain functions.

The reference is the model as it was written, with XLA's own operations; what is lowered is compared
with NumPy in test_lowering.py. One contract runs over all of them and over the library's own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict
from jax import lax
from test_models import NARROW

from noisefl import models, noise
from noisefl.models import MODELS, Layer, Lowering, functions, program

CLASSES = 4
FULL = Lowering(precision="float32", target="cpu")


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
        x = nn.Conv(6, (3, 3), name="z_conv")(x)
        x = nn.LayerNorm(name="y_norm")(x)  # of two channels it would magnify rounding a lot
        x = nn.Conv(2, (3, 3), use_bias=False, name="x_conv")(x).reshape(x.shape[0], -1)
        x = Inner(name="m_inner")(x)
        shared = nn.Dense(4, name="b_shared")
        return nn.Dense(CLASSES, name="a_dense")(shared(shared(x)))


class Strided(nn.Module):
    """Strides, unlike edges, dilation, groups and a residual; other pooling than 2 × 2."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 5), strides=(2, 1), name="strided")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        side = nn.Conv(6, (1, 1), use_bias=False, name="one")(x)
        x = nn.Conv(6, (3, 3), kernel_dilation=2, name="dilated")(x)
        x = nn.Conv(9, (3, 3), feature_group_count=3, name="grouped")(nn.relu(x + side))
        x = nn.Conv(18, (2, 3), feature_group_count=9, padding=((1, 0), (0, 2)), name="deep")(x)
        x = nn.avg_pool(nn.GroupNorm(num_groups=2, name="norm")(nn.gelu(x)), (2, 2), (1, 2))
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


class Attention(nn.Module):
    """Patches, a class token, positions, one block of attention."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), strides=(4, 4), padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, 8)
        token = self.param("token", nn.initializers.normal(0.1), (1, 1, 8))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x += self.param("places", nn.initializers.normal(0.1), (1, x.shape[1], 8))
        x += nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm")(x))
        return nn.Dense(CLASSES, name="head")(x[:, 0])


class Pooled(nn.Module):
    """A convolution whose maxima and itself are read, and one whose pooling is not 2 × 2."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), name="both")(x))
        x = nn.max_pool(x, (2, 2), (2, 2)) + nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.max_pool(jnp.tanh(nn.Conv(5, (2, 2), name="three")(x)), (3, 3), (3, 3))
        return nn.Dense(CLASSES, name="head")(x.reshape(x.shape[0], -1))


class Recurrent(nn.Module):
    """A loop in which a layer is called; a convolution that is transposed; checkpoints."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.remat(nn.Conv)(2, (3, 3), name="first")(x))
        x = nn.ConvTranspose(2, (2, 2), strides=(2, 2), name="up")(x).mean(1)
        scanned: Any = nn.RNN(nn.SimpleCell(4, name="cell"), name="rows")(x)
        return nn.Dense(CLASSES, name="head")(scanned[:, -1])


class Nnx(nnx.Module):
    """McMahan's layers, smaller, in a list: its parameters' paths have numbers in them."""

    def __init__(self, *, rngs: nnx.Rngs, features: int = 3):
        self.convolutions = nnx.List(
            [nnx.Conv(1, features, (5, 5), rngs=rngs), nnx.Conv(features, 4, (3, 3), rngs=rngs)]
        )
        self.head = nnx.Linear(4 * 3 * 3, CLASSES, rngs=rngs)

    def __call__(self, x):
        for convolution in self.convolutions:
            x = nnx.max_pool(nnx.relu(convolution(x)), (2, 2), (2, 2))
        return self.head(x.reshape(x.shape[0], -1))


def flat_init(key, images):
    one, two, three = jax.random.split(key, 3)
    return {
        "w1": jax.random.normal(one, (3, 3, images.shape[-1], 2)) / 3,
        "b1": jnp.zeros(2),
        "gain": jnp.ones(5),
        "u": jax.random.normal(two, (288, 5)) / 20,
        "v": jax.random.normal(three, (5, CLASSES)) / 2,
        "shift": jnp.zeros(CLASSES),
    }


def flat_apply(params, x):
    """Unusual names; images as [B, Ch, H, W]; a kernel that is the product of two."""
    x = lax.conv_general_dilated(
        x.transpose(0, 3, 1, 2), params["w1"].transpose(3, 2, 0, 1), (1, 1), "SAME"
    )
    x = jnp.maximum(x + params["b1"][:, None, None], 0).reshape(x.shape[0], -1)
    return x @ ((params["u"] * params["gain"]) @ params["v"]) + params["shift"]


WRITTEN: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "backwards": (Backwards(), (5, 6, 1)),
    "strided": (Strided(), (11, 9, 3)),
    "attention": (Attention(), (8, 12, 1)),
    "pooled": (Pooled(), (13, 12, 2)),
    "nnx": (Nnx, (12, 12, 1)),
    "nnx_partial": (functools.partial(Nnx, features=2), (12, 12, 1)),
    "nnx_instance": (Nnx(rngs=nnx.Rngs(3)), (12, 12, 1)),
    "pair": ((flat_init, flat_apply), (12, 12, 1)),
    **{
        name: (MODELS[name](**{"num_classes": CLASSES, **fields}), (12, 12, 1))
        for name, fields in NARROW.items()
    },
}


def images_of(shape, batch=3, seed=0) -> Any:
    return np.random.default_rng(seed).uniform(size=(batch, *shape)).astype(np.float32)


def moved(params, seed=1):
    """Other parameters of the same shapes: biases begin at 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: w + rng.normal(size=w.shape, scale=0.1).astype("f4"), params)


DEEP = ("resnet18", "vgg11")  # wide enough for Winograd; half a minute and more to compile
WAYS = [(name, "patches") for name in WRITTEN if name not in DEEP]
WAYS += [pytest.param(name, "auto", marks=pytest.mark.slow) for name in DEEP]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_lowered_is_as_written(name, way):
    """Logits, and gradients by parameters and by images; one model, and two side by side. Sums of
    at most a thousand terms, in some other order: 1e-4 of the largest is room for that."""
    model, shape = WRITTEN[name]
    made = functions(model, Lowering(conv=way, precision="float32", target="cpu"))
    images = images_of(shape)

    def of(apply):
        def loss(params, images):
            logits = apply(params, images)
            return jnp.sum(jnp.sin(logits * jnp.arange(1, CLASSES + 1))), logits

        both = jax.value_and_grad(loss, (0, 1), has_aux=True)
        return lambda params: (apply(params, images), both(params, images))

    @jax.jit
    def found(params):
        many = jax.tree.map(lambda w: jnp.stack([w, 0.9 * w]), params)
        ours = of(made.apply)
        with jax.default_matmul_precision("highest"):
            return ours(params), jax.vmap(ours)(many), of(made.written.apply)(params)

    alone, many, wanted = found(moved(made.init(jax.random.key(0), shape)))

    def close(ours, theirs):
        room = 1e-4 * np.max(np.abs(theirs)) + 1e-5  # that of attention's keys is 0 by theory
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=room)

    assert alone[0].shape == (3, CLASSES)
    jax.tree.map(close, alone, wanted)
    jax.tree.map(close, jax.tree.map(lambda leaf: leaf[0], many), wanted)
    assert not np.allclose(many[0][1], many[0][0], rtol=1e-3)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", WRITTEN)
def test_nothing_slow_is_left(name):
    """No convolution of XLA's, and none of its pooling, in a model or its gradient; none is said to
    be left to it (a warning is an error here)."""
    model, shape = WRITTEN[name]
    made = functions(model, FULL)
    text = str(
        jax.make_jaxpr(jax.grad(lambda p, x: jnp.sum(made.apply(p, x))))(
            made.shapes(shape), jax.ShapeDtypeStruct((3, *shape), jnp.float32)
        )
    )
    assert "dot_general" in text
    for slow in ("conv_general_dilated", "reduce_window", "select_and_scatter"):
        assert slow not in text


def test_what_cannot_be_lowered_is_xlas_and_says_so():
    shape = (6, 5, 1)
    made = functions(Recurrent(), FULL)
    params, images = made.init(jax.random.key(0), shape), images_of(shape)
    with pytest.warns(UserWarning, match="^conv_general_dilated: transposed; it is XLA's own"):
        ours = made.apply(params, images)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(ours, made.written.apply(params, images), rtol=1e-4, atol=1e-6)
    assert [layer.path for layer in made.layers(shape)] == [("first",), ("up",), ("head",)]


def test_a_convolution_and_its_pooling_become_one():
    """Where nothing else reads what comes in between; whatever is added for each channel moves
    behind, and so does ReLU."""
    shape = (12, 12, 1)

    def names(model, shape=shape):
        made = functions(model)
        images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        traced = made.program(made.shapes(shape), images)
        outs = [out for out in traced.outs if isinstance(out, int)]
        return [o.name for o in program.joined(traced.operations, traced.shapes, outs)]

    for model in (models.LeNet5(), models.McMahanCNN(), Nnx):
        found = names(model)
        assert found.count("pooled convolution") == 2
        assert not {"conv_general_dilated", "reduce_window_max"} & set(found)
    assert "pooled convolution" not in names(Pooled(), (13, 12, 2))

    class Alone(nn.Module):
        """The convolution's own outputs are logits as well."""

        @nn.compact
        def __call__(self, x):
            x = nn.Conv(2, (3, 3))(x)
            return jnp.concatenate([nn.max_pool(x, (2, 2), (2, 2)), x[:, ::2, ::2]], -1).sum((1, 2))

    assert "pooled convolution" not in names(Alone())

    class Falling(nn.Module):
        """The largest of −x is not − the largest of x."""

        @nn.compact
        def __call__(self, x):
            return nn.max_pool(-nn.Conv(2, (3, 3))(x), (2, 2), (2, 2)).sum((1, 2))

    assert "pooled convolution" not in names(Falling())


def test_numbers_of_another_type_are_xlas():
    """A model that computes in bfloat16 does so, its pooling too, and says that it may be slow."""

    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(3, (3, 3), dtype=jnp.bfloat16, name="conv")(x))
            x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
            return nn.Dense(CLASSES, dtype=jnp.bfloat16, name="head")(x)

    made, shape = functions(Half()), (6, 6, 1)
    params, images = made.init(jax.random.key(0), shape), images_of(shape)
    with pytest.warns(UserWarning, match=r"^conv_general_dilated: numbers are bfloat16; it is XLA"):
        ours = made.apply(params, images)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, made.written.apply(params, images))
    assert [layer.path for layer in made.layers(shape)] == [("conv",), ("head",)]


class McMahanNnx(nnx.Module):
    """The library's `McMahanCNN` as a user of nnx would write it."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, (5, 5), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (5, 5), rngs=rngs)
        self.dense1 = nnx.Linear(7 * 7 * 64, 512, rngs=rngs)
        self.dense2 = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, x):
        for convolution in (self.conv1, self.conv2):
            x = nnx.max_pool(nnx.relu(convolution(x)), (2, 2), (2, 2))
        return self.dense2(nnx.relu(self.dense1(x.reshape(x.shape[0], -1))))


def test_operations_are_named_after_their_modules():
    """In what XLA compiles, which is where profiles have their names from."""
    made, shape = functions(models.LeNet5(), FULL), (12, 12, 1)
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    lowered = jax.jit(made.apply).lower(made.shapes(shape), images)
    hlo: Any = lowered.compiler_ir("hlo")
    text = hlo.as_hlo_module().to_string()
    for layer in ("conv1", "conv2", "dense1", "dense3"):
        assert f"LeNet5/{layer}/" in text


def test_linen_and_nnx_are_one_program():
    """So that one is as fast as the other: gradients as JAX writes them down."""
    shape, texts = (28, 28, 1), []
    for model in (models.McMahanCNN(), McMahanNnx):
        made = functions(model, FULL)
        loss = jax.grad(lambda p, x, made=made: jnp.sum(made.apply(p, x)))
        images = jax.ShapeDtypeStruct((10, *shape), jnp.float32)
        texts.append(str(jax.make_jaxpr(loss)(made.shapes(shape), images)))
    assert texts[0] == texts[1]
    assert "conv_general_dilated" not in texts[0]


def test_relu_with_a_gradient_of_ones_own_stays_where_it_is():
    @jax.custom_jvp
    def relu(x):
        return nn.relu(x)

    relu.defjvp(lambda primals, tangents: (nn.relu(primals[0]), 3 * tangents[0]))

    class Straight(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(relu(nn.Conv(2, (3, 3), name="conv")(x)), (2, 2), (2, 2))
            return nn.Dense(CLASSES, name="head")(x.reshape(x.shape[0], -1))

    made, shape = functions(Straight(), FULL), (6, 6, 1)
    params, images = moved(made.init(jax.random.key(0), shape)), images_of(shape)
    params["conv"]["bias"] += 3.0  # no ties, whose gradient is a matter of taste

    def gradient(apply):
        return jax.grad(lambda p: jnp.sum(jnp.sin(apply(p, images))))(params)

    with jax.default_matmul_precision("highest"):
        wanted = gradient(made.written.apply)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        gradient(made.apply), wanted,
    )  # fmt: skip


# Layers


def test_layers_are_in_the_order_of_their_use():
    dense, nothing = ("kernel", "bias"), None

    def layer(path, convolution=False, biased=True):
        kernel, bias = ((*path, name) for name in dense)
        return Layer(path, convolution, kernel, bias if biased else nothing)

    assert functions(Backwards()).layers((4, 4, 1)) == (
        layer(("z_conv",), True),
        layer(("x_conv",), True, biased=False),
        layer(("m_inner", "late")),
        layer(("m_inner", "early")),
        layer(("b_shared",)),
        layer(("a_dense",)),
    )


@pytest.mark.parametrize(
    ("name", "first", "last", "number"),
    [
        ("strided", ["strided/bias", "strided/kernel"], ["head/bias", "head/kernel"], 6),
        ("attention", ["patches/bias", "patches/kernel"], ["head/bias", "head/kernel"], 6),
        ("nnx", ["convolutions/0/bias", "convolutions/0/kernel"], ["head/bias", "head/kernel"], 3),
        ("pair", ["b1", "w1"], ["shift", "u"], 2),
    ],
)
def test_where_the_noise_goes(name, first, last, number):
    """Whatever a parameter is called: kernels by the products, biases by what is added to them."""
    model, shape = WRITTEN[name]
    made = functions(model)

    def paths(which):
        return ["/".join(path) for path in noise.layers(which).paths(made, shape)]

    assert (paths("first"), paths("last")) == (first, last)
    kernels = [layer.kernel for layer in made.layers(shape)]
    assert len(kernels) == number
    only = noise.Where(noise_layers="all", noise_parameters="kernel")
    assert only.paths(made, shape) == tuple(sorted(kernels))
    every = {"/".join(path) for path in flatten_dict(made.shapes(shape))}
    assert set(paths(".*")) == every
    names = [n for n in every if n.split("/")[-1] in ("scale", "gain", "token", "places")]
    assert not set(names) & set(paths("all"))


def test_attention_has_its_own_layers():
    """Queries, keys, values and what they end in, over two axes; biases have two as well."""
    layers = functions(Attention()).layers((8, 12, 1))
    named = {"/".join(layer.path): layer for layer in layers}
    assert set(named) == {
        "patches", *(f"attention/{part}" for part in ("query", "key", "value", "out")), "head",
    }  # fmt: skip
    assert all(layer.bias is not None for layer in layers)
    assert [layer.convolution for layer in layers] == [True] + [False] * 5


# What a model may be


def test_an_nnx_class_begins_with_its_key_and_a_module_with_its_own_weights():
    shape, keys = (12, 12, 1), jax.random.split(jax.random.key(5))
    made, own = functions(Nnx), functions(WRITTEN["nnx_instance"][0])
    one, again, other = (made.init(key, shape) for key in (keys[0], keys[0], keys[1]))
    plain = nnx.state(Nnx(rngs=nnx.Rngs(keys[0])), nnx.Param)
    np.testing.assert_array_equal(one["head"]["kernel"], plain["head"]["kernel"][...])
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert np.any(one["head"]["kernel"] != other["head"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, *(own.init(key, shape) for key in keys))
    module = WRITTEN["nnx_instance"][0]
    images = images_of(shape)
    np.testing.assert_allclose(
        own.apply(own.init(keys[0], shape), images), module(images), rtol=1e-4, atol=1e-5
    )


def test_a_model_that_returns_more_than_logits():
    def two(params, images):
        return flat_apply(params, images), images

    made, shape = functions((flat_init, two)), (12, 12, 1)
    with pytest.raises(
        ValueError, match=r"^model='\(init, apply\)': must return logits alone, and"
    ):
        made.apply(made.init(jax.random.key(0), shape), images_of(shape))


def test_a_model_whose_images_are_too_small_for_it():
    """A dense layer after so many poolings that nothing is left: JAX itself may take it."""

    def init(key, images):
        return {"dense": {"kernel": jnp.zeros((images.shape[1] // 16, 3))}}

    def apply(params, images):
        return jnp.zeros((len(images), len(params["dense"]["kernel"]))) @ params["dense"]["kernel"]

    made = functions((init, apply))
    assert made.classes((16, 16, 1)) == 3
    with pytest.raises(ValueError, match=r"images of shape \(8, 8, 1\) \(dense/kernel is of shape"):
        made.shapes((8, 8, 1))
    with pytest.raises(ValueError, match=r"^model='LeNet5': does not take images of shape"):
        functions(models.LeNet5()).shapes((8, 8, 1))
