"""Files that survive: the only module of the library that touches the disk.

A process may be killed at any moment. So a file is replaced in one step, and the states of runs and
the rows up to them are one commit of orbax's: what is found again is always a round that was.
"""

import contextlib
import gc
import json
import logging
import math
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from noisefl import mesh
from noisefl.errors import refuse

try:
    import fcntl
except ImportError:  # not a POSIX system: two processes in one folder then go unnoticed
    fcntl = None


class Checkpoints:
    """The newest two states of runs side by side, each with the rows of all rounds before it.

    Where there are several processes each opens it, and writes and reads its own lanes.

    Args:
      path: a folder; created if missing.
    """

    def __init__(self, path: Path):
        self.path = path
        self._manager = ocp.CheckpointManager(
            path,
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2, enable_async_checkpointing=False, create=True
            ),
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._manager.close()

    @property
    def round(self) -> int:
        """Of the newest; 0 without one."""
        return self._manager.latest_step() or 0

    def save(self, round_number: int, states: Any, rows: Mapping[str, jax.Array]) -> None:
        """Returns when all is on disk.

        Args:
          round_number: t, that the runs have come to.
          states: arrays [L, ...].
          rows: arrays [L, t] by name.

        Raises:
          ValueError: it cannot be written, as on a full disk.
        """
        tree = {"states": states, "rows": dict(rows)}
        tree["sums"] = mesh.put(_sums(tree), _sharding(states))
        with _quietly():
            problem = self._written(round_number, ocp.args.StandardSave(tree))
            if problem:
                gc.collect()  # what a failed save left speaks when it is dropped: here, in silence
        if problem:
            allowed = f"its state of round {round_number} cannot be written ({problem})"
            raise refuse("out", str(self.path), allowed)

    def _written(self, round_number: int, args: ocp.args.StandardSave) -> str:
        """What went wrong, if anything."""
        try:
            self._manager.save(round_number, args=args, force=True)
        except jax.errors.JaxRuntimeError:  # another process is gone
            raise
        except Exception as error:  # of the system and of tensorstore, which have many kinds
            said = getattr(error, "strerror", None) or str(error) or type(error).__name__
            why = re.search(r"([^:\[]+) \[os_error_code", said)
            return (why[1] if why else said).strip().partition("\n")[0][:200]
        return ""

    def restore(self, like: Any) -> tuple[Any, dict[str, jax.Array]]:
        """The newest (states [L, ...], rows [L, t]).

        Args:
          like: states of the same structure, on the devices where all is to be.

        Raises:
          ValueError: it is damaged, or of another structure.
        """
        with _quietly():
            problem, found = self._found(like)
            gc.collect()
        if problem:
            allowed = f"its state of round {self.round} is damaged or of other code ({problem})"
            raise refuse("out", str(self.path), allowed)
        return found["states"], found["rows"]

    def _found(self, like: Any) -> tuple[str, Any]:
        """What is wrong with the newest, if anything, and what it holds."""
        try:
            sharding = _sharding(like)

            def shape(x: Any) -> jax.ShapeDtypeStruct:
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

            there: Any = self._manager.item_metadata(self.round)
            wanted = {"states": jax.tree.map(shape, like)}
            for name in ("rows", "sums"):
                wanted[name] = jax.tree.map(shape, there[name])
            found: Any = self._manager.restore(self.round, args=ocp.args.StandardRestore(wanted))
            sums = mesh.own(found.pop("sums"))
            return "" if np.array_equal(_sums(found), sums) else "its checksum is another", found
        except Exception as error:  # of orbax and tensorstore, which have many kinds
            said = str(error.__cause__ or error).strip().partition("\n")[0]
            return said[:200] or type(error).__name__, None


def _sharding(states: Any) -> Any:
    return jax.tree.leaves(states)[0].sharding


def _sums(tree: Any) -> np.ndarray:
    """uint32 [l]: a checksum of each lane of this process.

    Neither orbax nor what it compresses with has one: a flipped bit would be another state.
    """

    def plain(leaf: Any) -> Any:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(mesh.own(jax.tree.map(plain, tree)))]
    sums = np.zeros(len(leaves[0]), np.uint32)
    for leaf in leaves:
        sums[:] = [zlib.crc32(own.tobytes(), int(sum)) for own, sum in zip(leaf, sums, strict=True)]
    return sums


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what orbax logs of files that it cannot read or write, and without the pages that its
    tasks write that are left behind, where one of them failed, when they are collected."""
    hook, level = sys.unraisablehook, logging.root.manager.disable
    sys.unraisablehook = lambda _: None
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logging.disable(level)


def lock(folder: Path) -> int | None:
    """Creates and locks a folder until `os.close` of what it returns, or the end of the process.

    Raises:
      ValueError: it is not writable, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        why = getattr(error, "strerror", None) or error
        raise refuse("out", str(folder), f"is not writable ({why})") from None
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise refuse("out", str(folder), "another process is writing there") from None
    except OSError:  # a file system without locks
        pass
    return descriptor


def replace(file: Path, text: str) -> None:
    """Replaces a file in one step: a reader, or a kill, sees the old one or the new one.

    Raises:
      OSError: it cannot be written, as on a full disk.
    """
    new = file.with_name(f".{file.name}.new")
    try:
        with open(new, "wb") as opened:
            opened.write(text.encode())
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(new, file)
    except OSError as error:
        raise OSError(f"{file}: cannot be written ({error.strerror or error})") from error


def as_json(content: Mapping[str, Any]) -> str:
    """JSON values by name as the text of a file."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def as_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """One object a line."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: None, its null, stands for both."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def note_changes(begun: dict[str, Any], here: Mapping[str, Any], what: str) -> list[str]:
    """Adds to what a run began under, as "resumed", what of it is different now.

    Args:
      begun: JSON values by name.
      here: those of the same names of this process.
      what: began under it, for the warnings.

    Returns:
      A warning for each that is different: last bits may be so too.
    """
    changed = {name: value for name, value in here.items() if value != begun.get(name)}
    if changed and changed not in begun.get("resumed", []):
        begun.setdefault("resumed", []).append(changed)
    return [
        f"{name} is {value!r}, and was {begun.get(name)!r} when {what} began: "
        "results may differ from an uninterrupted run's"
        for name, value in changed.items()
    ]
