"""`python -m experiments.sweep`: many runs as one program, on one device or many.

Started again with the same command, it goes on where it was killed, to the same bits. Exit codes:
0 done (runs that broke down included), 2 bad input, 4 another process of the sweep is gone, 130
interrupted.
"""

import os
import shlex
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from experiments import hosts, interrupt
from experiments.plan import Run, batch_name, batches, groups, plan
from experiments.provenance import provenance
from experiments.run import cause, compilation_cache
from experiments.summary import of_one_run
from experiments.sweep_flags import SweepOptions, parse
from experiments.sweep_group import Lanes, prepare
from experiments.sweep_progress import SweepProgress
from experiments.sweep_store import BatchFolder, SweepFolder
from noisefl import mesh, simulate

NOT_OF_A_RUN = ("out", "resume", "checkpoint_every", "compilation_cache", "rounds_per_chunk")


class Sweep(NamedTuple):
    """What every batch needs."""

    options: SweepOptions
    folder: SweepFolder
    on: Mesh
    progress: SweepProgress
    provenance: dict[str, Any]


def main(argv: list[str]) -> int:
    """Runs one command line; returns the exit code."""
    again = "go on with: " + shlex.join(["python", "-m", "experiments.sweep", *argv[1:]])
    try:
        options = parse(argv)
        if options is None:
            return 0
        options.start_devices()
        return run(options, again)
    except (ValueError, OSError) as error:
        complain(str(error))
        return _leave(2)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        complain(f"another process of the sweep is gone, or failed ({error}); {again}")
        return _leave(4)
    except KeyboardInterrupt:
        complain(f"interrupted; {again}")
        return _leave(interrupt.EXIT_CODE)


def run(options: SweepOptions, again: str) -> int:
    """Checks everything that can be, then runs group after group."""
    runs = plan(options.given, options.axes, options.baseline)
    found = groups(runs)
    on = mesh.make(options.client_devices)
    prepared = [prepare(group, options.given["data_dir"]) for group in found]
    if options.dry_run:
        from experiments.sweep_estimate import estimate  # which it alone needs

        with compilation_cache(options.given["compilation_cache"]):
            estimate(options, prepared, on)
        return 0
    with (
        open_folder(options) as folder,
        compilation_cache(options.given["compilation_cache"]),
        SweepProgress(len(runs), len(found), options.rounds, quiet=not hosts.first()) as progress,
    ):
        here = provenance()
        if hosts.first():
            folder.claim(describe(options, runs, here))
            folder.sweep_up()
        done = set(hosts.agree([run.path for run in runs if folder.is_done(run.path)]))
        progress.skip(len(done))
        sweep = Sweep(options, folder, on, progress, here)

        def last_words() -> None:
            progress.stop()
            complain(f"interrupted; {again}")

        with interrupt.exit_at_once(last_words):
            for lanes in prepared:
                run_group(sweep, lanes, done)
    if hosts.first():
        report(options, len(runs))
    return 0


def open_folder(options: SweepOptions) -> SweepFolder:
    """Held by the first process; if it is refused the folder, all are."""
    folder, problem = None, None
    try:
        folder = SweepFolder(options.out, lock=hosts.first())
    except ValueError as error:
        problem = str(error)
    agreed = hosts.agree(problem)
    if folder is None or agreed:
        raise ValueError(problem or agreed)
    return folder


def run_group(sweep: Sweep, lanes: Lanes, done: set[str]) -> None:
    """Batches under way first, then the runs that none has begun."""
    undone = [run for run in lanes.group.runs if run.path not in done]
    if not undone:
        return
    sweep.progress.group(lanes.title, len(lanes.group.runs), len(lanes.group.runs) - len(undone))
    width, program = lanes.compile(sweep.on, sweep.options.lanes_at_once, sweep.options.chunk)
    by_path = {run.path: run for run in lanes.group.runs}
    waiting = {run.path for run in undone}
    todo = []
    for batch in hosts.agree(sweep.folder.open_batches() if hosts.first() else None):
        if not waiting & set(batch["runs"]) or not set(batch["runs"]) <= set(by_path):
            continue
        if (batch["lanes"], batch["devices"]) != (width, sweep.on.devices.size):
            complain(f"batch {batch['name']} was begun on other devices; its runs begin anew")
            if hosts.first():
                sweep.folder.drop_batch(batch["name"])
            continue
        todo.append([by_path[path] for path in batch["runs"]])
        waiting -= set(batch["runs"])
    hosts.meet(f"batches of {batch_name(lanes.group.runs)}")
    todo += batches([run for run in undone if run.path in waiting], width)
    for some in todo:
        run_batch(sweep, lanes, some, width, program)


def run_batch(sweep: Sweep, lanes: Lanes, runs: list[Run], width: int, program: Any) -> None:
    """Advances runs side by side, and writes each when all are done."""
    options, on, name = sweep.options, sweep.on, batch_name(runs)
    description = {
        "runs": [run.path for run in runs],
        "lanes": width,
        "devices": on.devices.size,
    }
    begin, programs = time.perf_counter(), 0.0
    own, writes = mesh.own_lanes(on, width), set(mesh.writes(on, width).tolist())
    inputs = lanes.inputs(on, runs, width)
    states = program.init(inputs.seeds)
    with BatchFolder(sweep.folder, name, description) as folder:
        saved = folder.round
        rows = folder.rows()
        if saved:
            states = folder.restore(states)
        sweep.progress.batch(len(runs), saved)
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
            number = min(number + options.chunk, options.rounds)
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
            write(sweep, lanes, runs[lane], rows[lane], timing)
    hosts.meet(f"batch {name} is written")
    if hosts.first():
        sweep.folder.drop_batch(name)
    sweep.progress.finished(len(runs))


def write(
    sweep: Sweep, lanes: Lanes, run: Run, rows: list[dict[str, Any]], timing: dict[str, Any]
) -> None:
    """One run's folder; `timing` is its share of the batch, by the process that ended it."""
    kept = [{"run": run.kind, **{k: v for k, v in row.items() if k != "lane"}} for row in rows]
    broken = None if kept[-1]["finite"] else cause(kept[-1])
    config = {
        "run": run.kind,
        "options": {k: v for k, v in run.flags.items() if k not in NOT_OF_A_RUN},
        "grid": run.grid,
        "baseline": run.baseline,
        **sweep.provenance,
    }
    summary = of_one_run(kept, run.options.cap, lanes.num_classes, broken)
    sweep.folder.write_run(run.path, config, kept, summary, timing)


def _last_round(rows: list[dict[str, Any]], filled: bool, rounds: int) -> int:
    """Where a lane stops: at once if it only fills up the program, where it broke if it did."""
    if not filled:
        return 0
    return rows[-1]["round"] if rows and not rows[-1]["finite"] else rounds


def _lane(metrics: simulate.Metrics, place: int) -> simulate.Metrics:
    return jax.tree.map(lambda leaf: leaf[place], metrics)


def describe(options: SweepOptions, runs: list[Run], here: dict[str, Any]) -> dict[str, Any]:
    """For sweep.json."""
    return {
        "grid": {axis.flag: list(axis.values) for axis in options.axes},
        "runs": [run.path for run in runs],
        "options": {k: v for k, v in options.given.items() if k not in NOT_OF_A_RUN},
        **here,
    }


def report(options: SweepOptions, runs: int) -> None:
    console = Console(highlight=False)
    console.print(f"{options.out} holds {runs} runs", soft_wrap=True)
    console.print(
        f"tables and pictures: python -m experiments.report {shlex.quote(options.out)}",
        soft_wrap=True,
    )


def _leave(code: int) -> int:
    """With several processes, at once: JAX would wait for the others on the way out."""
    if jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(code)
    return code


def complain(message: str) -> None:
    sys.stderr.write(
        f"experiments.sweep: {' '.join(message.split())}\n"
    )  # at once, beside other threads
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
