"""The same in plain PyTorch: a loop over clients, each a loop over batches."""

import importlib
from typing import Any

from experiments.bench import torch_network, turns


def main() -> None:
    torch: Any = importlib.import_module("torch")
    setting = turns.given()
    model, size = torch_network.network(setting), setting.client_size
    images, labels = torch_network.images(setting, size), torch_network.labels(setting, size)
    start = [p.detach().clone() for p in model.parameters()]

    def train() -> None:
        total = [torch.zeros_like(p) for p in start]
        for _ in range(setting.clients):
            with torch.no_grad():
                for p, s in zip(model.parameters(), start, strict=True):
                    p.copy_(s)
            optimizer = torch.optim.SGD(model.parameters(), lr=setting.learning_rate)
            for batch in torch.randperm(size).split(setting.batch_size):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                for t, p in zip(total, model.parameters(), strict=True):
                    t.add_(p, alpha=1 / setting.clients)

    turns.take(train)


if __name__ == "__main__":
    main()
