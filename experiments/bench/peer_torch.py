"""`python -m experiments.bench.peer_torch WORKLOAD THREADS CLIENTS`: the same in plain PyTorch.

A loop over clients, each a loop over batches, as most simulators train. It reads lines from
standard input; for each it trains CLIENTS clients, averages them, and prints the seconds it took.
"""

import contextlib
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from experiments.bench.workloads import WORKLOADS, Workload

LAYERS = {  # convolutions (channels, kernel, padding, whether pooled), then dense layers
    "mcmahan": ([(32, 5, 2, True), (64, 5, 2, True)], [512]),
    "two_conv": ([(32, 3, 0, False), (64, 3, 0, True)], [128]),
    "lenet5": ([(6, 5, 2, True), (16, 5, 0, True)], [120, 84]),
}


def network(workload: Workload, torch: Any) -> Any:
    """The model of the same name in `noisefl.models`, channels first."""
    nn, layers = torch.nn, []
    convolutions, dense = LAYERS[workload.model]
    for channels, kernel, padding, pooled in convolutions:
        layers += [nn.LazyConv2d(channels, kernel, padding=padding), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pooled else []
    layers.append(nn.Flatten())
    for size in dense:
        layers += [nn.LazyLinear(size), nn.ReLU()]
    return nn.Sequential(*layers, nn.LazyLinear(workload.num_classes))


def main(argv: list[str]) -> None:
    torch: Any = importlib.import_module("torch")  # no dependency of the project
    workload, clients = WORKLOADS[argv[1]], int(argv[3])
    torch.set_num_threads(int(argv[2]))
    height, width, channels = workload.image_shape
    size = workload.client_size
    images = torch.rand(size, channels, height, width)
    labels = torch.randint(0, workload.num_classes, (size,))
    model = network(workload, torch)
    model(images[:1])  # which gives its layers their shapes
    start = [p.detach().clone() for p in model.parameters()]

    def train() -> None:
        total = [torch.zeros_like(p) for p in start]
        for _ in range(clients):
            with torch.no_grad():
                for p, s in zip(model.parameters(), start, strict=True):
                    p.copy_(s)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for batch in torch.randperm(size).split(workload.batch_size):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                for t, p in zip(total, model.parameters(), strict=True):
                    t.add_(p, alpha=1 / clients)

    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        train()
        print(time.perf_counter() - begin, flush=True)


@contextlib.contextmanager
def peers(name: str, cohort: int) -> Iterator[dict[str, Callable[[], float]]]:
    """Seconds of a round by name: PyTorch on all cores in one process, and in one process a core,
    which share the clients. The processes wait between their turns."""
    cores = len(os.sched_getaffinity(0))
    groups = {f"1 process x {cores} threads": [(cores, cohort)]}
    if cores > 1:
        shares = [cohort // cores + (i < cohort % cores) for i in range(cores)]
        groups[f"{cores} processes x 1 thread"] = [(1, share) for share in shares]
    with contextlib.ExitStack() as stack:

        def start(threads: int, clients: int) -> Any:
            command = [sys.executable, "-m", __spec__.name, name, str(threads), str(clients)]
            pipe = subprocess.PIPE
            process: Any = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the PyTorch process did not start")
            return process

        def together(processes: list[Any]) -> float:
            for process in processes:
                process.stdin.write("\n")
                process.stdin.flush()
            return max(float(process.stdout.readline()) for process in processes)

        started = {name: [start(*one) for one in group] for name, group in groups.items()}
        yield {name: lambda group=group: together(group) for name, group in started.items()}


if __name__ == "__main__":
    main(sys.argv)
