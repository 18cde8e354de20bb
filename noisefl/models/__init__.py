"""Flax linen models and the layers they are made of."""

from flax import linen as nn

from noisefl.config import nearest, refuse
from noisefl.models.layers import Conv as Conv
from noisefl.models.layers import convolve as convolve
from noisefl.models.layers import max_pool as max_pool
from noisefl.models.lenet import LeNet5 as LeNet5
from noisefl.models.mcmahan import McMahanCNN as McMahanCNN
from noisefl.models.mlp import MLP as MLP
from noisefl.models.order import Layer as Layer
from noisefl.models.order import layer_order as layer_order

MODELS: dict[str, type[nn.Module]] = {"lenet5": LeNet5, "mcmahan": McMahanCNN, "mlp": MLP}


def by_name(name: str, num_classes: int) -> nn.Module:
    """The model called `name` for `num_classes` classes.

    Raises:
      ValueError: an unknown name.
    """
    if name not in MODELS:
        raise refuse("model", name, nearest(name, list(MODELS)))
    return MODELS[name](num_classes=num_classes)  # pyright: ignore[reportCallIssue]
