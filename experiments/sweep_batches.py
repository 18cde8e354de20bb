"""The batches of a group: runs side by side in one program, begun or gone on with, and written."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import hosts
from experiments.plan import Run, batch_name, batches
from experiments.run import cause
from experiments.summary import of_one_run
from experiments.sweep_flags import NOT_OF_A_RUN, SweepOptions
from experiments.sweep_group import Lanes
from experiments.sweep_progress import SweepProgress, complain
from experiments.sweep_store import BatchFolder, SweepFolder
from noisefl import mesh, simulate
from noisefl.sweep import Program, TooLarge


class Sweep(NamedTuple):
    """What every batch needs."""

    options: SweepOptions
    folder: SweepFolder
    on: Mesh
    progress: SweepProgress
    provenance: dict[str, Any]
    done: set[str]  # runs that were complete at the start


class Batch(NamedTuple):
    """Runs side by side.

    Attributes:
      runs: at most as many as there are lanes.
      lanes: of its program.
      chunk: rounds of one call of it.
    """

    runs: list[Run]
    lanes: int
    chunk: int


def run_group(sweep: Sweep, number: int, lanes: Lanes) -> int:
    """Batches under way first, then the runs that none has begun.

    Returns:
      How many runs are left out because not even one of them fits in memory.
    """
    options, on, group = sweep.options, sweep.on, lanes.group
    left = [run for run in group.runs if run.path not in sweep.done]
    if not left:
        return 0
    sweep.progress.group(number, group.title, len(group.runs), len(group.runs) - len(left))
    programs: dict[Any, tuple[int, Program]] = {}

    def program_of(width: int, chunk: int) -> tuple[int, Program]:
        if (width, chunk) not in programs:
            programs[width, chunk] = lanes.compile(on, width, chunk)
        return programs[width, chunk]

    try:
        for batch in begun(sweep, lanes):
            width, program = program_of(batch.lanes, batch.chunk)
            if width != batch.lanes:
                drop(sweep, batch_name(batch.runs), "with more memory")
                continue
            run_batch(sweep, lanes, batch, program)
            resumed = {run.path for run in batch.runs}
            left = [run for run in left if run.path not in resumed]
        if left:
            width, program = program_of(lanes.width(on, options.lanes_at_once), options.chunk)
            for some in batches(left, width):
                run_batch(sweep, lanes, Batch(some, width, options.chunk), program)
    except TooLarge as error:
        complain(f"{group.title}: {error}; its {len(left)} runs are left out")
        return len(left)
    return 0


def begun(sweep: Sweep, lanes: Lanes) -> list[Batch]:
    """Batches of a group that an earlier start of the driver has not ended."""
    by_path = {run.path: run for run in lanes.group.runs}
    waiting = set(by_path) - sweep.done
    found = []
    for batch in hosts.agree(sweep.folder.open_batches() if hosts.first() else None):
        if not waiting & set(batch["runs"]):
            continue
        if not set(batch["runs"]) <= set(by_path):
            drop(sweep, batch["name"], "for another grid")
        elif batch["devices"] != _devices(sweep.on):
            drop(sweep, batch["name"], "on other devices")
        else:
            runs = [by_path[path] for path in batch["runs"]]
            found.append(Batch(runs, batch["lanes"], batch["rounds_per_chunk"]))
            waiting -= set(batch["runs"])
    return found


def drop(sweep: Sweep, name: str, how: str) -> None:
    """Removes a batch that cannot go on, before any process begins one of the same name."""
    if hosts.first():
        complain(f"batch {name} was begun {how}; its runs begin anew")
        sweep.folder.drop_batch(name)
    hosts.meet(f"batch {name} is dropped")


def _devices(on: Mesh) -> list[int]:
    return [on.shape[mesh.LANES], on.shape[mesh.CLIENTS]]


def run_batch(sweep: Sweep, lanes: Lanes, batch: Batch, program: Program) -> None:
    """Advances runs side by side, and writes each when all are done."""
    options, on, (runs, width, chunk) = sweep.options, sweep.on, batch
    name, fresh = batch_name(runs), [run for run in runs if run.path not in sweep.done]
    description = {
        "runs": [run.path for run in runs],
        "lanes": width,
        "rounds_per_chunk": chunk,
        "devices": _devices(on),
        "provenance": sweep.provenance,
    }
    begin, programs = time.perf_counter(), 0.0
    own, writes = mesh.own_lanes(on, width), set(mesh.writes(on, width).tolist())
    inputs = lanes.inputs(on, runs, width)
    states = program.init(inputs.seeds)
    with BatchFolder(sweep.folder, name, description) as folder:
        saved = folder.round
        resumed = folder.resumed(sweep.provenance) if hosts.first() else None
        here, warnings = hosts.agree(resumed)
        for warning in warnings if hosts.first() else []:
            complain(warning)
        rows = folder.rows()
        if saved:
            states = folder.restore(states)
        sweep.progress.batch(len(fresh), saved)
        last = np.array(
            [_last_round(rows.get(lane, []), lane < len(runs), options.rounds) for lane in own]
        )
        number = saved
        while number < options.rounds:
            limits = mesh.put(last.astype(np.int32), mesh.over_lanes(on))
            start = time.perf_counter()
            states, metrics = program.chunk(
                inputs.seeds, states, inputs.data, inputs.hypers, limits
            )
            table = mesh.own(jax.block_until_ready(metrics))
            programs += time.perf_counter() - start
            number = min(number + chunk, options.rounds)
            new = []
            for place, lane in enumerate(own):
                mine = [r for r in simulate.rows(_lane(table, place)) if 0 < r["round"] <= number]
                sound = [row["finite"] for row in mine]
                if not all(sound):  # it stops there, and the others go on
                    mine = mine[: sound.index(False) + 1]
                    last[place] = mine[-1]["round"]
                if lane in writes:
                    new += [{"lane": int(lane), **row} for row in mine]
            folder.append(new)
            for row in new:
                rows.setdefault(row["lane"], []).append(row)
            sweep.progress.rounds(number, list(rows.values()))
            if number - saved >= options.checkpoint_every or number == options.rounds:
                folder.save(states, number)
                saved = number
        timing = {
            "seconds": round((time.perf_counter() - begin) / len(runs), 4),
            "program_seconds": round(programs / len(runs), 4),
            "batch": name,
        }
        rows = folder.rows()  # as they stand on the disk
        for lane in writes & set(range(len(runs))):
            write(sweep.folder, lanes, runs[lane], rows[lane], chunk, here, timing)
    hosts.meet(f"batch {name} is written")
    if hosts.first():
        sweep.folder.drop_batch(name)
    sweep.progress.finished(len(fresh))


def write(
    folder: SweepFolder,
    lanes: Lanes,
    run: Run,
    rows: list[dict[str, Any]],
    chunk: int,
    here: dict[str, Any],
    timing: dict[str, Any],
) -> None:
    """One run's folder.

    Args:
      folder: of the sweep.
      lanes: its group.
      run: that is complete.
      rows: of its rounds.
      chunk: rounds of one call of the program that made them.
      here: the provenance of the batch.
      timing: its share of the batch, by the process that ended it.
    """
    kept = [{"run": run.kind, **{k: v for k, v in row.items() if k != "lane"}} for row in rows]
    broken = None if kept[-1]["finite"] else cause(kept)
    options = {k: v for k, v in run.flags.items() if k not in NOT_OF_A_RUN}
    config = {"run": run.kind, "options": {**options, "rounds_per_chunk": chunk}, **here}
    summary = of_one_run(kept, run.cap, lanes.num_classes, broken)
    folder.write_run(run.path, config, kept, summary, timing)


def _last_round(rows: list[dict[str, Any]], filled: bool, rounds: int) -> int:
    """Where a lane stops: at once if it only fills up the program, where it broke if it did."""
    if not filled:
        return 0
    return rows[-1]["round"] if rows and not rows[-1]["finite"] else rounds


def _lane(metrics: simulate.Metrics, place: int) -> simulate.Metrics:
    return jax.tree.map(lambda leaf: leaf[place], metrics)
