"""`python -m experiments.bench_throughput`: how near a round comes to the machine's matrix rate.

Each workload is one FedAvg round (noise off) of a published setting on synthetic images. Rates are
of `operations.count`: products alone, convolutions counted directly, whatever their lowering. The
machine's own rate is that of a 2048 × 2048 float32 product in the same process. Everything that
is compared is timed in turn, several times; ratios are medians over the turns.
"""

import contextlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments import operations
from experiments.workloads import WORKLOADS, Workload, compiled
from noisefl import Hyper, evaluate, fedavg, make_round, strategy
from noisefl.config import as_arrays, nearest, refuse
from noisefl.models import Lowering, by_name

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
    try:
        lowering, at_once = checked(argv)
    except (ValueError, OSError) as error:
        sys.exit(f"experiments.bench_throughput: {error}")
    console = Console(highlight=False)
    device = jax.devices()[0].device_kind
    console.print(f"{jax.default_backend()} ({device}), jax {jax.__version__}; synthetic images")
    results = []
    for name in _WORKLOADS.value:
        with console.status(f"{name}: compiling and timing"):
            results.append(measure(name, lowering, at_once))
        console.print(table(results[-1]))
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(results, indent=1) + "\n")


def checked(argv: list[str]) -> tuple[Lowering, int | None]:
    """The lowering and clients_at_once of the flags; one line about the first that is wrong."""
    if argv[1:]:
        raise ValueError(f"unexpected argument {argv[1]!r}: flags begin with --")
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
    if _JSON.value:
        Path(_JSON.value).touch()
    at_once = None if _AT_ONCE.value == "auto" else int(_AT_ONCE.value)
    return Lowering(conv=_CONV.value, precision=_PRECISION.value), at_once


def measure(name: str, lowering: Lowering, at_once: int | None) -> dict[str, Any]:
    """One workload: an object of the JSON file."""
    workload = WORKLOADS[name]
    if _COHORT.value:
        workload = workload.__class__(**{**workload.__dict__, "cohort": _COHORT.value})
    cpu = jax.default_backend() == "cpu"
    rounds = _ROUNDS.value or (1 if cpu else 50)
    config = workload.config(clients_at_once=at_once)
    model = by_name(workload.model, workload.num_classes, lowering)
    data, round_ = workload.data(), make_round(model, config)
    hyper = as_arrays(fedavg(Hyper(learning_rate=0.01)))
    key = jax.random.key(0)

    begin = time.perf_counter()
    many = compiled(round_, rounds, data, hyper)
    compile_seconds = time.perf_counter() - begin
    state = round_.init(key)

    def train() -> None:
        nonlocal state
        state = jax.block_until_ready(many(key, state, data, hyper))

    test = data.test_images, data.test_labels
    batch = strategy.eval_batch(config)
    count = jax.jit(lambda params: evaluate.count_correct(model.apply, params, *test, batch))
    square = jnp.ones((2048, 2048) if cpu else (8192, 8192))
    multiply = jax.jit(jnp.matmul)
    gemm_operations = 2 * square.shape[0] ** 3

    with peers(name, workload) as peer_rounds:
        runs: dict[str, Callable[[], float]] = {
            "round": timed(train),
            "gemm": timed(lambda: multiply(square, square).block_until_ready()),
            "evaluation": timed(lambda: count(state.base).block_until_ready()),
            **peer_rounds,
        }
        turns = take_turns(runs)
    seconds = {run: statistics.median(turn[run] for turn in turns) for run in runs}
    per_image = operations.count(model, workload.image_shape)
    work = per_image.step * workload.images * rounds
    gflops = work / seconds["round"] / 1e9
    judged = per_image.forward * len(test[1])
    of_gemm = [
        (work / turn["round"]) / (gemm_operations / turn["gemm"]) for turn in turns
    ]  # turn by turn, so that the machine's moods cancel
    eval_of_gemm = [
        (judged / turn["evaluation"]) / (gemm_operations / turn["gemm"]) for turn in turns
    ]
    against = [
        min(turn[peer] for peer in peer_rounds) / (turn["round"] / rounds)
        for turn in turns
        if peer_rounds
    ]
    return {
        "workload": name,
        "source": workload.source,
        "images": "synthetic",
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "strategy": f"clients_at_once={strategy.clients_at_once(config)}, "
        f"gather={strategy.gather(config)}, conv={lowering.conv}, precision={lowering.precision}",
        "seconds_per_round": seconds["round"] / rounds,
        "client_steps_per_second": workload.steps * rounds / seconds["round"],
        "images_per_second": workload.images * rounds / seconds["round"],
        "gflops": gflops,
        "gemm_gflops": gemm_operations / seconds["gemm"] / 1e9,
        "fraction_of_gemm": statistics.median(of_gemm),
        "evaluation_images_per_second": len(test[1]) / seconds["evaluation"],
        "evaluation_gflops": judged / seconds["evaluation"] / 1e9,
        "evaluation_fraction_of_gemm": statistics.median(eval_of_gemm),
        "torch_ratio": statistics.median(against) if against else None,
        "torch_seconds_per_round": {peer: seconds[peer] for peer in peer_rounds} or None,
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


def take_turns(runs: dict[str, Callable[[], float]]) -> list[dict[str, float]]:
    """A B C, A B C, …: seconds of each in each turn, after one turn that is not counted."""
    turns = [{name: run() for name, run in runs.items()} for _ in range(_TURNS.value + 1)]
    return turns[1:]


@contextlib.contextmanager
def peers(name: str, workload: Workload) -> Iterator[dict[str, Callable[[], float]]]:
    """PyTorch on all cores in one process, and in one process a core, which share the clients.

    The processes wait between their turns.
    """
    if _COMPARE.value is None:
        yield {}
        return
    cores = len(os.sched_getaffinity(0))
    groups = {f"1 process x {cores} threads": [(cores, workload.cohort)]}
    if cores > 1:
        shares = [workload.cohort // cores + (i < workload.cohort % cores) for i in range(cores)]
        groups[f"{cores} processes x 1 thread"] = [(1, share) for share in shares]
    with contextlib.ExitStack() as stack:

        def start(threads: int, clients: int) -> subprocess.Popen:
            command = [sys.executable, "-m", "experiments.peer_torch", name]
            process = subprocess.Popen(
                [*command, str(threads), str(clients)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the PyTorch process did not start")
            return process

        started = {
            group: [start(*member) for member in members] for group, members in groups.items()
        }

        def together(processes: list[subprocess.Popen]) -> float:
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            return max(float(process.stdout.readline()) for process in processes)  # pyright: ignore

        yield {
            group: (lambda processes=processes: together(processes))
            for group, processes in started.items()
        }


def peak_memory(program: Any) -> int:
    """Bytes: the device's own peak where it keeps one, else what XLA plans for the program."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    plan = program.memory_analysis()
    return (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes
    )


def table(result: dict[str, Any]) -> Table:
    """One workload in lines."""
    shown = Table(title=f"{result['workload']} ({result['source']})", title_justify="left")
    shown.add_column("what")
    shown.add_column("value", justify="right")
    torch = result["torch_seconds_per_round"] or {}
    lines = [
        ("strategy", result["strategy"]),
        ("seconds a round", f"{result['seconds_per_round']:.4f}"),
        ("client steps/s", f"{result['client_steps_per_second']:,.0f}"),
        ("images/s", f"{result['images_per_second']:,.0f}"),
        ("training, GFLOP/s", f"{result['gflops']:.1f}"),
        ("machine's GEMM, GFLOP/s", f"{result['gemm_gflops']:.1f}"),
        ("training / GEMM", f"{result['fraction_of_gemm']:.2f}"),
        ("evaluation, images/s", f"{result['evaluation_images_per_second']:,.0f}"),
        ("evaluation / GEMM", f"{result['evaluation_fraction_of_gemm']:.2f}"),
        *((f"PyTorch, {group}, s a round", f"{value:.4f}") for group, value in torch.items()),
        *([("faster than the better", f"{result['torch_ratio']:.2f} x")] if torch else []),
        ("compilation, s", f"{result['compile_seconds']:.1f}"),
        ("memory, MB", f"{result['peak_memory_bytes'] / 1e6:,.0f}"),
    ]
    for line in lines:
        shown.add_row(*line)
    return shown


if __name__ == "__main__":
    app.run(main)
