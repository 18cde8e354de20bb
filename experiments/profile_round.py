"""`python -m experiments.profile_round`: where the time of one FedAvg round's training goes.

Runs a workload of `experiments.bench_throughput` under JAX's profiler and adds up the time of XLA's
operations by layer and direction. Operations overlap on several cores, and tracing costs a little:
read the shares, not the seconds.
"""

import collections
import glob
import re
import tempfile
from typing import Any

import jax
from absl import flags
from rich.console import Console

from experiments.bench import command
from experiments.bench.workloads import WORKLOADS, compiled, split_cpu
from experiments.command import end_with_flags
from noisefl import Strategy

_WORKLOAD = flags.DEFINE_enum("workload", "mcmahan", list(WORKLOADS), "which")
_CONV = flags.DEFINE_string("conv", "auto", "as in experiments.run")


def main(argv: list[str]) -> None:
    strategy = command.checked("profile_round", argv, lambda: Strategy(conv=_CONV.value))
    split_cpu()
    workload = WORKLOADS[_WORKLOAD.value]
    program, key, state, data, experiment, _ = compiled(
        workload.experiment(strategy), 1, workload.data()
    )

    def run(state: Any) -> Any:
        return jax.block_until_ready(program(key, state, data, experiment))

    state = run(state)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(state)
        seconds = by_operation(glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)[0])
    groups: collections.Counter[str] = collections.Counter()
    names = dict(re.findall(r"%?([\w.\-]+) = [^\n]*?op_name=\"([^\"]*)\"", program.as_text()))
    for operation, time in seconds.items():
        groups[group(names.get(operation, ""))] += time
    total = groups.total()
    shares = [{"part": p, "share": f"{t / total:.1%}"} for p, t in groups.most_common()]
    title = f"{_WORKLOAD.value}, {jax.default_backend()}"
    Console(highlight=False).print(command.table(title, shares))


def by_operation(file: str) -> collections.Counter[str]:
    """Nanoseconds of every XLA operation in a trace, loops themselves left out."""
    total: collections.Counter[str] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(file).planes:
        for line in plane.lines:
            for event in line.events:
                loop = re.match(r"while|call|conditional", event.name)
                if "hlo_op" in dict(event.stats) and not loop:
                    total[event.name] += event.duration_ns
    return total


def group(op_name: str) -> str:
    """The layer and direction of an operation, from the name that JAX gives it."""
    if layer := re.search(r"/(conv\d|dense\d)/", op_name):
        direction = "backward" if "transpose(" in op_name else "forward"
        product = re.search(r"dot_general|conv_general", op_name)
        return f"{layer[1]} {direction}, {'products' if product else 'layout and sums'}"
    if "jvp(" in op_name:
        pool = re.search(r"reduce_max|/(eq|div|select_n|add|stack|slice)\b", op_name)
        return "pooling and activations" if pool else "loss and the rest of the gradient"
    return "update, gather, average and all else"


if __name__ == "__main__":
    end_with_flags(main)
