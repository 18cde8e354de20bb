"""Several processes of one sweep: starting JAX's distributed runtime, and agreeing."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

Value = TypeVar("Value")

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


def together(action: Callable[[], Value]) -> Value:
    """What each process gets from it; where it fails in one, all fail with that one's line.

    Raises:
      ValueError, OSError: as `action` does; ValueError in the others.
    """
    if jax.process_count() == 1:
        return action()
    found, problem = None, ""
    try:
        found = action()
    except (ValueError, OSError) as error:
        problem = str(error)
    line = np.zeros(2000, np.uint8)
    text = np.frombuffer(problem.encode()[: line.size], np.uint8)
    line[: text.size] = text
    for other in np.asarray(multihost_utils.process_allgather(line)):
        if said := other.tobytes().rstrip(b"\0").decode(errors="ignore"):
            raise ValueError(said)
    return cast(Value, found)


def differences(values: Mapping[str, Any]) -> list[str]:
    """Names of the JSON values, of the same names in all processes, that are not the same in all.

    Processes that run different programs would wait for each other without end.
    """
    if jax.process_count() == 1:
        return []
    texts = [json.dumps(value, sort_keys=True).encode() for value in values.values()]
    digests = [np.frombuffer(hashlib.sha256(text).digest(), np.uint8) for text in texts]
    of_all = np.asarray(multihost_utils.process_allgather(np.stack(digests)))  # [P, names, 32]
    same = np.all(of_all == of_all[:1], axis=(0, 2))
    return [name for name, agreed in zip(values, same, strict=True) if not agreed]


def meet(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def first() -> bool:
    return jax.process_index() == 0
