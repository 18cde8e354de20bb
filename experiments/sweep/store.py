"""What a driver leaves on disk, and what of it a killed one finds again.

    of a single run                       of a sweep
    out/config.json                       out/sweep.json   grid, options, the planned runs
                                          out/runs/<digest>/seed=<n>/
    out/metrics.jsonl  FedAvg's first         config.json  metrics.jsonl
    out/timing.json  thieves.jsonl            timing.json  thieves.jsonl
    out/figure1.png
    out/summary.json  last: complete          summary.json  last: complete
    out/checkpoints/<batch>/              out/batches/<batch>/  gone when its runs are complete

A batch is runs side by side in one program: batch.json, and of some rounds the states, with the
rows up to them, as one commit (`noisefl.record.Checkpoints`).
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from noisefl.errors import refuse
from noisefl.parts import LARGEST
from noisefl.record import as_json, as_lines, lock, note_changes, replace

Row = dict[str, Any]

FILES = ("config.json", "metrics.jsonl", "summary.json")  # of a complete run
FREE = ("rounds_per_chunk",)  # options that a resumed run may change


class Store:
    """The folder of a single run or of a sweep, held by one driver: by its first process where
    there are several.

    Args:
      path: the folder; created if missing.
      single: FedAvg and one run, all in this folder itself.
      held: whether to hold it.

    Raises:
      ValueError: it is not writable, or another driver holds it.
    """

    def __init__(self, path: str | os.PathLike, single: bool, held: bool = True):
        self.path, self.single = Path(path).absolute(), single
        self._lock = lock(self.path) if held else None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def claim(self, description: Mapping[str, Any]) -> None:
        """Takes the folder, or takes it again for more rounds or more runs.

        Args:
          description: JSON values: "options" and "runs", all planned ones by path, among them.

        Raises:
          ValueError: the folder holds something else, or a batch that is not one of ours.
        """
        self.open_batches()
        before = check(self.path, self.single, description)
        if self.single:
            (self.path / "summary.json").unlink(missing_ok=True)
            options = {**(before or description)["options"]}
            options["rounds"] = description["options"]["rounds"]
            description = {**(before or description), "options": options}
        replace(self.path / _name(self.single), as_json(description))

    def folder(self, run: str) -> Path:
        """Where the results of a run are to be."""
        return self.path if self.single else self.path / run

    def finish(
        self, run: str, config: Row, rows: Sequence[Row], timing: Row, summary: Row,
        draw: Callable[[Path], None] | None = None, said: Sequence[Row] = (),
    ) -> None:  # fmt: skip
        """Writes the results of a run, and last its summary, which marks it as complete.

        Args:
          run: its path.
          config: the content of config.json; the others likewise.
          draw: of a single run, makes the picture.
          said: the content of thieves.jsonl, if any.
        """
        folder = self.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").unlink(missing_ok=True)  # of which someone has removed the rest
        replace(folder / "config.json", as_json(config))
        replace(folder / "metrics.jsonl", as_lines(rows))
        replace(folder / "timing.json", as_json(timing))
        if said:
            replace(folder / "thieves.jsonl", as_lines(said))
        if draw is not None:
            draw(folder / "figure1.png")
        replace(folder / "summary.json", as_json(summary))

    def follow(self, config: Row, rows: Sequence[Row]) -> None:
        """Of a single run under way: what it was begun under, and its rows so far."""
        replace(self.path / "config.json", as_json(config))
        replace(self.path / "metrics.jsonl", as_lines(rows))

    # Batches

    def batch(self, name: str) -> Path:
        """The folder of a batch."""
        return self.path / ("checkpoints" if self.single else "batches") / name

    def open_batches(self) -> list[Row]:
        """What batch.json says of each batch, in order of name, and its "name"."""
        found = []
        for file in sorted(self.batch("*").parent.glob("*/batch.json")):
            batch = _read(file)
            if batch is None or not _is_batch(batch):
                raise refuse("out", str(file.parent), "its batch.json is not one of ours")
            found.append({**batch, "name": file.parent.name})
        return found

    def begin(self, name: str, description: Row, resumed: bool) -> tuple[Row, list[str]]:
        """Writes batch.json, unless the batch is there.

        Args:
          name: of the batch.
          description: of it; "provenance" is what this process runs under.
          resumed: it goes on from a checkpoint.

        Returns:
          What it was begun under, for config.json, and warnings about what is not as it was.
        """
        file = self.batch(name) / "batch.json"
        before = _read(file) if resumed and file.exists() else None
        begun, warnings = dict((before or description)["provenance"]), []
        if before is not None:
            warnings = note_changes(begun, description["provenance"], f"batch {name}")
        replace(file, as_json({**(before or description), "provenance": begun}))
        return begun, warnings

    def drop(self, name: str) -> None:
        """Removes a batch: first what makes it one, so that half of it is never taken for one."""
        (self.batch(name) / "batch.json").unlink(missing_ok=True)
        shutil.rmtree(self.batch(name), ignore_errors=True)

    def tidy(self, done: set[str]) -> None:
        """Removes what a kill left of batches that were being begun or removed.

        Args:
          done: runs that are complete.
        """
        for folder in self.batch("*").parent.glob("*"):
            if not (folder / "batch.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
        for batch in [] if self.single else self.open_batches():
            if done.issuperset(batch["runs"]):
                self.drop(batch["name"])


def _is_batch(found: Row) -> bool:
    """It is what `Store.begin` writes, as far as whoever goes on with it relies on that."""
    kinds = {"runs": list, "lanes": int, "rounds_per_chunk": int, "provenance": dict}
    if not all(type(found.get(name)) is kind for name, kind in kinds.items()):
        return False
    runs, lanes, chunk = found["runs"], found["lanes"], found["rounds_per_chunk"]
    return (
        len(set(map(str, runs))) == len(runs) <= lanes <= LARGEST
        and all(isinstance(run, str) for run in runs)
        and 1 <= chunk <= LARGEST
        and isinstance(found["provenance"].get("resumed", []), list)
    )


def is_complete(folder: Path, rounds: int) -> bool:
    """Whether the folder of a run holds all that it should, of so many rounds."""
    if not all((folder / name).exists() for name in FILES):
        return False
    summary = _read(folder / "summary.json")
    return summary is not None and summary.get("rounds") == rounds


def check(path: Path, single: bool, description: Mapping[str, Any]) -> Row | None:
    """What the folder's own file says; None if nothing is there, or a claim alone, by what ended
    before its first round. Changes nothing.

    Raises:
      ValueError: it holds anything but this run, perhaps of fewer rounds, or a sweep of some of
        these runs.
    """
    out, file = str(path), path / _name(single)
    try:
        there = file.exists()
    except OSError as error:  # a name too long
        raise refuse("out", out, f"cannot be read ({error.strerror})") from None
    if not there:
        if (path / _name(not single)).exists():
            what = "a sweep" if single else "a single run"
            raise refuse("out", out, f"holds {what}; give another --out")
        if any((path / name).exists() for name in ("metrics.jsonl", "checkpoints", "runs")):
            raise refuse("out", out, f"holds other files of ours, but no {file.name}")
        return None
    try:
        before = _read(file) or {}
        options, runs = dict(before["options"]), dict(before["runs"])
        grids = {*before.get("grid", {}), *description.get("grid", {})}
    except (ValueError, TypeError, KeyError):
        raise refuse("out", out, f"its {file.name} is not one of ours") from None
    if not _begun(path, single):
        return None
    here = json.loads(json.dumps(description["options"]))
    missing = set(runs) - set(description["runs"])
    free = {*grids, *FREE, *(("rounds",) if single else ())}
    differing = [n for n in sorted({*options, *here} - free) if options.get(n) != here.get(n)]
    what = f"the {'run' if single else 'sweep'} in {path} has"
    if differing and (single or missing):
        name = differing[0]
        allowed = f"{what} {options.get(name)!r}, and may not change it; give another --out"
        allowed += ", or remove that folder"
        raise refuse(name, here.get(name), allowed)
    if single and options["rounds"] > here["rounds"]:
        raise refuse("rounds", here["rounds"], f"{what} {options['rounds']}; it may only grow")
    if single and set(runs) != set(description["runs"]):
        allowed = f"{what} {' and '.join(runs)}; give another --out"
        raise refuse("baseline", len(runs) == 1, allowed)
    if missing:
        allowed = (
            f"holds a sweep with {len(missing)} runs that this one has not; "
            "a sweep may only grow: give all of its flags, or another --out"
        )
        raise refuse("out", out, allowed)
    return before


def _begun(path: Path, single: bool) -> bool:
    """There is more than a claim: rounds or results."""
    results = "" if single else "runs/*/*/"
    batches = "checkpoints" if single else "batches"
    files = (f"{results}metrics.jsonl", f"{results}summary.json", f"{batches}/*/batch.json")
    return any(next(path.glob(file), None) is not None for file in files)


def _name(single: bool) -> str:
    return "config.json" if single else "sweep.json"


def _read(file: Path) -> Row | None:
    """The object in a file; None if it holds none."""
    try:
        found = json.loads(file.read_text())
        as_json(
            {"found": found}
        )  # NaN, which Python reads, is no JSON: we could not write it again
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
