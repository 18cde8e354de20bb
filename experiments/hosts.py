"""Several processes of one sweep: starting JAX's distributed runtime, and agreeing."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT = 20  # seconds without a sign of life after which the others end


def initialize(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the other processes; without arguments, those of the cluster that JAX detects.

    A process that dies ends the others: at once in the midst of a collective operation, or else
    after `HEARTBEAT` seconds.

    Raises:
      ValueError, RuntimeError: no such cluster, or the others did not come in time.
    """
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        initialization_timeout=120,
        heartbeat_timeout_seconds=HEARTBEAT,
    )


def agree(value: Any) -> Any:
    """The first process's JSON value, in all of them."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = multihost_utils.broadcast_one_to_all(np.int32(len(text)))
    padded = np.zeros(int(size), np.uint8)
    padded[: len(text)] = text[: int(size)]
    return json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())


def meet(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def first() -> bool:
    return jax.process_index() == 0
