"""`python -m experiments.bench_throughput`: how near a round comes to the machine's matrix rate.

Each workload is one FedAvg round (noise off) of a published setting on synthetic images. Rates are
of `workloads.operations`: products alone, convolutions counted directly, whatever their lowering.
The machine's own rate is that of a 2048 × 2048 float32 product in the same process (8192 off the
CPU). Everything that is compared is timed in turn, several times; ratios are medians over the
turns, so that the machine's moods cancel.
"""

import dataclasses
import re
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from experiments.bench import command
from experiments.bench.peers import PEERS, chosen, started
from experiments.bench.workloads import WORKLOADS, compiled, operations, split_cpu
from experiments.command import end_with_flags
from noisefl import Strategy, evaluate
from noisefl.errors import nearest, refuse

_WORKLOADS = flags.DEFINE_list("workloads", list(WORKLOADS), "which, of all")
_COMPARE = flags.DEFINE_list(
    "compare", [], f"time others as well: {', '.join(PEERS)}, or NAME=PYTHON of their environment"
)
_JSON = flags.DEFINE_string("json", None, "file for the results")
_TURNS = flags.DEFINE_integer("turns", 5, "times that each is timed", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds_per_call", 0, "0: 1 on a CPU, 50 elsewhere", lower_bound=0)
_COHORT = flags.DEFINE_integer("cohort", 0, "clients a round; 0: the workload's", lower_bound=0)
_AT_ONCE = flags.DEFINE_string("clients_at_once", "auto", "as in experiments.run")
_CONV = flags.DEFINE_string("conv", "auto", "as in experiments.run")
_PRECISION = flags.DEFINE_string("precision", "default", "as in experiments.run")


def main(argv: list[str]) -> None:
    strategy, pythons = command.checked("bench_throughput", argv, check, _JSON.value)
    split_cpu()
    console = Console(highlight=False)
    device = jax.devices()[0].device_kind
    console.print(f"{jax.default_backend()} ({device}), jax {jax.__version__}; synthetic images")
    results = []
    for name in _WORKLOADS.value:
        with console.status(f"{name}: compiling and timing"):
            try:
                results.append(measure(name, strategy, pythons))
            except RuntimeError as error:
                sys.exit(f"experiments.bench_throughput: {error}")
        console.print(table(results[-1]))
    command.write(_JSON.value, results)


def check() -> tuple[Strategy, dict[str, str]]:
    """The strategy and each peer's Python; raises one line about the first flag that is wrong."""
    for name in _WORKLOADS.value:
        if name not in WORKLOADS:
            raise refuse("workloads", name, nearest(name, list(WORKLOADS)))
        if _COHORT.value == 1 or _COHORT.value > WORKLOADS[name].num_clients:
            allowed = f"must be 2 to the {WORKLOADS[name].num_clients} clients of {name}"
            raise refuse("cohort", _COHORT.value, allowed)
    if not re.fullmatch(r"auto|\d+", _AT_ONCE.value):
        raise refuse("clients_at_once", _AT_ONCE.value, "must be a whole number, or auto")
    at_once = None if _AT_ONCE.value == "auto" else int(_AT_ONCE.value)
    strategy = Strategy(clients_at_once=at_once, conv=_CONV.value, precision=_PRECISION.value)
    return strategy, chosen(_COMPARE.value)


def measure(name: str, strategy: Strategy, pythons: dict[str, str]) -> dict[str, Any]:
    """One workload: an object of the JSON file."""
    workload = WORKLOADS[name]
    workload = dataclasses.replace(workload, cohort=_COHORT.value or workload.cohort)
    cpu = jax.default_backend() == "cpu"
    rounds = _ROUNDS.value or (1 if cpu else 50)
    experiment = workload.experiment(strategy)
    strategy, apply = experiment.strategy, experiment.functions.apply

    program, key, state, data, experiment, compile_seconds = compiled(
        experiment, rounds, workload.data()
    )
    on, axis = state.round.sharding.mesh, experiment.strategy.clients_axis

    def train() -> None:
        nonlocal state
        state = jax.block_until_ready(program(key, state, data, experiment))

    def right(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return evaluate.accuracy(apply, params, images, labels, strategy.eval_batch or 1, axis)

    count = jax.jit(jax.shard_map(right, mesh=on, in_specs=P(), out_specs=P(), check_vma=False))
    multiply = jax.jit(jnp.matmul)
    square = jnp.ones((2048, 2048) if cpu else (8192, 8192))
    per_image = operations(experiment.model, workload.image_shape)
    work = {
        "round": per_image.step * workload.images * rounds,
        "gemm": 2 * square.shape[0] ** 3,
        "evaluation": per_image.forward * data.test_labels.size,
    }
    with started(pythons, workload) as others:
        runs: dict[Any, Callable[[], float]] = {
            "round": timed(train),
            "gemm": timed(lambda: multiply(square, square).block_until_ready()),
            "evaluation": timed(
                lambda: count(state.base, data.test_images, data.test_labels).block_until_ready()
            ),
            **others,
        }
        turns = [{run: seconds() for run, seconds in runs.items()} for _ in range(1 + _TURNS.value)]
    turns = turns[1:]  # one is not counted
    seconds = {run: median(turn[run] for turn in turns) for run in runs}
    gflops = {run: work[run] / seconds[run] / 1e9 for run in work}
    of_gemm = {
        run: median(work[run] / turn[run] / (work["gemm"] / turn["gemm"]) for turn in turns)
        for run in work
    }
    forms: dict[str, list[Any]] = {}
    for key in others:
        forms.setdefault(key[0], []).append(key)

    def ratio(peer: str) -> float:
        """How many times longer its better form takes, in the median turn."""
        each = [min(turn[key] for key in forms[peer]) * rounds / turn["round"] for turn in turns]
        return median(each)

    return {
        "workload": name,
        "source": workload.source,
        "images": "synthetic",
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "strategy": f"clients_at_once={strategy.clients_at_once}, gather={strategy.gather}, "
        f"conv={strategy.conv}, precision={strategy.precision}",
        "seconds_per_round": seconds["round"] / rounds,
        "client_steps_per_second": workload.steps * rounds / seconds["round"],
        "images_per_second": workload.images * rounds / seconds["round"],
        "gflops": gflops["round"],
        "gemm_gflops": gflops["gemm"],
        "fraction_of_gemm": of_gemm["round"],
        "evaluation_images_per_second": data.test_labels.size / seconds["evaluation"],
        "evaluation_gflops": gflops["evaluation"],
        "evaluation_fraction_of_gemm": of_gemm["evaluation"],
        "ratios": {peer: ratio(peer) for peer in forms},
        "peer_seconds_per_round": {
            peer: {key[1]: seconds[key] for key in keys} for peer, keys in forms.items()
        },
        "compile_seconds": compile_seconds,
        "devices": on.devices.size,
        "peak_memory_bytes": peak_memory(program),
        "rounds_per_call": rounds,
        "turns": len(turns),
    }


def timed(run: Callable[[], Any]) -> Callable[[], float]:
    def seconds() -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    return seconds


def peak_memory(program: Any) -> int:
    """Bytes: the device's own peak where it keeps one, else what XLA plans for the program."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    plan = program.memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return held - plan.alias_size_in_bytes


def table(result: dict[str, Any]) -> Table:
    """What was measured of one workload, in lines."""
    numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
    for peer, of_forms in result["peer_seconds_per_round"].items():
        for form, seconds in of_forms.items():
            numbers[f"{PEERS[peer].title}, {form}, seconds per round"] = seconds
        numbers[f"times faster than {PEERS[peer].title}"] = result["ratios"][peer]
    lines = [{"what": "strategy", "value": result["strategy"]}]
    for name, number in numbers.items():
        text = f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"
        lines.append({"what": name.replace("_", " "), "value": text})
    return command.table(f"{result['workload']} ({result['source']})", lines)


if __name__ == "__main__":
    end_with_flags(main)
