"""Several processes of one command: starting JAX's distributed runtime, and agreeing."""

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


def first() -> bool:
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gathered(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(text.size)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: text.size] = text
    texts = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(one[:size].tobytes()) for one, size in zip(texts, sizes, strict=True)]


def together(action: Callable[[], Value]) -> Value:
    """What each process gets from it; where it fails in one, all fail with that one's line.

    Raises:
      ValueError, OSError: as `action` does; ValueError in the others.
    """
    found, problem = None, None
    try:
        found = action()
    except (ValueError, OSError) as error:
        problem = error
    for said in gathered(None if problem is None else str(problem)):
        if said is not None:
            raise problem or ValueError(said)
    return cast(Value, found)


def agree(action: Callable[[], Value]) -> Value:
    """What the first process, which alone acts, gets: a JSON value, in all of them.

    Raises:
      ValueError, OSError: as `action` does; ValueError in the others.
    """
    return gathered(together(lambda: action() if first() else None))[0]


def differences(values: Mapping[str, Any]) -> list[str]:
    """Names of the JSON values, of the same names in all processes, that are not the same in all.

    Processes that run different programs would wait for each other without end.
    """
    texts = {name: json.dumps(value, sort_keys=True).encode() for name, value in values.items()}
    digests = gathered({name: hashlib.sha256(text).hexdigest() for name, text in texts.items()})
    return [name for name in values if len({one[name] for one in digests}) > 1]
