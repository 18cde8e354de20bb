"""What every peer's process does: it waits for its turn, trains a round, says how long it took."""

import json
import sys
import time
from collections.abc import Callable
from typing import NamedTuple


class Setting(NamedTuple):
    """A workload, as `peers.py` hands it over: it imports nothing of the project."""

    convolutions: list[tuple[int, int, int, bool]]  # channels, kernel, padding, whether pooled
    dense: list[int]  # hidden layers
    num_classes: int
    image_shape: tuple[int, int, int]  # (H, W, Ch)
    client_size: int  # images a client
    batch_size: int
    learning_rate: float
    clients: int  # that this process trains
    threads: int


def given() -> Setting:
    """The setting of the command line."""
    return Setting(**json.loads(sys.argv[1]))


def take(train: Callable[[], object]) -> None:
    """A round for each line of standard input; its seconds are written to standard output."""
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        train()
        print(time.perf_counter() - begin, flush=True)
