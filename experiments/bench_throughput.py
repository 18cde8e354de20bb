"""`python -m experiments.bench_throughput`: how near a round comes to the machine's matrix rate.

Each workload is one FedAvg round (noise off) of a published setting on synthetic images. Rates are
of `workloads.operations`: products alone, convolutions counted directly, whatever their lowering.
The machine's own rate is that of a 2048 × 2048 float32 product in the same process (8192 off the
CPU). Everything that is compared is timed in turn, several times; ratios are medians over the
turns, so that the machine's moods cancel.
"""

import contextlib
import dataclasses
import importlib.util
import re
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from rich.console import Console
from rich.table import Table

import noisefl
from experiments.bench import command
from experiments.bench.peer_torch import peers
from experiments.bench.workloads import WORKLOADS, compiled, operations
from noisefl import Strategy, evaluate
from noisefl.errors import nearest, refuse

_WORKLOADS = flags.DEFINE_list("workloads", list(WORKLOADS), "which, of all")
_COMPARE = flags.DEFINE_enum("compare", None, ["torch"], "time a plain PyTorch loop as well")
_JSON = flags.DEFINE_string("json", None, "file for the results")
_TURNS = flags.DEFINE_integer("turns", 5, "times that each is timed", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds_per_call", 0, "0: 1 on a CPU, 50 elsewhere", lower_bound=0)
_COHORT = flags.DEFINE_integer("cohort", 0, "clients a round; 0: the workload's", lower_bound=0)
_AT_ONCE = flags.DEFINE_string("clients_at_once", "auto", "as in experiments.run")
_CONV = flags.DEFINE_string("conv", "auto", "as in experiments.run")
_PRECISION = flags.DEFINE_string("precision", "default", "as in experiments.run")


def main(argv: list[str]) -> None:
    strategy = command.checked("bench_throughput", argv, check, _JSON.value)
    console = Console(highlight=False)
    device = jax.devices()[0].device_kind
    console.print(f"{jax.default_backend()} ({device}), jax {jax.__version__}; synthetic images")
    results = []
    for name in _WORKLOADS.value:
        with console.status(f"{name}: compiling and timing"):
            results.append(measure(name, strategy))
        console.print(table(results[-1]))
    command.write(_JSON.value, results)


def check() -> Strategy:
    """That of the flags; raises one line about the first that is wrong."""
    for name in _WORKLOADS.value:
        if name not in WORKLOADS:
            raise refuse("workloads", name, nearest(name, list(WORKLOADS)))
        if _COHORT.value == 1 or _COHORT.value > WORKLOADS[name].num_clients:
            allowed = f"must be 2 to the {WORKLOADS[name].num_clients} clients of {name}"
            raise refuse("cohort", _COHORT.value, allowed)
    if _COMPARE.value == "torch" and importlib.util.find_spec("torch") is None:
        raise refuse("compare", "torch", "needs PyTorch, which is not installed")
    if not re.fullmatch(r"auto|\d+", _AT_ONCE.value):
        raise refuse("clients_at_once", _AT_ONCE.value, "must be a whole number, or auto")
    at_once = None if _AT_ONCE.value == "auto" else int(_AT_ONCE.value)
    return Strategy(clients_at_once=at_once, conv=_CONV.value, precision=_PRECISION.value)


def measure(name: str, strategy: Strategy) -> dict[str, Any]:
    """One workload: an object of the JSON file."""
    workload = WORKLOADS[name]
    workload = dataclasses.replace(workload, cohort=_COHORT.value or workload.cohort)
    cpu = jax.default_backend() == "cpu"
    rounds = _ROUNDS.value or (1 if cpu else 50)
    experiment, data = workload.experiment(strategy), workload.data()
    strategy, apply, root = experiment.strategy, experiment.functions.apply, jax.random.key(0)

    begin = time.perf_counter()
    many = compiled(experiment, rounds, data)
    compile_seconds = time.perf_counter() - begin
    state = noisefl.init(root, experiment, data)

    def train() -> None:
        nonlocal state
        state = jax.block_until_ready(many(root, state, data, experiment))

    def right(params: Any) -> jax.Array:
        images, labels = data.test_images, data.test_labels
        return evaluate.count_correct(apply, params, images, labels, strategy.eval_batch or 1)

    count, multiply = jax.jit(right), jax.jit(jnp.matmul)
    square = jnp.ones((2048, 2048) if cpu else (8192, 8192))
    per_image = operations(experiment.model, workload.image_shape)
    work = {
        "round": per_image.step * workload.images * rounds,
        "gemm": 2 * square.shape[0] ** 3,
        "evaluation": per_image.forward * data.test_labels.size,
    }
    compare = peers(name, workload.cohort) if _COMPARE.value else contextlib.nullcontext({})
    with compare as others:
        runs: dict[str, Callable[[], float]] = {
            "round": timed(train),
            "gemm": timed(lambda: multiply(square, square).block_until_ready()),
            "evaluation": timed(lambda: count(state.base).block_until_ready()),
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
    ratios = [min(turn[o] for o in others) * rounds / turn["round"] for turn in turns if others]
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
        "torch_ratio": median(ratios) if ratios else None,
        "torch_seconds_per_round": {other: seconds[other] for other in others} or None,
        "compile_seconds": compile_seconds,
        "peak_memory_bytes": peak_memory(many),
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
    for group, seconds in (result["torch_seconds_per_round"] or {}).items():
        numbers[f"PyTorch, {group}, seconds per round"] = seconds
    lines = [{"what": "strategy", "value": result["strategy"]}]
    for name, number in numbers.items():
        text = f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"
        lines.append({"what": name.replace("_", " "), "value": text})
    return command.table(f"{result['workload']} ({result['source']})", lines)


if __name__ == "__main__":
    app.run(main)
