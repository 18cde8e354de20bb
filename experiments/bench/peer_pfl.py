"""The same in pfl-research (Granqvist et al. 2024, arXiv 2404.06430), on its PyTorch side.

A round is one central iteration of its `FederatedAveraging` in its `SimulatedBackend`.
"""

import importlib
import logging
from typing import Any

from experiments.bench import torch_network, turns


def main() -> None:
    logging.disable(logging.INFO)
    torch: Any = importlib.import_module("torch")
    pfl: Any = {
        name: importlib.import_module(f"pfl.{name}")
        for name in (
            *("aggregate.simulate", "algorithm.base", "algorithm.federated_averaging"),
            *("data.federated_dataset", "data.pytorch", "data.sampling", "hyperparam.base"),
            *("model.pytorch", "metrics"),
        )
    }
    setting = turns.given()
    net, size = torch_network.network(setting), setting.client_size
    loss = torch.nn.functional.cross_entropy

    class Model(torch.nn.Module):
        """With the two methods that pfl asks for."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Any) -> Any:
            return self.net(x)

        def loss(self, x: Any, y: Any, eval: bool = False) -> Any:
            self.eval() if eval else self.train()
            return loss(self(x), y)

        def metrics(self, x: Any, y: Any, eval: bool = True) -> Any:
            with torch.no_grad():
                total = loss(self(x), y, reduction="sum").item()
            return {"loss": pfl["metrics"].Weighted(total, len(y))}

    module = Model()
    model = pfl["model.pytorch"].PyTorchModel(
        module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    clients = [
        (torch_network.images(setting, size), torch_network.labels(setting, size))
        for _ in range(setting.clients)
    ]

    def dataset() -> Any:
        def of_user(user: int) -> Any:
            order = torch.randperm(size)  # pfl does not shuffle
            images, labels = clients[user]
            return pfl["data.pytorch"].PyTorchTensorDataset((images[order], labels[order]))

        users = pfl["data.sampling"].get_user_sampler("minimize_reuse", list(range(len(clients))))
        return pfl["data.federated_dataset"].FederatedDataset(of_user, users)

    backend = pfl["aggregate.simulate"].SimulatedBackend(dataset(), dataset())
    rounds = pfl["algorithm.base"].NNAlgorithmParams(
        central_num_iterations=1,
        evaluation_frequency=1_000_000,
        train_cohort_size=setting.clients,
        val_cohort_size=0,
    )
    local = pfl["hyperparam.base"].NNTrainHyperParams(
        local_batch_size=setting.batch_size,
        local_num_epochs=1,
        local_learning_rate=setting.learning_rate,
    )
    look = pfl["hyperparam.base"].NNEvalHyperParams(local_batch_size=size)

    def train() -> None:
        algorithm = pfl["algorithm.federated_averaging"].FederatedAveraging()
        algorithm.run(rounds, backend, model, local, look, [], send_metrics_to_platform=False)

    turns.take(train)


if __name__ == "__main__":
    main()
