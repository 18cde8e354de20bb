"""A workload's model in PyTorch, channels first."""

import importlib
from typing import Any

from experiments.bench.turns import Setting


def network(setting: Setting) -> Any:
    """The model of the same name in `noisefl.models`, its layers' shapes known."""
    torch: Any = importlib.import_module("torch")  # no dependency of the project
    torch.set_num_threads(setting.threads)
    nn, layers = torch.nn, []
    for channels, kernel, padding, pooled in setting.convolutions:
        layers += [nn.LazyConv2d(channels, kernel, padding=padding), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pooled else []
    layers.append(nn.Flatten())
    for size in setting.dense:
        layers += [nn.LazyLinear(size), nn.ReLU()]
    model = nn.Sequential(*layers, nn.LazyLinear(setting.num_classes))
    model(images(setting, 1))
    return model


def images(setting: Setting, count: int) -> Any:
    """Uniform random pixels [count, Ch, H, W]."""
    torch: Any = importlib.import_module("torch")
    height, width, channels = setting.image_shape
    return torch.rand(count, channels, height, width)


def labels(setting: Setting, count: int) -> Any:
    """Uniform random classes [count]."""
    torch: Any = importlib.import_module("torch")
    return torch.randint(0, setting.num_classes, (count,))
