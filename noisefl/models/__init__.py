"""Models, and how any model of Flax or of plain functions is run in a round."""

from flax import linen as nn

from noisefl.errors import nearest, refuse, whole
from noisefl.models.convolution import Geometry as Geometry
from noisefl.models.convolution import convolve as convolve
from noisefl.models.functions import Functions as Functions
from noisefl.models.functions import check_channels as check_channels
from noisefl.models.functions import functions as functions
from noisefl.models.functions import with_leaves as with_leaves
from noisefl.models.lenet import LeNet5 as LeNet5
from noisefl.models.lowering import LOWERINGS as LOWERINGS
from noisefl.models.lowering import Lowering as Lowering
from noisefl.models.mcmahan import McMahanCNN as McMahanCNN
from noisefl.models.mlp import MLP as MLP
from noisefl.models.pooling import max_pool as max_pool
from noisefl.models.program import Layer as Layer
from noisefl.models.program import Program as Program
from noisefl.models.resnet import ResNet8 as ResNet8
from noisefl.models.resnet import ResNet18 as ResNet18
from noisefl.models.two_conv import TwoConvCNN as TwoConvCNN
from noisefl.models.vgg import VGG11 as VGG11
from noisefl.models.vit import ViT as ViT

MODELS: dict[str, type[nn.Module]] = {
    "lenet5": LeNet5,
    "mcmahan": McMahanCNN,
    "mlp": MLP,
    "resnet18": ResNet18,
    "resnet8": ResNet8,
    "two_conv": TwoConvCNN,
    "vgg11": VGG11,
    "vit": ViT,
}


def by_name(name: str, num_classes: int) -> nn.Module:
    """The model called `name` for `num_classes` classes.

    Raises:
      ValueError: an unknown name.
    """
    if not (isinstance(name, str) and name in MODELS):
        raise refuse("model", name, nearest(str(name), list(MODELS)))
    allowed = "must be a whole number, at least 1"
    num_classes = whole("num_classes", num_classes, 1, 2**31 - 1, allowed)
    return MODELS[name](num_classes=num_classes)  # pyright: ignore[reportCallIssue]
