"""The same in FedJAX (Ro et al. 2021, arXiv 2108.02117), with a model of its Haiku."""

import importlib
import itertools
from typing import Any

from experiments.bench import turns


def main() -> None:
    jax: Any = importlib.import_module("jax")
    np: Any = importlib.import_module("numpy")
    fedjax: Any = importlib.import_module("fedjax")
    hk: Any = importlib.import_module("haiku")
    fed_avg: Any = importlib.import_module("fedjax.algorithms.fed_avg")
    setting = turns.given()

    def forward(batch: Any) -> Any:
        x = batch["x"]
        for channels, kernel, padding, pooled in setting.convolutions:
            how = "SAME" if padding else "VALID"
            x = jax.nn.relu(hk.Conv2D(channels, kernel, padding=how)(x))
            x = hk.max_pool(x, (2, 2, 1), (2, 2, 1), "VALID") if pooled else x
        x = hk.Flatten()(x)
        for size in setting.dense:
            x = jax.nn.relu(hk.Linear(size)(x))
        return hk.Linear(setting.num_classes)(x)

    def loss(batch: Any, logits: Any) -> Any:
        chosen = jax.nn.one_hot(batch["y"], setting.num_classes)
        return -(jax.nn.log_softmax(logits) * chosen).sum(-1)

    random, size = np.random.default_rng(0), setting.client_size

    def examples() -> dict[str, Any]:
        return {
            "x": random.random((size, *setting.image_shape), np.float32),
            "y": random.integers(0, setting.num_classes, size, np.int32),
        }

    transformed = hk.transform(forward)
    model = fedjax.create_model_from_haiku(transformed, examples(), loss)
    algorithm = fed_avg.federated_averaging(
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(setting.learning_rate),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=setting.batch_size),
    )
    datasets = [fedjax.ClientDataset(examples()) for _ in range(setting.clients)]
    state = algorithm.init(model.init(jax.random.PRNGKey(0)))
    numbers = itertools.count()

    def train() -> None:
        nonlocal state
        keys = jax.random.split(jax.random.PRNGKey(next(numbers)), len(datasets))
        clients = [(str(k).encode(), one, keys[k]) for k, one in enumerate(datasets)]
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)

    turns.take(train)


if __name__ == "__main__":
    main()
