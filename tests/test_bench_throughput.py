"""The throughput benchmark: its count of operations against XLA's own analysis of the plain model
and against arithmetic, what it writes and what it refuses. Its figures prove nothing here."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from bench_flags import check_refusals

from experiments.bench import peers
from experiments.bench.workloads import WORKLOADS, operations


def model_of(name: str) -> Any:
    workload = WORKLOADS[name]
    return workload.network(), workload.image_shape


def test_mcmahans_network_by_hand():
    count = operations(*model_of("mcmahan"))
    layers = [28 * 28 * 25 * 32, 14 * 14 * 25 * 32 * 64, 3136 * 512, 512 * 10]
    assert count.forward == 2 * sum(layers)
    assert count.step == 2 * (3 * sum(layers) - layers[0])


@pytest.mark.parametrize("name", WORKLOADS)
def test_forward_agrees_with_xla(name):
    model, shape = model_of(name)
    images = jnp.zeros((4, *shape))
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    analysis: Any = jax.jit(model.apply).lower(params, images).cost_analysis()
    # XLA counts biases, activations and pooling as well, and leaves out products with padding:
    # a few operations for each of the thousands of outputs, so a few percent. LeNet's outputs
    # take fewest products each, and 5 x 5 windows on 14 x 14 images overlap the border most.
    # Of two_conv: no padding; 288 products against a handful of others.
    rel = 0.02 if name in ("cifar10", "femnist") else 0.2
    assert 4 * operations(model, shape).forward == pytest.approx(analysis["flops"], rel=rel)


def test_a_step_agrees_with_xla():
    model, shape = model_of("cifar10")
    images = jnp.zeros((2, *shape))
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    step = jax.jit(jax.grad(lambda params: jnp.sum(model.apply(params, images) ** 2)))
    analysis: Any = step.lower(params).compile().cost_analysis()
    assert 2 * operations(model, shape).step == pytest.approx(analysis["flops"], rel=0.05)


def test_bad_input_is_one_line():
    says = {
        "--workloads=lenett": "workloads='lenett': must be one of mcmahan, femnist, cifar10, lenet",
        "--conv=winogard": "conv='winogard': must be one of auto, patches, winograd, lax (did you",
        "--cohort=101": "cohort=101: must be 2 to the 100 clients of mcmahan",
        "--clients_at_once=-1": "clients_at_once='-1': must be a whole number, or auto",
        "--compare=torhc": "compare='torhc': must be one of torch, pfl, fedjax (did you mean",
        "--compare=pfl": "compare='pfl': needs pfl-research, which is not installed in this envir",
        "--compare=fedjax=/no/python": "compare='fedjax=/no/python': must be NAME or NAME=PYTHON",
        "extra": "unexpected argument 'extra'",
    }
    check_refusals("experiments.bench_throughput", says)


def test_peers_are_given_the_workload_and_wait_for_their_turn(tmp_path, monkeypatch):
    """One that answers at once, in both forms; one that ends is said to have failed."""
    script = """
import sys
from experiments.bench import turns
setting = turns.given()
assert setting.threads * setting.clients in (10 * CORES, 10 // CORES), setting
assert setting.convolutions[1] == [16, 5, 0, True] and setting.dense == [120, 84], setting
turns.take(lambda: None if setting.client_size == 550 else sys.exit(3))
"""
    cores = len(os.sched_getaffinity(0))
    (tmp_path / "peer_fake.py").write_text(script.replace("CORES", str(cores)))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{peers.ROOT}")
    monkeypatch.setattr(peers, "MODULES", "")
    monkeypatch.setitem(peers.PEERS, "fake", peers.Peer("Fake", "json", alone=False))
    pythons = peers.chosen(["fake"])
    with peers.started(pythons, WORKLOADS["lenet"]) as runs:
        assert len(runs) == (1 if cores == 1 else 2)
        assert all(0 <= seconds() < 60 for seconds in [*runs.values()] * 2)
    smaller = dataclasses.replace(WORKLOADS["lenet"], client_size=1)
    with (
        peers.started(pythons, smaller) as runs,
        pytest.raises(RuntimeError, match=r"^Fake failed, as it says above$"),
    ):
        next(iter(runs.values()))()


def test_a_peer_has_the_layers_of_the_workloads_model():
    """Their parameters are as many as the model's."""
    for workload in WORKLOADS.values():
        params = jax.eval_shape(
            workload.network().init, jax.random.key(0), jnp.zeros((1, *workload.image_shape))
        )
        convolutions, dense = peers.LAYERS[workload.model]
        (height, width, channels), total = workload.image_shape, 0
        for features, size, padding, pool in convolutions:
            total += (size * size * channels + 1) * features
            height, width = (n + 2 * padding - size + 1 for n in (height, width))
            height, width = (n // 2 if pool else n for n in (height, width))
            channels = features
        wide = height * width * channels
        for size in (*dense, workload.num_classes):
            total, wide = total + (wide + 1) * size, size
        assert total == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_it_writes_what_it_measured(tmp_path):
    file = tmp_path / "bench.json"
    flags = ["--workloads=lenet", "--cohort=2", "--turns=1", f"--json={file}"]
    command = [sys.executable, "-m", "experiments.bench_throughput", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [result] = json.loads(file.read_text())
    assert result["images"] == "synthetic"
    assert "synthetic images" in done.stdout
    assert result["ratios"] == {}
    # Two clients of 55 steps: the rates are of the same seconds.
    per_round = result["client_steps_per_second"] * result["seconds_per_round"]
    assert per_round == pytest.approx(110)
    ratio = result["gflops"] / result["gemm_gflops"]
    assert result["fraction_of_gemm"] == pytest.approx(ratio)  # of one turn, so the same


@pytest.mark.slow
def test_the_profile_names_parts():
    command = [sys.executable, "-m", "experiments.profile_round", "--workload=lenet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "conv2 backward, products" in done.stdout
    assert "pooling and activations" in done.stdout
