"""Data: a name or a path → arrays → client table → what a round reads on the device."""

from noisefl.data.federated import Deal as Deal
from noisefl.data.federated import Federation as Federation
from noisefl.data.federated import Images as Images
from noisefl.data.federated import federate as federate
from noisefl.data.federated import holdings as holdings
from noisefl.data.load import Dataset as Dataset
from noisefl.data.load import arrays as arrays
from noisefl.data.load import channels_of as channels_of
from noisefl.data.load import load as load
from noisefl.data.partition import PARTITIONS as PARTITIONS
from noisefl.data.partition import Partition as Partition
from noisefl.data.partition import partition as partition
