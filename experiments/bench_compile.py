"""`python -m experiments.bench_compile`: what rounds would be on an accelerator that is not there.

XLA compiles a chunk of rounds of the quickstart's scheme, with all that the driver records, for an
NVIDIA H100 or a TPU v5e on any machine. The memory is what it plans, the kernels are those in its
text (of a TPU also copies and slices that are no launches). The bound is no measurement: the
largest of a round's operations at the peak rate, the bytes of its kernels' operands and results at
the peak bandwidth, as if nothing stayed in a cache, and its kernels one after another
(`bench.targets` has the constants).
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import SingleDeviceSharding
from rich.console import Console

from experiments.bench import command, targets
from experiments.bench.kernels import bytes_of, of_chunk
from experiments.bench.targets import TARGETS, Target
from experiments.bench.workloads import WORKLOADS, Workload, operations
from experiments.command import end_with_flags
from noisefl import (
    Cohort,
    Experiment,
    Federation,
    Strategy,
    evaluate,
    layout,
    measure,
    mesh,
    parts,
    presets,
    sweep,
)
from noisefl.errors import nearest, refuse
from noisefl.local import SGD, Training

ROUNDS = 50  # of a program
KEPT = measure.Standard()
COMPILED = WORKLOADS | {  # no peer has the last: its layers are not a sequence
    "resnet8": dataclasses.replace(
        WORKLOADS["cifar10"], source="ResNet-8, GroupNorm", model="resnet8"
    )
}

_TARGET = flags.DEFINE_list("target", list(TARGETS), f"for what: {', '.join(TARGETS)}")
_WORKLOADS = flags.DEFINE_list("workloads", list(COMPILED), "which, of all")
_CLIENTS = flags.DEFINE_list("clients", ["0"], "clients a round; 0: the workload's; or several")
_LANES = flags.DEFINE_list("lanes", ["1"], "lanes of a sweep side by side, or several")
_JSON = flags.DEFINE_string("json", None, "file for the results")


@dataclasses.dataclass(frozen=True)
class Case:
    """One program. The workload has the cohort that was asked for."""

    name: str
    target: str
    device: Any
    workload: Workload
    lanes: int

    @property
    def of(self) -> Target:
        return TARGETS[self.target]

    def experiment(self) -> Experiment:
        """The quickstart's scheme around the workload's model and local training."""
        made = presets.quickstart().replace(
            model=self.workload.network(),
            local=Training(SGD(learning_rate=0.01), batch_size=self.workload.batch_size),
            cohort=Cohort(self.workload.cohort),
            strategy=Strategy(target=self.of.strategy),
        )
        return made.resolved()

    def compile(self, function: Callable[..., Any], *shapes: Any) -> Any:
        """A function of arrays of these shapes, for the device."""
        place = SingleDeviceSharding(self.device)
        there = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
        )
        return jax.jit(function).lower(*there).compile(compiler_options=self.of.options)


def main(argv: list[str]) -> None:
    cases = command.checked("bench_compile", argv, check, _JSON.value)
    console = Console(highlight=False)
    console.print(f"jax {jax.__version__}; compiled, not measured; {ROUNDS} rounds a program")
    results = []
    for case in cases:
        with console.status(f"{case.name}, {case.target}: compiling"):
            results.append(compiled(case))
        console.print(command.table(f"{case.name} for {case.of.title}", lines(results[-1])))
        command.write(_JSON.value, results)


def check() -> list[Case]:
    """Every combination of the flags; raises one line about the first that is wrong."""
    known = {"target": TARGETS, "workloads": COMPILED}
    given = {"target": _TARGET, "workloads": _WORKLOADS, "clients": _CLIENTS, "lanes": _LANES}
    for flag, words in given.items():
        if not words.value:
            raise refuse(flag, "", "must name at least one")
        for word in words.value:
            if flag in known and word not in known[flag]:
                raise refuse(flag, word, nearest(word, list(known[flag])))
    asked = [
        (
            name,
            dataclasses.replace(COMPILED[name], cohort=clients or COMPILED[name].cohort),
            lanes,
        )
        for name in _WORKLOADS.value
        for clients in _numbers("clients", _CLIENTS.value)
        for lanes in _numbers("lanes", _LANES.value)
    ]
    for name, workload, lanes in asked:
        if not 2 <= workload.cohort <= workload.num_clients:
            allowed = f"must be 2 to the {workload.num_clients} of {name}, or 0"
            raise refuse("clients", workload.cohort, allowed)
        if lanes < 1:
            raise refuse("lanes", lanes, "must be at least 1")
    devices = {target: targets.device(target) for target in _TARGET.value}
    return [
        Case(name, target, device, workload, lanes)
        for name, workload, lanes in asked
        for target, device in devices.items()
    ]


def _numbers(flag: str, words: list[str]) -> list[int]:
    for word in words:
        if not word.strip().isdecimal():
            raise refuse(flag, word, "must be whole numbers")
    return [int(word) for word in words]


def compiled(case: Case) -> dict[str, Any]:
    """One program: an object of the JSON file."""
    experiment, workload, of = case.experiment(), case.workload, case.of
    data = layout.stack([workload.data()])
    on = mesh.make(devices=[case.device])
    begin = time.perf_counter()
    traced = sweep.trace(parts.lanes([experiment]), data, case.lanes, ROUNDS, on, KEPT)
    found = traced.chunk.lower().compile(compiler_options=of.options)
    seconds = time.perf_counter() - begin
    plan, kernels = found.memory_analysis(), of_chunk(found.as_text())

    groups = -(-workload.cohort // (experiment.strategy.clients_at_once or 1))
    steps = groups * -(-workload.client_size // workload.batch_size)  # one after another
    looked_at = evaluated(workload, data)
    per_image = operations(workload.network(), workload.image_shape)
    work = per_image.step * workload.images + per_image.forward * looked_at
    moved = steps * bytes_of_step(case, experiment) + looked_at * bytes_of_image(case, experiment)
    bounds = {
        "operations": case.lanes * work / of.flops,
        "bytes": case.lanes * moved / of.bandwidth,
        "launches": (steps * kernels.client_step + kernels.rest) * of.launch,
    }
    by = max(bounds, key=lambda name: bounds[name])
    return {
        "target": case.target,
        "workload": case.name,
        "clients": workload.cohort,
        "lanes": case.lanes,
        "compile_seconds": seconds,
        "argument_bytes": plan.argument_size_in_bytes,
        "result_bytes": plan.output_size_in_bytes,
        "temp_bytes": plan.temp_size_in_bytes,
        "client_steps_in_turn": steps,
        "kernels_per_client_step": kernels.client_step,
        "kernels_per_round": kernels.rest,
        "kernels_outside_loops": kernels.outside_loops,
        "operations": case.lanes * work,
        "bytes_moved": case.lanes * moved,
        **{f"bound_{name}_seconds": bound for name, bound in bounds.items()},
        "bound_seconds": bounds[by],
        "bound_by": by,
    }


def evaluated(workload: Workload, data: Federation) -> int:
    """Images forwarded by a round's measurements, at most: W, G and a pair on test, G and the pair
    on validation, every client's own model. What calibration reads is not known beforehand."""
    own = workload.cohort * KEPT.local_test_size
    return 4 * data.test_labels.size + 3 * data.validation_labels.size + own


def bytes_of_step(case: Case, experiment: Experiment) -> float:
    """That the kernels of one step of all clients side by side read and write."""
    side_by_side = min(experiment.strategy.clients_at_once or 1, case.workload.cohort)
    batch = side_by_side, case.workload.batch_size
    model, rate = experiment.functions, 0.01

    def step(params: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = jax.nn.log_softmax(model.apply(params, evaluate.scale(images)))
            return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], 1))

        return jax.tree.map(lambda w, g: w - rate * g, params, jax.grad(loss)(params))

    params = jax.eval_shape(
        lambda keys: jax.vmap(lambda key: model.init(key, case.workload.image_shape))(keys),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), side_by_side)),
    )
    images = jax.ShapeDtypeStruct((*batch, *case.workload.image_shape), jnp.uint8)
    labels = jax.ShapeDtypeStruct(batch, jnp.int32)
    return bytes_of(case.compile(jax.vmap(step), params, images, labels).as_text())


def bytes_of_image(case: Case, experiment: Experiment) -> float:
    """That the kernels of a forward pass of an evaluation read and write, an image."""
    model, batch = experiment.functions, experiment.strategy.eval_batch or 1
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), case.workload.image_shape))
    images = jax.ShapeDtypeStruct((batch, *case.workload.image_shape), jnp.uint8)
    forward = case.compile(lambda p, x: model.apply(p, evaluate.scale(x)), params, images)
    return bytes_of(forward.as_text()) / batch


def lines(result: dict[str, Any]) -> list[dict[str, str]]:
    """The object as rows of a table."""
    rows = []
    for name, value in result.items():
        if name.endswith("_bytes"):
            text = f"{value / 1e9:.3f} GB"
        elif name.startswith("bound") and name.endswith("_seconds"):
            text = f"{1000 * value:.2f} ms"
        elif isinstance(value, float):
            text = f"{value:,.1f}" if value < 1e6 else f"{value:.3g}"
        else:
            text = f"{value:,}" if isinstance(value, int) and value < 1e9 else str(value)
        rows.append({"what": name.replace("_", " "), "value": text})
    return rows


if __name__ == "__main__":
    end_with_flags(main)
