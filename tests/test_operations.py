"""The count of operations against XLA's own analysis of the plain model, and against arithmetic."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from experiments import operations
from experiments.workloads import WORKLOADS
from noisefl.models import Lowering, by_name

PLAIN = Lowering(conv="lax", pool="reduce", dense="matmul")


def test_mcmahans_network_by_hand():
    count = operations.count(by_name("mcmahan", 10), (28, 28, 1))
    layers = [28 * 28 * 25 * 32, 14 * 14 * 25 * 32 * 64, 3136 * 512, 512 * 10]
    assert count.forward == 2 * sum(layers)
    assert count.step == 2 * (3 * sum(layers) - layers[0])


@pytest.mark.parametrize("name", WORKLOADS)
def test_forward_agrees_with_xla(name):
    workload = WORKLOADS[name]
    model = by_name(workload.model, workload.num_classes, PLAIN)
    images = jnp.zeros((4, *workload.image_shape))
    params = model.init(jax.random.key(0), images)
    analysis: Any = jax.jit(model.apply).lower(params, images).cost_analysis()
    ours = 4 * operations.count(model, workload.image_shape).forward
    # XLA counts biases, activations and pooling as well, and leaves out products with padding:
    # a few operations for each of the thousands of outputs, so a few percent. LeNet's outputs
    # take fewest products each, and 5 x 5 windows on 14 x 14 images overlap the border most.
    assert ours == pytest.approx(analysis["flops"], rel=0.2)
    if workload.model == "two_conv":  # no padding; 288 products against a handful of others
        assert ours == pytest.approx(analysis["flops"], rel=0.02)


@pytest.mark.parametrize("name", ["cifar10", "femnist"])
def test_a_step_agrees_with_xla(name):
    workload = WORKLOADS[name]
    # Patches turn all three products of a layer into plain ones of the same count.
    model = by_name(workload.model, workload.num_classes, Lowering(conv="patches", dense="matmul"))
    images = jnp.zeros((2, *workload.image_shape))
    params = model.init(jax.random.key(0), images)
    apply: Any = model.apply
    step = jax.jit(jax.grad(lambda params: jnp.sum(apply(params, images) ** 2)))
    analysis: Any = step.lower(params).compile().cost_analysis()
    flops = analysis["flops"]
    ours = 2 * operations.count(model, workload.image_shape).step
    assert ours == pytest.approx(flops, rel=0.05)  # overlaps of patches are summed as well
