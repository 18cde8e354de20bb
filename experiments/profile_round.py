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
from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.workloads import WORKLOADS, compiled
from noisefl import Hyper, fedavg, keys, make_round
from noisefl.config import as_arrays
from noisefl.models import Lowering, by_name

_WORKLOAD = flags.DEFINE_enum("workload", "mcmahan", list(WORKLOADS), "which")
_CONV = flags.DEFINE_string("conv", "auto", "as in experiments.run")


def main(argv: list[str]) -> None:
    del argv
    workload = WORKLOADS[_WORKLOAD.value]
    model = by_name(workload.model, workload.num_classes, Lowering(conv=_CONV.value))
    round_ = make_round(model, workload.config())
    data, hyper = workload.data(), as_arrays(fedavg(Hyper(learning_rate=0.01)))
    program = compiled(round_, 1, data, hyper)
    state = round_.init(jax.random.key(0))

    def run(state: Any) -> Any:
        return jax.block_until_ready(program(keys.root(1), state, data, hyper))

    state = run(state)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(state)
        seconds = by_operation(glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)[0])
    groups: dict[str, float] = collections.defaultdict(float)
    names = dict(re.findall(r"%?([\w.\-]+) = [^\n]*?op_name=\"([^\"]*)\"", program.as_text()))
    for operation, time in seconds.items():
        groups[group(names.get(operation, ""))] += time
    table = Table(title=f"{_WORKLOAD.value}, {jax.default_backend()}")
    table.add_column("part")
    table.add_column("share", justify="right")
    for part, time in sorted(groups.items(), key=lambda item: -item[1]):
        table.add_row(part, f"{time / sum(groups.values()):.1%}")
    Console(highlight=False).print(table)


def by_operation(file: str) -> dict[str, float]:
    """Nanoseconds of every XLA operation in a trace, loops themselves left out."""
    total: collections.Counter[str] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(file).planes:
        for line in plane.lines:
            for event in line.events:
                if "hlo_op" in dict(event.stats) and not re.match(
                    r"(while|call|conditional)", event.name
                ):
                    total[event.name] += event.duration_ns
    return dict(total)


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
    app.run(main)
