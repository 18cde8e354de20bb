"""`split`: a model cut at its first noised layer is the model, and what lies below is not computed.

The reference is the uncut model; accuracies are counted by NumPy's argmax.
"""

from typing import Any

import jax
import jax.numpy as jnp
import many_lanes
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from noisefl import evaluate, keys, measure, models, noise, split
from noisefl.models import functions
from noisefl.parts import changed
from noisefl.round import RoundInfo, State

IMAGE = (6, 6, 1)
MNIST = (28, 28, 1)
CLASSES = 5
SIZE = 23  # a prime: no batch below divides it


class Chain(nn.Module):
    """A convolution, then dense layers; the names sort against the order of calls."""

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3), name="z_conv")(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(12, name="y_dense")(x.reshape(x.shape[0], -1)))
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
    return images, rng.integers(0, CLASSES, SIZE).astype(np.int32)


def parameters(model, noised, copies: int = 4):
    """Base, the paths of the parameters of layers `noised`, and noised copies [copies, …]."""
    shapes: Any = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *IMAGE)))["params"]
    rng = np.random.default_rng(1)
    flat: dict[Any, Any] = dict(flatten_dict(shapes))
    base = {p: rng.normal(size=leaf.shape, scale=0.5).astype("f4") for p, leaf in flat.items()}
    paths = tuple(sorted(path for path in flat if path[:-1] in noised))
    many = {path: np.stack([leaf] * copies) for path, leaf in base.items()}
    for path in paths:
        many[path] += rng.normal(size=many[path].shape).astype(np.float32)
    return unflatten_dict(base), paths, unflatten_dict(many)


def check(model, noised, batch: int = 8):
    """The cut model's accuracies and logits, one copy at a time and under vmap, are the model's."""
    images, labels = data()
    base, paths, copies = parameters(model, noised)
    made = functions(model)
    cut: Any = split.at(made, paths, IMAGE)

    def all_of_it(base, copies, images, labels):
        accuracy_of = split.accuracy_of(made, cut, base, images, labels, batch)
        uncut = lambda p: evaluate.accuracy(made.apply, p, images, labels, batch)  # noqa: E731
        each = lambda function: jax.lax.map(function, copies)  # noqa: E731
        logits = each(lambda p: made.apply(p, evaluate.scale(images)))
        found = jax.vmap(accuracy_of)(copies), each(accuracy_of), each(uncut), logits
        if cut is None:
            return *found, None, logits
        kept = cut.below(base, images, batch)
        return *found, kept, each(lambda p: cut.above(p, images, kept))

    run = jax.jit(all_of_it)
    found = jax.tree.map(np.asarray, run(base, copies, images, labels))
    mapped, single, uncut, logits, kept, above = found
    right = np.mean(np.argmax(logits, axis=2) == labels, axis=1)
    np.testing.assert_array_equal(single, right.astype(np.float32))
    np.testing.assert_array_equal(uncut, right.astype(np.float32))
    # The number of images; its rounding is tested in test_evaluate.py.
    np.testing.assert_array_equal(np.round(mapped * SIZE), np.round(right * SIZE))
    assert len(set(right)) > 1  # the noise does change the accuracy
    if cut is not None:
        assert kept.shape[0] == SIZE
    # Accuracies are coarse, logits are not. Another program may sum the at most 64 terms of each of
    # 4 layers in another order.
    room = 4 * 64 * 2.0**-24 * np.max(np.abs(logits)) * 8
    np.testing.assert_allclose(above, logits, rtol=0, atol=room)
    return cut


def at(model: Any, paths: Any, shape=IMAGE) -> Any:
    return split.at(functions(model), paths, shape)


def layers(model, shape=IMAGE):
    return [layer.path for layer in functions(model).layers(shape)]


def meets(cut: Any, shape=IMAGE) -> Any:
    """The layer that reads what stands at the cut."""
    if cut is None:
        return None
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    program = cut.model.program(cut.model.shapes(shape), images)
    value, paths = program.met(cut.touched), program.paths
    (reads,) = (
        {paths[v][:-1] for v in operation.reads if isinstance(v, int) and v < len(paths)}
        for operation in program.operations
        if value in operation.reads and set(operation.reads) & set(range(len(paths)))
    )
    return reads.pop()


@pytest.mark.parametrize(
    ("model", "layer"),
    [(m, layer) for m in (Chain(), Skip(), Twice()) for layer in layers(m)],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value[0],
)
def test_each_layer_of_a_cut_model(model, layer):
    if layer == layers(model)[0] and not isinstance(model, Chain):  # one uncut model is compared
        assert at(model, parameters(model, [layer])[1]) is None
        return
    cut = check(model, [layer])
    of_images = layer in (layers(model)[0], ("side",))  # nothing lies below
    assert meets(cut) == (None if of_images else layer)


@pytest.mark.parametrize(
    ("model", "noised", "first"),
    [
        (Chain(), ["x_dense", "y_dense"], "y_dense"),
        (Skip(), ["head", "side", "deep"], "deep"),
        (Twice(), ["head", "shared"], "shared"),
    ],
    ids=str,
)
def test_several_layers_are_cut_below_the_first_called(model, noised, first):
    cut = check(model, [(name,) for name in noised])
    assert meets(cut) == (first,)


@pytest.mark.parametrize("devices", [2, 5])
def test_images_split_over_an_axis_give_the_same_accuracy(devices):
    images, labels = map(jnp.asarray, data())
    base, paths, copies = parameters(Chain(), [("y_dense",)])
    made, cut = functions(Chain()), at(Chain(), paths)
    assert cut is not None

    def one(_, axis="devices"):
        of = split.accuracy_of(made, cut, base, images, labels, 8, axis)
        return jax.lax.map(of, copies)

    found = jax.vmap(one, axis_name="devices")(jnp.arange(devices))
    np.testing.assert_array_equal(found, np.tile(one(0, ""), (devices, 1)))


@pytest.mark.parametrize("batch", [1, 1000])
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


@pytest.mark.parametrize("name", ["lenet5", "mcmahan", "two_conv", "mlp"])
def test_nothing_to_keep_below_the_first_layer(name):
    model = models.by_name(name, 10)
    order = layers(model, MNIST)

    def paths(owners):
        return tuple((*owner, part) for owner in owners for part in ("bias", "kernel"))

    assert at(model, (), MNIST) is None
    assert at(model, paths(order[:1]), MNIST) is None
    assert at(model, paths(order), MNIST) is None
    # A bias is added to a product; that of a convolution is too large to be kept.
    after = at(model, ((*order[0], "bias"), (*order[-1], "kernel")), MNIST)
    assert (after is None) == (name != "mlp")
    last = at(model, paths(order[-1:]), MNIST)
    assert meets(last, MNIST) == order[-1]
    assert at(model, ((*order[-1], "bias"),), MNIST) is not None


def test_a_pair_of_functions_is_cut_as_well():
    model: Any = Chain()
    pair = (
        lambda key, images: model.init(key, images)["params"],
        lambda params, images: model.apply({"params": params}, images),
    )
    assert at(model, (("x_dense", "kernel"),)) is not None
    assert meets(at(pair, (("x_dense", "kernel"),))) == ("x_dense",)


@pytest.mark.parametrize(("width", "kept"), [(split.LARGEST, True), (split.LARGEST + 1, False)])
def test_an_input_too_large_is_not_kept(width, kept):
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(width, name="stem")(x.reshape(x.shape[0], -1))
            return nn.Dense(2, name="head")(x)

    assert (at(Wide(), (("head", "kernel"),)) is not None) == kept


def test_a_parameter_of_no_layer():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, name="stem")(x.reshape(x.shape[0], -1))
            return nn.Dense(2, name="head")(nn.LayerNorm(name="norm")(x))

    # Its scale meets one over the deviation first; the mean is taken off beside that.
    assert at(Normed(), (("norm", "scale"),)) is None
    assert at(Normed(), (("head", "kernel"), ("norm", "scale"))) is None
    made, images, paths = (
        functions(Normed()),
        jnp.asarray(data()[0]),
        (("norm", "bias"), ("head", "bias")),
    )
    base = made.init(jax.random.key(0), IMAGE)
    other = {**base, "norm": {**base["norm"], "bias": base["norm"]["bias"] + 0.3}}
    cut: Any = at(Normed(), paths)
    above = cut.above(other, images, cut.below(base, images, 8))
    plain = made.written.apply(other, evaluate.scale(images))
    np.testing.assert_allclose(above, plain, rtol=1e-5, atol=1e-6)
    assert meets(at(Normed(), (("head", "kernel"),))) == ("head",)


def test_what_lies_below_is_not_computed():
    """By XLA's own count of operations: one dense layer is left of two convolutions and three."""
    model: Any = models.McMahanCNN()
    batch = 8
    params = functions(model).shapes(MNIST)
    images = jax.ShapeDtypeStruct((batch, *MNIST), jnp.uint8)
    cut = at(model, (("dense2", "kernel"),), MNIST)
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
    cut, images = at(Skip(), paths), data()[0]

    @jax.jit
    def both(images):
        kept = cut.below(base, images, 8)
        return cut.above(base, images, kept), cut.above(base, images[::-1], kept)

    assert not np.allclose(*both(images))


def test_what_a_round_asks_is_answered_as_without_the_cut(monkeypatch):
    """Noise on the last layer: calibration and measurements, with `at` as it is and never a cut."""
    experiment = many_lanes.experiment(warmup_rounds=0, cap=0.3, strength=0.5, strength_step=0.5)
    last = changed(experiment.replace(model=Twice()), noise.Where, noise_layers="last").resolved()
    data, (base, *_), key = many_lanes.data(), parameters(Twice(), []), keys.root(4)
    members = last.cohort.draw(key, data.counts)

    def look(base: Any) -> Any:
        judge, scheme, nothing = last.judge(data), last.scheme, jnp.int32(0)
        carry = scheme.init(key, base)
        issue, _ = scheme.issue(key, jnp.int32(1), base, base, members, judge, carry)
        state = State(nothing, base, base, carry, (), ())
        info = RoundInfo(members, issue, {}, (), (), nothing, jnp.bool_(True))
        known = measure.Accuracies().init(key, last, data, state)
        return measure.Accuracies().update(last, state, state, info, (), data, known)[0], issue

    real, answers, cuts = split.at, [], []
    for at in (lambda *args: cuts.append(real(*args)) or cuts[-1], lambda *args: None):
        monkeypatch.setattr(split, "at", at)
        answers.append(jax.jit(lambda base: look(base))(base))
    assert {meets(cut) for cut in cuts} == {("head",)}
    (numbers, issue), (wanted, other) = answers
    assert issue.bill.tries == other.bill.tries > 1
    assert issue.strength == other.strength
    np.testing.assert_array_equal(issue.accuracy, other.accuracy)
    assert len({float(numbers[name]) for name in numbers}) > 3
    for name in numbers:
        np.testing.assert_allclose(numbers[name], wanted[name], rtol=1e-6, err_msg=name)
