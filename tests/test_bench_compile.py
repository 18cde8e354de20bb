"""`experiments.bench_compile`: kernels and bytes counted in XLA's text, targets, and lowering."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from bench_flags import check_refusals
from conftest import USERS
from jax import export

import noisefl
from experiments.bench import kernels, targets
from experiments.bench.workloads import WORKLOADS
from noisefl import keys, measure, presets, simulate

# A round is 1 kernel, a call of 2, a conditional whose larger branch has 2, 5 passes of 2 kernels,
# a loop of unknown length of 1, and client steps of 3.
TEXT = """HloModule jit_chunk, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused_add (p.0: f32[8], p.1: f32[8]) -> f32[8] {
  %p.0 = f32[8]{0} parameter(0)
  %p.1 = f32[8]{0} parameter(1)
  ROOT %add.1 = f32[8]{0} add(%p.0, %p.1)
}

%recorded (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %k.1 = f32[8]{0} fusion(%a, %a), kind=kLoop, calls=%fused_add
  ROOT %k.2 = f32[8]{0} custom-call(%k.1), custom_call_target="gemm"
}

%small (b: f32[8]) -> f32[8] {
  ROOT %b = f32[8]{0} parameter(0)
}

%large (c: f32[8]) -> (f32[8], s32[]) {
  %c = f32[8]{0} parameter(0)
  %k.3 = f32[8]{0} copy(%c)
  %k.4 = s32[] reduce(%k.3, %k.3), dimensions={0}, to_apply=%fused_add
  ROOT %t.1 = (f32[8]{0}, s32[]) tuple(%k.3, %k.4)
}

%pass (d: (f32[8], s32[])) -> (f32[8], s32[]) {
  %d = (f32[8]{0}, s32[]) parameter(0)
  %g.1 = f32[8]{0} get-tuple-element(%d), index=0
  %k.5 = f32[8]{0} fusion(%g.1, %g.1), kind=kLoop, calls=%fused_add
  ROOT %k.6 = (f32[8]{0}, s32[]) fusion(%k.5), kind=kLoop, calls=%fused_add
}

%unknown (e: f32[8]) -> f32[8] {
  %e = f32[8]{0} parameter(0)
  ROOT %k.7 = f32[8]{0} sort(%e), dimensions={0}, to_apply=%fused_add
}

%client_step (f: f32[8]) -> f32[8] {
  %f = f32[8]{0} parameter(0)
  %k.8 = f32[8]{0} dot(%f, %f), metadata={op_name="jit(chunk)/while/body/jvp(Net)/dot"}
  %k.9 = f32[8]{0} dot(%k.8, %f), metadata={op_name="jit(chunk)/transpose(jvp(Net))/dot"}
  ROOT %k.10 = f32[8]{0} fusion(%k.9, %f), kind=kLoop, calls=%fused_add
}

%goes_on (g: f32[8]) -> pred[] {
  %g = f32[8]{0} parameter(0)
  ROOT %true = pred[] constant(true)
}

%round (h: f32[8]) -> f32[8] {
  %h = f32[8]{0} parameter(0)
  %k.11 = (f32[8]{0}, /*index=1*/(s32[], s32[])) fusion(%h), kind=kLoop, calls=%fused_add
  %c.1 = f32[8]{0} call(%h), to_apply=%recorded
  %i.1 = f32[8]{0} conditional(%c.1, %h, %h), branch_computations={%small, %large}
  %w.1 = (f32[8]{0}, s32[]) while(%i.1), condition=%goes_on, body=%pass, """ + (
    """backend_config={"known_trip_count":{"n":"5"}}
  %w.2 = f32[8]{0} while(%h), condition=%goes_on, body=%unknown
  ROOT %w.3 = f32[8]{0} while(%h), condition=%goes_on, body=%client_step
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %k.12 = f32[8]{0} copy(%x)
  ROOT %w.4 = f32[8]{0} while(%k.12), condition=%goes_on, body=%round, """
    """backend_config={"known_trip_count":{"n":"50"}}
}
"""
)


def test_kernels_are_counted():
    counted = kernels.of_chunk(TEXT)
    assert counted == kernels.Kernels(client_step=3, outside_loops=1 + 2 + 2, rest=5 + 5 * 2 + 1)


def test_kernels_of_a_program_that_xla_compiled():
    """Two rounds of three steps of a gradient."""

    def loss(w):
        return jnp.sum(jnp.sin(w @ w))

    def round_(w, _):
        w = jax.lax.fori_loop(0, 3, lambda _, w: w - jax.grad(loss)(w), w)
        return jnp.sort(w), None

    program = jax.jit(lambda w: jax.lax.scan(round_, w, length=2)[0])
    counted = kernels.of_chunk(str(program.lower(jnp.ones((8, 8))).compile().as_text()))
    assert 2 <= counted.client_step <= 12
    assert 1 <= counted.outside_loops <= counted.rest <= 12
    with pytest.raises(ValueError, match="no rounds of client steps"):
        kernels.of_chunk(str(jax.jit(jnp.sort).lower(jnp.ones(8)).compile().as_text()))


def test_bytes_are_those_of_operands_and_results():
    text = "\nENTRY %main (x: f32[8,2]) -> bf16[8] {\n" + "\n".join(
        [
            "  %x = f32[8,2]{1,0} parameter(0)",
            "  %b = f32[16]{0} bitcast(%x)",
            "  %k = (bf16[8]{0}, pred[]) fusion(%b, %x), kind=kLoop, calls=%f",
            "  ROOT %g = bf16[8]{0} get-tuple-element(%k), index=0",
        ]
    )
    assert kernels.bytes_of(text + "\n}\n") == 2 * 64 + 8 * 2 + 1


def test_bad_input_is_one_line():
    says = {
        "--target=a100": "target='a100': must be one of h100, v5e",
        "--target=": "target='': must name at least one",
        "--clients=": "clients='': must name at least one",
        "--workloads=mnist": "workloads='mnist': must be one of mcmahan",
        "--clients=ten": "clients='ten': must be whole numbers",
        "--clients=1": "clients=1: must be 2 to the 100 of mcmahan, or 0",
        "--lanes=0": "lanes=0: must be at least 1",
    }
    check_refusals("experiments.bench_compile", says)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_without_its_compiler_a_target_says_what_to_install(name, monkeypatch):
    monkeypatch.setattr(targets, "installed", lambda name: False)
    with pytest.raises(ImportError, match=f"target='{name}': needs .*: pip install 'noisefl"):
        targets.device(name)


@functools.cache
def data():
    return WORKLOADS["mcmahan"].data()


@pytest.mark.parametrize(("target", "platform"), [("cpu", "cpu"), ("gpu", "cuda"), ("tpu", "tpu")])
@pytest.mark.parametrize("preset", ["literal", "mcmahan", "own_classes", "quickstart", "two_way"])
def test_every_preset_lowers_for_every_platform(preset, target, platform):
    """A round with all that is measured, as the target's choices have it."""
    experiment = getattr(presets, preset)().replace(strategy=noisefl.Strategy(target=target))
    kept = measure.Standard()
    state = jax.eval_shape(lambda k: simulate.begin(k, experiment, data(), kept), keys.root(0))

    def one(key, state, data, experiment):
        return simulate.measured_step(key, state, data, experiment, kept)

    given = jax.random.key(0), state, data(), experiment.resolved()
    found = export.export(jax.jit(one), platforms=[platform])(*given)
    assert found.platforms == (platform,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "workload", "clients", "lanes", "gigabytes"),
    [
        ("h100", "lenet", 10, 1, 1),  # the quickstart's model
        ("h100", "lenet", 10, 256, 40),
        ("h100", "cifar10", 50, 1, 2),
        ("h100", "mcmahan", 100, 1, 3),
        ("h100", "mcmahan", 10, 64, 40),
        ("h100", "resnet8", 50, 1, 3),
        ("v5e", "lenet", 10, 1, 1),
        ("v5e", "mcmahan", 10, 1, 4),
    ],
)
def test_it_compiles_and_fits(target, workload, clients, lanes, gigabytes, tmp_path):
    """With everything that is measured by default; where XLA's compiler for the target is
    installed."""
    if not targets.installed(target):
        pytest.skip(f"XLA's compiler for {target} is not installed")
    flags = {"target": target, "workloads": workload, "clients": clients, "lanes": lanes}
    command = [sys.executable, "-m", "experiments.bench_compile"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    command.append(f"--json={tmp_path / 'found.json'}")
    subprocess.run(command, check=True, timeout=900, env={**os.environ, **USERS})
    [found] = json.loads((tmp_path / "found.json").read_text())
    assert (found["target"], found["workload"]) == (target, workload)
    assert (found["clients"], found["lanes"]) == (clients, lanes)
    assert found["temp_bytes"] < gigabytes * 1e9
    assert found["kernels_per_client_step"] > 5
    times = {name: found[f"bound_{name}_seconds"] for name in ("operations", "bytes", "launches")}
    assert found["bound_seconds"] == max(times.values()) == times[found["bound_by"]] > 0
