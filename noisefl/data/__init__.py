"""Data: a name or a path → arrays → client table → what a round reads on the device."""

from noisefl.data.federated import FederatedData, federate, holdings
from noisefl.data.load import Dataset, load
from noisefl.data.partition import SCHEMES, Partition, partition

__all__ = [
    "SCHEMES",
    "Dataset",
    "FederatedData",
    "Partition",
    "federate",
    "holdings",
    "load",
    "partition",
]
