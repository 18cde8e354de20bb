"""`split`: a model cut at its first noised layer is the model, and what lies below is not computed.

The reference is the uncut model; accuracies are counted by NumPy's argmax.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from noisefl import Config, Hyper, check_hyper, evaluate, keys, make_round, models, simulate, split
from noisefl.models import MODELS, Conv, layer_order, max_pool

IMAGE = (6, 6, 1)
MNIST = (28, 28, 1)
CLASSES = 5
SIZE = 23  # a prime: no batch below divides it


class Chain(nn.Module):
    """A convolution, then dense layers; the names sort against the order of calls."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(max_pool(Conv(4, 3, name="z_conv")(x))).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(12, name="y_dense")(x))
        return nn.Dense(CLASSES, name="x_dense")(x)


class Skip(nn.Module):
    """The images, and the first layer's output, pass the layers in between by."""

    @nn.compact
    def __call__(self, x):
        images = x.reshape(x.shape[0], -1)
        stem = nn.relu(nn.Dense(8, name="stem")(images))
        deep = nn.relu(nn.Dense(8, name="deep")(stem))
        side = nn.relu(nn.Dense(8, name="side")(images))
        return nn.Dense(CLASSES, name="head")(jnp.concatenate([deep + stem, side], axis=1))


class Twice(nn.Module):
    """One layer is called twice: only the input of its first call lies below all noise."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name="stem")(x.reshape(x.shape[0], -1)))
        shared = nn.Dense(8, name="shared")
        return nn.Dense(CLASSES, name="head")(nn.relu(shared(nn.relu(shared(x)))))


class Owner(nn.Module):
    """A module with a kernel of its own that it applies before it calls another layer."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 8))
        return nn.Dense(CLASSES, name="inner")(nn.relu(x @ kernel))


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name="stem")(x.reshape(x.shape[0], -1)))
        return Owner(name="outer")(x)


class Keyword(nn.Module):
    """Its second layer is given its input by name."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name="stem")(x.reshape(x.shape[0], -1)))
        return nn.Dense(CLASSES, name="head")(inputs=x)


class Rows(nn.Module):
    """Its second layer sees an image as six rows, so that its input's first axis is not N."""

    @nn.compact
    def __call__(self, x):
        rows = nn.relu(nn.Dense(5, name="stem")(x.reshape(x.shape[0] * 6, -1)))
        rows = nn.relu(nn.Dense(5, name="rows")(rows))
        return nn.Dense(CLASSES, name="head")(rows.reshape(x.shape[0], -1))


def data():
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (SIZE, *IMAGE)).astype(np.uint8)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, CLASSES, SIZE).astype(np.int32))


def parameters(model, noised, copies: int = 4):
    """Base, the paths of the parameters of layers `noised`, and noised copies [copies, …]."""
    base = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *IMAGE)))["params"]
    flat = flatten_dict(base)
    paths = tuple(sorted(path for path in flat if path[:-1] in noised))
    rng = np.random.default_rng(1)
    many = {path: np.stack([np.asarray(leaf)] * copies) for path, leaf in flat.items()}
    for path in paths:
        many[path] += rng.normal(size=many[path].shape).astype(np.float32)
    return base, paths, unflatten_dict(many)


def check(model, noised, batch: int = 8):
    """The cut model's accuracies and logits, one copy at a time and under vmap, are the model's."""
    images, labels = data()
    base, paths, copies = parameters(model, noised)
    cut = split.at(model, paths, IMAGE)
    accuracy_of = split.accuracy_of(model, cut, base, images, labels, batch)
    mapped = jax.jit(jax.vmap(accuracy_of))(copies)
    forward: Any = jax.jit(lambda params: model.apply({"params": params}, evaluate.scale(images)))
    uncut, single = (
        jax.jit(lambda p: evaluate.accuracy(model.apply, p, images, labels, batch)),
        jax.jit(accuracy_of),
    )
    found = []
    for lane in range(4):
        params = jax.tree.map(lambda leaf, lane=lane: jnp.asarray(leaf[lane]), copies)
        logits = np.asarray(forward(params))
        right = np.mean(np.argmax(logits, axis=1) == np.asarray(labels))
        assert single(params) == uncut(params) == np.float32(right)
        # The number of images; its rounding has a test of its own.
        assert round(float(mapped[lane]) * SIZE) == round(right * SIZE)
        found.append(right)
        if cut is not None:  # accuracies are coarse, logits are not
            kept = jax.jit(lambda: cut.below(base, images, batch))()
            assert kept.shape[0] == SIZE
            above = jax.jit(cut.above)(params, images, kept)
            # Another program may sum the at most 64 terms of each of 4 layers in another order.
            room = 4 * 64 * 2.0**-24 * np.max(np.abs(logits)) * 8
            np.testing.assert_allclose(above, logits, rtol=0, atol=room)
    assert len(set(found)) > 1  # the noise does change the accuracy
    return cut


def layers(model, shape=IMAGE):
    return [layer.path for layer in layer_order(model, shape)]


@pytest.mark.parametrize(
    ("model", "layer"),
    [(m, layer) for m in (Chain(), Skip(), Twice()) for layer in layers(m)],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value[0],
)
def test_each_layer_of_a_cut_model(model, layer):
    cut = check(model, [layer])
    assert (cut and cut.path) == (None if layer == layers(model)[0] else layer)


@pytest.mark.parametrize(
    ("model", "noised", "first"),
    [
        (Chain(), ["x_dense", "y_dense"], "y_dense"),
        (Skip(), ["side", "head"], "side"),
        (Skip(), ["head", "deep"], "deep"),
        (Twice(), ["head", "shared"], "shared"),
    ],
    ids=str,
)
def test_several_layers_are_cut_below_the_first_called(model, noised, first):
    cut = check(model, [(name,) for name in noised])
    assert cut is not None
    assert cut.path == (first,)


@pytest.mark.parametrize("batch", [1, 12, SIZE, 1000])
def test_any_batch(batch):
    check(Skip(), [("deep",)], batch)


def test_a_layer_inside_a_module_that_has_a_kernel_of_its_own():
    """`outer` acts before `inner`, though it returns after it: both noised, the cut is below it."""
    check(Nested(), [("outer",), ("outer", "inner")])


def test_each_layer_of_nested_modules():
    for noised in ([("outer",)], [("outer", "inner")]):
        check(Nested(), noised)


def test_a_layer_called_with_a_keyword():
    check(Keyword(), [("head",)])


def test_a_layer_that_sees_several_rows_of_one_image():
    check(Rows(), [("rows",)])


@pytest.mark.parametrize("name", MODELS)
def test_nothing_to_keep_below_the_first_layer(name):
    model = models.by_name(name, 10)
    order = layers(model, MNIST)

    def paths(owners):
        return tuple((*owner, part) for owner in owners for part in ("bias", "kernel"))

    assert split.at(model, paths(order[:1]), MNIST) is None
    assert split.at(model, paths(order), MNIST) is None
    assert split.at(model, ((*order[0], "bias"), (*order[-1], "kernel")), MNIST) is None
    last = split.at(model, paths(order[-1:]), MNIST)
    assert last is not None
    assert last.path == order[-1]
    assert split.at(model, ((*order[-1], "bias"),), MNIST) == last


@pytest.mark.parametrize(("width", "kept"), [(split.LARGEST, True), (split.LARGEST + 1, False)])
def test_an_input_too_large_is_not_kept(width, kept):
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(width, name="stem")(x.reshape(x.shape[0], -1))
            return nn.Dense(2, name="head")(x)

    assert (split.at(Wide(), (("head", "kernel"),), IMAGE) is not None) == kept


def test_a_parameter_of_no_layer():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, name="stem")(x.reshape(x.shape[0], -1))
            return nn.Dense(2, name="head")(nn.LayerNorm(name="norm")(x))

    assert split.at(Normed(), (("norm", "scale"),), IMAGE) is None
    assert split.at(Normed(), (("head", "kernel"), ("norm", "scale")), IMAGE) is None
    assert split.at(Normed(), (("head", "kernel"),), IMAGE) is not None


@pytest.mark.parametrize("size", [SIZE, 100, 1000])
def test_accuracies_under_vmap_are_the_nearest_float32(size):
    """As without vmap: 650 of 1000 is not above a cap of 0.65, whoever maps over copies or runs."""
    counts = np.arange(size + 1)
    shares = jax.jit(jax.vmap(lambda count: evaluate.share(count, size)))(counts)
    np.testing.assert_array_equal(shares, (counts / size).astype(np.float32))


def test_what_lies_below_is_not_computed():
    """By XLA's own count of operations: one dense layer is left of two convolutions and three."""
    model, batch = models.McMahanCNN(), 8
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *MNIST)))["params"]
    images = jax.ShapeDtypeStruct((batch, *MNIST), jnp.uint8)
    cut = split.at(model, (("dense2", "kernel"),), MNIST)
    assert cut is not None
    kept = jax.ShapeDtypeStruct((batch, 512), jnp.float32)

    def operations(function, *args) -> float:
        cost: Any = jax.jit(function).lower(*args).compile().cost_analysis()
        return cost["flops"]

    above = operations(cut.above, params, images, kept)
    whole = operations(lambda p, x: model.apply({"params": p}, evaluate.scale(x)), params, images)
    # A product and a sum for each weight, and a sum for each bias.
    assert above <= batch * (2 * 512 * 10 + 10)
    assert whole >= batch * 2 * 14 * 14 * (5 * 5 * 32) * 64  # the second convolution alone

    # The branch that passes the cut by is not dropped: the logits still depend on the images.
    base, paths, _ = parameters(Skip(), [("deep",)])
    cut = split.at(Skip(), paths, IMAGE)
    assert cut is not None
    images = data()[0]
    kept = cut.below(base, images, 8)
    assert not np.allclose(cut.above(base, images, kept), cut.above(base, images[::-1], kept))


def test_a_run_is_the_run_without_the_cut(monkeypatch, tiny_model, tiny_data):
    """Noise on the last layer: calibration and measurements, with `at` as it is and never a cut."""
    config = Config(
        image_shape=IMAGE,
        num_clients=6,
        client_fraction=0.67,
        local_epochs=2,
        batch_size=4,
        noise_layers="last",
        noise_scale="relative",
        eval_batch=8,
    )
    # Steps exact in binary: a strength has one value.
    hyper = check_hyper(Hyper(cap=0.4, strength_step=0.5, learning_rate=0.5, max_tries=6), config)
    real = split.at
    runs = []
    for at in (real, lambda *args: None):
        monkeypatch.setattr(split, "at", at)
        round_ = make_round(tiny_model, config)
        simulation = simulate.make_simulation(round_, tiny_model, config, 3)
        chunks = simulate.chunks(
            simulation, keys.root(4), round_.init(keys.root(5)), tiny_data, hyper, 3
        )
        runs.append(next(chunks)[1])
    assert real(tiny_model, (("dense1", "kernel"),), IMAGE) is not None
    assert max(row["calibration_tries"] for row in runs[0]) > 1
    for ours, theirs in zip(*runs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, nan_ok=True)
