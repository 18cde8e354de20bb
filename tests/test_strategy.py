"""`strategy`: what "auto" means for a target, settled before anything is traced.

Nothing is compiled: programs are compared as JAX writes them down.
"""

from typing import Any

import jax
import jax.numpy as jnp
import many_lanes
import numpy as np
import pytest

import noisefl
from noisefl import keys, models, strategy
from noisefl.models import LOWERINGS, Lowering
from noisefl.strategy import Strategy

SMALL = (12, 12, 1)


def on(monkeypatch: Any, backend: str) -> None:
    """As if this machine were another."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)


def static(part: Any) -> Any:
    """All of a part that a program is compiled for."""
    return jax.tree.structure(part)


def experiment(model: Any = None, **fields: Any) -> noisefl.Experiment:
    given = {} if model is None else {"model": model}
    return many_lanes.experiment().replace(strategy=Strategy(**fields), **given)


def step(experiment: noisefl.Experiment) -> str:
    """A round as JAX writes it down."""
    inputs: Any = keys.root(0), experiment, many_lanes.data()
    state = jax.eval_shape(noisefl.init, *inputs)
    return str(jax.make_jaxpr(noisefl.step)(inputs[0], state, inputs[2], experiment))


def gradient(given: noisefl.Experiment) -> str:
    """Of its model's loss, as JAX writes it down."""
    images, model = jax.ShapeDtypeStruct((2, *SMALL), jnp.float32), given.functions
    loss = jax.grad(lambda p, x: jnp.sum(model.apply(p, x)))
    return str(jax.make_jaxpr(loss)(model.shapes(SMALL), images))


# What is chosen


@pytest.mark.parametrize(
    ("target", "clients", "fields", "at_once", "batch", "gather"),
    [
        ("cpu", 30, {}, 1, 50, "client"),
        ("gpu", 30, {}, 30, 1000, "client"),
        ("tpu", 300, {}, 100, 1000, "client"),
        ("cpu", 30, {"clients_at_once": 0, "gather": "step"}, 30, 50, "step"),
        ("gpu", 30, {"clients_at_once": 7, "eval_batch": 9}, 7, 9, "client"),
        ("cpu", 30, {"clients_at_once": 31, "eval_batch": 9}, 30, 9, "client"),
    ],
)
def test_what_is_left_open_is_chosen_by_the_target_alone(
    monkeypatch, target, clients, fields, at_once, batch, gather
):
    for here in ("cpu", "gpu", "tpu"):
        on(monkeypatch, here)
        found = Strategy(target=target, **fields).resolved(clients)
        assert (found.target, found.gather) == (target, gather)
        assert (found.clients_at_once, found.eval_batch) == (at_once, batch)
        kept: Any = {"conv": "lax", "pool": "reduce", "dense": "outer", "precision": "float32"}
        others = Strategy(target=target, clients_axis="a", **fields, **kept).resolved(clients)
        assert {name: getattr(others, name) for name in kept} == kept
        assert others.clients_axis == "a"


@pytest.mark.parametrize(
    ("backend", "target"), [("cpu", "cpu"), ("cuda", "gpu"), ("rocm", "gpu"), ("tpu", "tpu")]
)
def test_the_target_left_open_is_this_machine(monkeypatch, backend, target):
    on(monkeypatch, backend)
    assert static(Strategy().resolved(9)) == static(Strategy(target=target).resolved(9))


def test_the_defaults_of_an_experiment_are_those_of_its_cohort():
    full = experiment(target="gpu").replace(cohort=noisefl.Cohort(3, groups="full"))
    assert full.resolved().strategy.clients_at_once == 6  # 2m


def test_resolving_twice_is_resolving_once(monkeypatch):
    """Nor does it matter where the second time is."""
    pair = (lambda key, images: {}, lambda params, images: images)
    for model in (models.LeNet5(), many_lanes.Linear(), pair):
        for given in (experiment(model), experiment(model, target="gpu", clients_at_once=2)):
            once = given.resolved()
            assert static(once) != static(given)
            on(monkeypatch, "tpu")
            twice = once.resolved()
            monkeypatch.undo()
            assert static(twice) == static(once)
            numbers = zip(jax.tree.leaves(twice), jax.tree.leaves(given), strict=True)
            assert all(np.array_equal(ours, theirs) for ours, theirs in numbers)


def test_lanes_of_a_cpu_go_in_turn():
    at_once, a_device = strategy.lanes_side_by_side, strategy.lanes_a_device
    assert (at_once(5, "cpu"), a_device(20, "cpu"), a_device(5, "cpu")) == (1, 8, 5)
    assert (at_once(5, "gpu"), a_device(300, "tpu")) == (5, 256)


@pytest.mark.parametrize(
    ("batch", "lanes", "wanted"),
    [(50, 1, 50), (1000, 8, 125), (1000, 64, 32), (8, 2, 8), (1000, 2000, 32)],
)
def test_lanes_side_by_side_share_the_images_of_a_forward_pass(batch, lanes, wanted):
    assert strategy.eval_batch_of_a_lane(batch, lanes) == wanted


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"conv": "winogard"}, "conv='winogard': must be one of .* mean winograd"),
        ({"conv": "winograd", "precision": "bfloat16"}, "conv='winograd': needs float32"),
        ({"target": "cuda"}, "target='cuda': must be one of auto, cpu, gpu, tpu"),
        ({"clients_at_once": -1}, "clients_at_once=-1: must be .* at least 0, or None: the best"),
        ({"eval_batch": 0}, "eval_batch=0: must be .* at least 1, or None: the best of the target"),
    ],
)
def test_refusals(fields, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        Strategy(**fields)


# What a program then is


def test_a_named_target_is_all_that_a_round_reads(monkeypatch):
    """No machine is asked while it is traced, and a machine of that kind would trace the same."""
    # More clients than are noticed by a CPU, and a model with every kind of layer.
    given = experiment(models.LeNet5(3), target="gpu")
    data = many_lanes.data()
    with monkeypatch.context() as patch:

        def nobody() -> str:
            raise AssertionError("asked for this machine's backend")

        patch.setattr(jax, "default_backend", nobody)
        resolved = given.resolved()
        assert resolved.functions.lowering == Lowering(target="gpu")
        by_target = gradient(resolved)
    # A whole round of the smallest model; LeNet-5 alone would take seconds more to trace.
    assert data.image_shape == (6, 6, 1)
    small = experiment(target="gpu")
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", nobody)
        named = step(small)
    on(monkeypatch, "gpu")
    assert step(experiment()) == named
    assert gradient(experiment(models.LeNet5(3)).resolved()) == by_target
    monkeypatch.undo()
    assert step(experiment(target="cpu")) != named


@pytest.mark.parametrize("name", ["lenet5", "mcmahan", "two_conv"])
def test_two_targets_are_two_lowerings(name):
    """And those of a kind are one."""
    cpu, gpu, tpu = (
        gradient(experiment(models.by_name(name, 3), target=target).resolved())
        for target in ("cpu", "gpu", "tpu")
    )
    assert cpu != gpu == tpu


@pytest.mark.parametrize(
    ("how", "layer", "passes"),
    [
        ({"target": "cpu"}, (5, 1, 6), ("strips", "patches")),
        ({"target": "cpu"}, (5, 1, 6, True), ("windows", "windows")),
        ({"target": "cpu"}, (5, 15, 64, True), ("windows", "windows")),
        ({"target": "cpu"}, (5, 32, 64), ("winograd", "winograd")),
        ({"target": "cpu"}, (5, 16, 16, True), ("winograd", "winograd")),
        ({"target": "cpu"}, (7, 32, 64), ("strips", "patches")),
        ({"target": "cpu", "precision": "bfloat16"}, (5, 32, 64), ("strips", "patches")),
        ({"target": "gpu"}, (5, 32, 64), ("strips", "patches")),
        ({"target": "tpu"}, (5, 32, 64, True), ("windows", "patches")),
        ({"target": "gpu", "conv": "winograd"}, (5, 32, 64), ("winograd", "winograd")),
        ({"target": "gpu", "conv": "winograd"}, (1, 32, 64), ("strips", "patches")),
        ({"target": "cpu", "conv": "lax"}, (5, 1, 6, True), ("lax", "lax")),
    ],
)
def test_how_a_convolution_is_lowered(how, layer, passes):
    """Kernel [size, size, channels, features], and whether it is pooled; in a pass alone, and in
    one to be differentiated. With strides or groups there are patches, or XLA's own."""
    size, channels, features, *pool = layer
    kernel = size, size, channels, features
    assert Lowering(**how).conv_of(kernel, True, *pool) == passes
    other = "lax" if how.get("conv") == "lax" else "patches"
    assert Lowering(**how).conv_of(kernel, False) == (other, other)


def test_how_pooling_and_dense_gradients_are_lowered(monkeypatch):
    cpu, gpu = Lowering(target="cpu"), Lowering(target="gpu")
    assert [cpu.dense_of(rows) for rows in (1, 16, 17)] == ["outer", "outer", "matmul"]
    assert gpu.dense_of(1) == "matmul"
    assert Lowering(target="cpu", precision="bfloat16").dense_of(1) == "matmul"
    assert Lowering(target="cpu", dense="matmul").dense_of(1) == "matmul"
    assert Lowering(target="gpu", dense="outer").dense_of(99) == "outer"
    assert (cpu.pool_of(), gpu.pool_of()) == ("compare", "mask")
    assert Lowering(pool="reduce").pool_of() == "reduce"
    # Without a target it is this machine's.
    on(monkeypatch, "gpu")
    assert (Lowering().dense_of(1), cpu.dense_of(1)) == ("matmul", "outer")


# Models


@pytest.mark.parametrize("name", ["lenet5", "mcmahan", "two_conv", "mlp"])
def test_a_model_is_lowered_as_the_strategy_says(name):
    way = {"conv": "lax", "pool": "reduce", "dense": "outer", "precision": "float32"}
    resolved = experiment(models.by_name(name, 3), target="gpu", **way).resolved()
    assert resolved.model == models.by_name(name, 3)
    assert resolved.functions.lowering == Lowering(**way, target="gpu")
    text = gradient(resolved)
    assert ("reduce_max" in text) == (name != "mlp")
    other = gradient(
        experiment(models.by_name(name, 3), target="gpu", **{**way, "pool": "compare"})
    )
    assert (other != text) == (name != "mlp")
    assert set(LOWERINGS) == {"conv", "pool", "dense", "precision"}
