"""`python -m experiments.peer_torch WORKLOAD THREADS CLIENTS`: the same training in plain PyTorch.

A loop over clients, each a loop over batches, as most simulators train. It reads lines from
standard input; for each it trains CLIENTS clients, averages them, and prints the seconds it took.
"""

import importlib
import sys
import time
from typing import Any

from experiments.workloads import WORKLOADS


def network(workload: Any, torch: Any) -> Any:
    """The model of the same name in `noisefl.models`, channels first."""
    nn = torch.nn
    channels, classes, edge = workload.image_shape[2], workload.num_classes, workload.image_shape[0]
    relu, pool = nn.ReLU, lambda: nn.MaxPool2d(2)
    layers = {
        "mcmahan": lambda: [
            *(nn.Conv2d(channels, 32, 5, padding=2), relu(), pool()),
            *(nn.Conv2d(32, 64, 5, padding=2), relu(), pool()),
            *(nn.Flatten(), nn.Linear(64 * (edge // 4) ** 2, 512), relu(), nn.Linear(512, classes)),
        ],
        "two_conv": lambda: [
            *(nn.Conv2d(channels, 32, 3), relu(), nn.Conv2d(32, 64, 3), relu(), pool()),
            nn.Flatten(),
            *(nn.Linear(64 * ((edge - 4) // 2) ** 2, 128), relu(), nn.Linear(128, classes)),
        ],
        "lenet5": lambda: [
            *(nn.Conv2d(channels, 6, 5, padding=2), relu(), pool()),
            *(nn.Conv2d(6, 16, 5), relu(), pool(), nn.Flatten()),
            *(nn.Linear(16 * (edge // 2 // 2 - 2) ** 2, 120), relu()),
            *(nn.Linear(120, 84), relu(), nn.Linear(84, classes)),
        ],
    }
    return nn.Sequential(*layers[workload.model]())


def main(argv: list[str]) -> None:
    torch: Any = importlib.import_module("torch")  # no dependency of the project
    workload, clients = WORKLOADS[argv[1]], int(argv[3])
    torch.set_num_threads(int(argv[2]))
    height, width, channels = workload.image_shape
    size = workload.client_size
    images = torch.rand(size, channels, height, width)
    labels = torch.randint(0, workload.num_classes, (size,))
    model = network(workload, torch)
    start = [p.detach().clone() for p in model.parameters()]
    loss_of = torch.nn.functional.cross_entropy

    def train() -> None:
        total = [torch.zeros_like(p) for p in start]
        for _ in range(clients):
            with torch.no_grad():
                for p, s in zip(model.parameters(), start, strict=True):
                    p.copy_(s)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            order = torch.randperm(size)
            for batch in order.split(workload.batch_size):
                optimizer.zero_grad()
                loss_of(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                for t, p in zip(total, model.parameters(), strict=True):
                    t.add_(p, alpha=1 / clients)

    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        train()
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main(sys.argv)
