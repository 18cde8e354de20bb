"""The run folder: the only module of the library that touches the disk.

    out/config.json      every option, package versions, device, git revision
    out/metrics.jsonl    one object a round and run
    out/summary.json     written last: its presence means that the run is complete
    out/checkpoints/     the state of each run after some of its rounds (orbax)

A process may be killed at any moment. Rows are appended before the checkpoint that covers them, so
that what a killed run leaves is at worst a tail of rows without a checkpoint, or half a line.
Resuming cuts that tail off and computes it anew.
"""

import json
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from noisefl.config import refuse

try:
    import fcntl
except ImportError:  # not a POSIX system: two processes in one folder then go unnoticed
    fcntl = None


class RunFolder:
    """One output folder, held by one process.

    Use: open it (cheap; refuses early), `claim()` it once nothing else can fail, then for each
    run `restore()`, and `append()` and `save()` as rounds are done; `finish()` at the end.

    Args:
      path: the folder; created if missing.
      options: every option of the run, JSON values by name; "rounds" must be among them.
      resume: go on with the run that the folder holds, if it holds one.
      runs: the runs of the folder in the order of `metrics.jsonl`.
      may_change: options that a resumed run may change because no result depends on them.
        "rounds" may grow besides.

    Raises:
      ValueError: the folder is not writable, is in use, or holds another run.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        options: Mapping[str, Any],
        *,
        resume: bool = False,
        runs: Sequence[str] = ("fedavg", "noise"),
        may_change: Iterable[str] = (),
    ):
        self.path = Path(path).absolute()
        self.options = dict(options)
        self.runs = tuple(runs)
        self.rows: list[dict[str, Any]] = []  # what metrics.jsonl holds
        self.writing = threading.RLock()  # held while a file changes
        self._free = {*may_change, "rounds"}
        self._managers: dict[str, ocp.CheckpointManager] = {}
        self._lock = open_and_lock(self.path)
        try:
            self._stored = self._read_config(resume)
        except ValueError:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        """Releases the folder; another process may then open it."""
        for manager in self._managers.values():
            manager.close()
        self._managers.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary of a complete run of `options["rounds"]` rounds, or None."""
        file = self.path / "summary.json"
        if not file.exists():
            return None
        summary = json.loads(file.read_text())
        return summary if summary["rounds"] == self.options["rounds"] else None

    def claim(self, provenance: Mapping[str, Any]) -> list[str]:
        """Takes the folder for this run; when resuming, cuts rows that no checkpoint covers.

        Args:
          provenance: what results may depend on besides the options (versions, device, …), JSON
            values by name; stored beside the options.

        Returns:
          Warnings: what of it differs from when the run began, so that last bits may differ.

        Raises:
          ValueError: `metrics.jsonl` was damaged by something else than a killed run.
        """
        here = dict(provenance)
        if self._stored is None:
            self._write("config.json", {"options": self.options, **here})
            self._write_rows()
            return []
        (self.path / "summary.json").unlink(missing_ok=True)
        self.rows = self._covered_rows()
        self._write_rows()
        warnings = note_changes(self._stored, here, "the run")
        self._stored["options"]["rounds"] = self.options["rounds"]
        self._write("config.json", self._stored)
        return warnings

    def restore(self, run: str, like: Any) -> Any:
        """The newest checkpoint of `run` in the structure of `like`, or None if it has none."""
        manager = self._manager(run)
        step = manager.latest_step()
        if step is None:
            return None
        shapes = jax.eval_shape(lambda: like)
        restored = manager.restore(step, args=ocp.args.StandardRestore(shapes))
        return jax.device_put(restored)

    def append(self, run: str, rows: Sequence[Mapping[str, Any]], seconds: float) -> list[dict]:
        """Appends one object a round to `metrics.jsonl`; what is not finite becomes null.

        Args:
          run: one of `runs`.
          rows: plain values, one row a round; each has a "round".
          seconds: wall time of one of these rounds.

        Returns:
          The rows as written.
        """
        new = [{"run": run, **plain(row), "seconds": round(seconds, 4)} for row in rows]
        in_order = not self.rows or self._order(self.rows[-1]) < self._order(new[0])
        with self.writing:
            self.rows += new
            if in_order:
                with open(self.path / "metrics.jsonl", "ab") as file:
                    file.write(_lines(new))
                    file.flush()
                    os.fsync(file.fileno())
            else:  # a complete run goes on for more rounds: its first run ends amid the file
                self.rows.sort(key=self._order)
                self._write_rows()
        return new

    def save(self, run: str, state: Any, round_number: int) -> None:
        """Checkpoints `run` as it is after `round_number` rounds; returns when that is on disk."""
        with self.writing:
            self._manager(run).save(
                round_number, args=ocp.args.StandardSave(jax.device_get(state)), force=True
            )

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`, which marks the run as complete."""
        self._write("summary.json", {"rounds": self.options["rounds"], **plain(summary)})

    def _order(self, row: Mapping[str, Any]) -> tuple[int, int]:
        return self.runs.index(row["run"]), row["round"]

    def _read_config(self, resume: bool) -> dict[str, Any] | None:
        """The stored config.json, None if the folder holds no run; ValueError on another run's."""
        file = self.path / "config.json"
        if not file.exists():
            if (self.path / "sweep.json").exists():
                raise refuse("out", str(self.path), "holds a sweep; give another --out")
            if any((self.path / name).exists() for name in ("metrics.jsonl", "checkpoints")):
                raise refuse("out", str(self.path), "holds files of a run, but no config.json")
            return None
        if not resume:
            raise refuse("out", str(self.path), "holds a run; give --resume or another --out")
        try:
            stored = json.loads(file.read_text())
            options = dict(stored["options"])
        except (ValueError, TypeError, KeyError):
            raise refuse("out", str(self.path), "its config.json is not one of ours") from None
        here = json.loads(json.dumps(self.options))
        for name in sorted({*options, *here} - self._free):
            if options.get(name) != here.get(name):
                raise refuse(
                    name,
                    here.get(name),
                    f"the run in {self.path} has {options.get(name)!r}; "
                    "a resumed run may not change it",
                )
        if here["rounds"] < options["rounds"]:
            allowed = f"the run in {self.path} has {options['rounds']}; it may only grow"
            raise refuse("rounds", here["rounds"], allowed)
        return stored

    def _covered_rows(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl that checkpoints cover, in order."""
        file = self.path / "metrics.jsonl"
        # What follows the last newline is half a line of a killed process (or nothing).
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        try:
            rows = [json.loads(line) for line in lines]
            done = {run: self._manager(run).latest_step() or 0 for run in self.runs}
            rows = [row for row in rows if row["round"] <= done[row["run"]]]
        except (ValueError, TypeError, KeyError):
            raise refuse("out", str(self.path), "its metrics.jsonl is damaged") from None
        rows.sort(key=self._order)
        for run, last in done.items():
            if [row["round"] for row in rows if row["run"] == run] != list(range(1, last + 1)):
                allowed = f"its metrics.jsonl lacks rounds of run {run!r} that a checkpoint covers"
                raise refuse("out", str(self.path), allowed)
        return rows

    def _manager(self, run: str) -> ocp.CheckpointManager:
        if run not in self._managers:
            self._managers[run] = ocp.CheckpointManager(
                self.path / "checkpoints" / run,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=2, enable_async_checkpointing=False, create=True
                ),
            )
        return self._managers[run]

    def _write_rows(self) -> None:
        self._replace("metrics.jsonl", _lines(self.rows))

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        self._replace(name, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

    def _replace(self, name: str, content: bytes) -> None:
        """Replaces a file in one step: a reader, or a kill, sees the old one or the new one."""
        with self.writing:
            new = self.path / f".{name}.new"
            with open(new, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.path / name)


def open_and_lock(path: Path) -> int | None:
    """Creates and locks a folder; the lock goes with the process, however that ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise refuse("out", str(path), f"is not writable ({error.strerror})") from None
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise refuse("out", str(path), "another process is writing there") from None
    except OSError:  # a file system without locks
        pass
    return descriptor


def note_changes(stored: dict[str, Any], here: Mapping[str, Any], what: str) -> list[str]:
    """Adds to what a run began under, as "resumed", what of it is different now.

    Args:
      stored: JSON values by name.
      here: those of the same names of this process.
      what: began under it, for the warnings.

    Returns:
      A warning for each that is different: last bits may be so too.
    """
    changed = {name: value for name, value in here.items() if value != stored.get(name)}
    if changed and changed not in stored.get("resumed", []):
        stored.setdefault("resumed", []).append(changed)
    return [
        f"{name} is {value!r}, and was {stored.get(name)!r} when {what} began: "
        "results may differ from an uninterrupted run's"
        for name, value in changed.items()
    ]


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: null stands for both."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
