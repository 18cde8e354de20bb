"""Other simulators on the same workload, each in processes of its own that wait between turns."""

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bench.turns import Setting
from experiments.bench.workloads import LEARNING_RATE, Workload
from noisefl.errors import nearest, refuse

ROOT = Path(__file__).parents[2]
MODULES = "experiments.bench."  # peer_NAME
LAYERS = {  # convolutions (channels, kernel, padding, whether pooled), then hidden dense layers
    "mcmahan": ([(32, 5, 2, True), (64, 5, 2, True)], [512]),
    "two_conv": ([(32, 3, 0, False), (64, 3, 0, True)], [128]),
    "lenet5": ([(6, 5, 2, True), (16, 5, 0, True)], [120, 84]),
}


class Peer(NamedTuple):
    """One simulator.

    Attributes:
      title: its name.
      module: what must be importable.
      alone: one process of it keeps all cores busy; else also one process a core is tried.
    """

    title: str
    module: str
    alone: bool


PEERS = {
    "torch": Peer("PyTorch", "torch", alone=False),
    "pfl": Peer("pfl-research", "pfl.model.pytorch", alone=False),
    "fedjax": Peer("FedJAX", "fedjax", alone=True),
}


def chosen(words: list[str]) -> dict[str, str]:
    """The Python of each peer, by name, from NAME or NAME=PYTHON.

    Raises:
      ValueError: no such peer, or it is not installed there.
    """
    found = {}
    for word in words:
        name, _, python = word.partition("=")
        if name not in PEERS:
            raise refuse("compare", name, nearest(name, list(PEERS)))
        found[name] = python or sys.executable
        there = python or "this environment"
        looked = [found[name], "-c", f"import {PEERS[name].module}"]
        try:
            imported = subprocess.run(looked, capture_output=True, cwd=ROOT).returncode == 0
        except OSError:
            raise refuse("compare", word, "must be NAME or NAME=PYTHON of an environment") from None
        if not imported:
            allowed = f"needs {PEERS[name].title}, which is not installed in {there}"
            raise refuse("compare", name, allowed)
    return found


@contextlib.contextmanager
def started(
    pythons: dict[str, str], workload: Workload
) -> Iterator[dict[tuple[str, str], Callable[[], float]]]:
    """Seconds of a round by name and form: all cores in one process, or one process a core, which
    share the clients.

    Raises:
      RuntimeError: one of them ended; it has written why.
    """
    cores = len(os.sched_getaffinity(0))
    convolutions, dense = LAYERS[workload.model]

    def setting(threads: int, clients: int) -> str:
        made = Setting(
            convolutions, dense, workload.num_classes, workload.image_shape,
            workload.client_size, workload.batch_size, LEARNING_RATE, clients, threads,
        )  # fmt: skip
        return json.dumps(made._asdict())

    with contextlib.ExitStack() as stack:

        def start(name: str, threads: int, clients: int) -> Any:
            command = [pythons[name], "-m", f"{MODULES}peer_{name}", setting(threads, clients)]
            pipe = subprocess.PIPE
            process: Any = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            said(process, name)
            return process

        def said(process: Any, name: str) -> str:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{PEERS[name].title} failed, as it says above")
            return line

        def together(name: str, processes: list[Any]) -> float:
            for process in processes:
                process.stdin.write("\n")
                process.stdin.flush()
            return max(float(said(process, name)) for process in processes)

        groups = {}
        for name in pythons:
            forms = {f"1 process x {cores} threads": [(cores, workload.cohort)]}
            if cores > 1 and not PEERS[name].alone:
                shares = [
                    workload.cohort // cores + (i < workload.cohort % cores) for i in range(cores)
                ]
                forms[f"{cores} processes x 1 thread"] = [(1, share) for share in shares]
            for form, processes in forms.items():
                groups[name, form] = [start(name, *one) for one in processes]
        yield {key: functools.partial(together, key[0], group) for key, group in groups.items()}
