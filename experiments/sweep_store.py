"""What a sweep leaves on disk, and what of it a killed one finds again.

    out/sweep.json                      grid, flags, the planned runs
    out/runs/<digest>/seed=<n>/         a run, only ever complete: written beside, then renamed
        config.json  metrics.jsonl  summary.json  timing.json
    out/batches/<name>/                 runs under way side by side; gone when all are done
        batch.json   metrics-<process>.jsonl   state/<round>/ (orbax)

Rows are appended before the checkpoint that covers them. What a killed sweep leaves is at worst
rows without a checkpoint, or half a line: they are computed anew, to the same bits, and the last
one of a round counts.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.sweep_results import is_complete
from noisefl.config import refuse
from noisefl.record import note_changes, open_and_lock, plain


class SweepFolder:
    """The folder of a sweep, held by one driver: by its first process where there are several.

    Args:
      path: the folder; created if missing.
      lock: whether to hold it.

    Raises:
      ValueError: it is not writable, or another driver holds it.
    """

    def __init__(self, path: str | os.PathLike, lock: bool = True):
        self.path = Path(path).absolute()
        self._lock = open_and_lock(self.path) if lock else None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def claim(self, description: Mapping[str, Any]) -> None:
        """Takes the folder for a sweep, or for one with more runs than the folder's has.

        Args:
          description: JSON values; "runs" has all planned runs by path.

        Raises:
          ValueError: the folder holds something else.
        """
        check(self.path, description["runs"])
        _replace(self.path / "sweep.json", _json(description))

    def is_done(self, run: str) -> bool:
        return is_complete(self.path / run)

    def write_run(
        self,
        run: str,
        config: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        summary: Mapping[str, Any],
        timing: Mapping[str, Any],
    ) -> None:
        """Writes a complete run in one step: a reader, or a kill, sees all of it or nothing."""
        final = self.path / run
        if self.is_done(run):
            return
        new = final.with_name(f".{final.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        files = {
            "config.json": _json(config),
            "metrics.jsonl": "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows),
            "summary.json": _json(summary),
            "timing.json": _json(timing),
        }
        for name, text in files.items():
            _write(new / name, text)
        shutil.rmtree(final, ignore_errors=True)  # of which someone has removed a part
        os.replace(new, final)

    def open_batches(self) -> list[dict[str, Any]]:
        """What batch.json says of each batch under way, in order of name."""
        found = []
        for file in sorted(self.path.glob("batches/*/batch.json")):
            found.append({**json.loads(file.read_text()), "name": file.parent.name})
        return found

    def drop_batch(self, name: str) -> None:
        """Removes a batch: first what makes it one, so that half of it is never taken for one."""
        folder = self.path / "batches" / name
        (folder / "batch.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def sweep_up(self) -> None:
        """Removes what a kill left of batches and runs that were being written or removed."""
        for folder in self.path.glob("batches/*"):
            if not (folder / "batch.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
        for batch in self.open_batches():
            if all(map(self.is_done, batch["runs"])):
                self.drop_batch(batch["name"])
        for folder in self.path.glob("runs/*/.*.new"):
            shutil.rmtree(folder, ignore_errors=True)


def check(path: Path, runs: Iterable[str]) -> None:
    """Raises ValueError if the folder holds anything but a sweep of some of these runs."""
    file = path / "sweep.json"
    if file.exists():
        try:
            before = dict(json.loads(file.read_text())["runs"])
        except (ValueError, TypeError, KeyError):
            raise refuse("out", str(path), "its sweep.json is not one of ours") from None
        if missing := set(before) - set(runs):
            allowed = (
                f"holds a sweep with {len(missing)} runs that this one has not; "
                "a sweep may only grow: give all of its flags, or another --out"
            )
            raise refuse("out", str(path), allowed)
    elif any((path / name).exists() for name in ("runs", "config.json", "metrics.jsonl")):
        raise refuse("out", str(path), "holds other files of ours, but no sweep.json")


class BatchFolder:
    """One batch under way. Every process of a sweep opens it, and appends rows of its own lanes.

    Args:
      sweep: the sweep's folder.
      name: of the batch.
      description: of the batch, for `batch.json`; written by the first process alone.
    """

    def __init__(self, sweep: SweepFolder, name: str, description: Mapping[str, Any]):
        self.path = sweep.path / "batches" / name
        process = jax.process_index()
        if process == 0 and not (self.path / "batch.json").exists():
            self.path.mkdir(parents=True, exist_ok=True)
            _replace(self.path / "batch.json", _json(description))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False, create=True
        )
        self._manager = ocp.CheckpointManager(self.path / "state", options=options)
        self._file = self.path / f"metrics-{process}.jsonl"
        self._appended = False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._manager.close()

    def resumed(self, provenance: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """What the batch was begun under, and, if it has a checkpoint, goes on under.

        Args:
          provenance: versions, device, … of this process, the first.

        Returns:
          The values for config.json, and warnings about what is not as it was.
        """
        file, warnings = self.path / "batch.json", []
        before = json.loads(file.read_text())
        begun = dict(before["provenance"]) if self.round else dict(provenance)
        if self.round:
            warnings = note_changes(begun, provenance, f"batch {self.path.name}")
        if (now := {**before, "provenance": begun}) != before:
            _replace(file, _json(now))
        return begun, warnings

    @property
    def round(self) -> int:
        """Of the newest checkpoint; 0 without one."""
        return self._manager.latest_step() or 0

    def restore(self, like: Any) -> Any:
        """The newest checkpoint, on the devices of `like`."""
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        return self._manager.restore(self.round, args=ocp.args.StandardRestore(shapes))

    def save(self, states: Any, round_number: int) -> None:
        """Checkpoints all lanes; each process writes its own part. Returns when all is on disk."""
        self._manager.save(round_number, args=ocp.args.StandardSave(states), force=True)

    def rows(self) -> dict[int, list[dict[str, Any]]]:
        """Rows of all lanes that the newest checkpoint covers, by lane and in order of rounds."""
        newest: dict[tuple[int, int], dict[str, Any]] = {}
        for file in sorted(self.path.glob("metrics-*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                try:
                    row = json.loads(line)
                except ValueError:  # half a line of a killed process
                    continue
                if row["round"] <= self.round:
                    newest[row["lane"], row["round"]] = row
        lanes: dict[int, list[dict[str, Any]]] = {}
        for lane, number in sorted(newest):
            lanes.setdefault(lane, []).append(newest[lane, number])
        return lanes

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows, each with its "lane"; values that are not finite become null."""
        text = "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)
        start = "" if self._appended else "\n"  # ends half a line of a killed process
        with open(self._file, "ab") as file:
            file.write((start + text).encode())
            file.flush()
            os.fsync(file.fileno())
        self._appended = True


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _write(file: Path, text: str) -> None:
    with open(file, "wb") as opened:
        opened.write(text.encode())
        opened.flush()
        os.fsync(opened.fileno())


def _replace(file: Path, text: str) -> None:
    new = file.with_name(f".{file.name}.new")
    _write(new, text)
    os.replace(new, file)
