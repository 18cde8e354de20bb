"""Groups and their batches: runs side by side in one program, begun or gone on with, and written.

FedAvg and one run are such a batch too, which stays, so that --rounds may grow.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.command import complain
from experiments.flags.fields import described
from experiments.sweep import hosts
from experiments.sweep.options import CommandLine
from experiments.sweep.plan import Run, batch_name, batches
from experiments.sweep.prepare import Compiled, Lanes
from experiments.sweep.progress import Progress
from experiments.sweep.store import Row, Store
from experiments.sweep.summary import summarise
from noisefl import mesh, simulate
from noisefl.errors import refuse
from noisefl.record import Checkpoints, plain
from noisefl.sweep import TooLarge, in_order

Columns = dict[str, np.ndarray]  # [L, t] by name; "round" is 0 where there was none


class Sweep(NamedTuple):
    """What every batch needs.

    Attributes:
      runs: all of them.
      done: paths of those that were complete at the start.
      rows: of a single run, the rows of what is complete by path: they are written together.
      said: likewise, what its measures said in the end.
    """

    command: CommandLine
    runs: list[Run]
    store: Store
    on: Mesh
    progress: Progress
    provenance: dict[str, Any]
    done: set[str]
    rows: dict[str, list[Row]]
    said: dict[str, list[Row]]


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


class Unfit(ValueError):
    """A batch cannot go on; the message says how it was begun or left."""


def run_group(sweep: Sweep, number: int, lanes: Lanes) -> int:
    """Batches under way first, then the runs that none has begun.

    Returns:
      How many runs are left out because not even one of them fits in memory.
    """
    driver, on, group = sweep.command.driver, sweep.on, lanes.group
    left = [run for run in group.runs if run.path not in sweep.done]
    if not left:
        return 0
    sweep.progress.group(number, group.title, len(group.runs), len(group.runs) - len(left))
    programs: dict[tuple[int, int], Compiled] = {}

    def program_of(width: int, chunk: int) -> Compiled:
        if (width, chunk) not in programs:
            programs[width, chunk] = lanes.compile(on, width, chunk)
        return programs[width, chunk]

    try:
        for name, batch in begun(sweep, group.runs, {run.path for run in left}):
            try:
                compiled = program_of(batch.lanes, batch.chunk)
                if compiled.lanes != batch.lanes:
                    raise Unfit("was begun with more memory")
                run_batch(sweep, lanes, batch, compiled)
            except Unfit as error:
                drop(sweep, name, str(error))
                continue
            resumed = {run.path for run in batch.runs}
            left = [run for run in left if run.path not in resumed]
        if left:
            chunk = driver.rounds_per_chunk
            compiled = program_of(lanes.width(on, driver.lanes_at_once), chunk)
            for some in batches(left, compiled.lanes):
                run_batch(sweep, lanes, Batch(some, compiled.lanes, chunk), compiled)
    except TooLarge as error:
        complain(f"{group.title}: {error}; its {len(left)} runs are left out")
        return len(left)
    return 0


def begun(sweep: Sweep, runs: Sequence[Run], waiting: set[str]) -> list[tuple[str, Batch]]:
    """Batches, by name, that an earlier start of the driver has not ended.

    Args:
      sweep: all of it.
      runs: of a group.
      waiting: paths of those that are not complete.
    """
    by_path, found = {run.path: run for run in runs}, []
    for batch in hosts.agree(sweep.store.open_batches):
        name, paths = batch["name"], batch["runs"]
        if not waiting & set(paths):
            continue
        if not by_path.keys() >= set(paths):
            drop(sweep, name, "was begun for another grid")
        elif batch["lanes"] % sweep.on.shape[mesh.LANES]:
            drop(sweep, name, "was begun on other devices")
        else:
            some = [by_path[path] for path in paths]
            found.append((name, Batch(some, batch["lanes"], batch["rounds_per_chunk"])))
            waiting = waiting - set(paths)
    return found


def drop(sweep: Sweep, name: str, why: str) -> None:
    """Removes a batch that cannot go on, before any process begins one of the same name.

    Raises:
      ValueError: it is a single run's; whoever made it is to decide.
    """
    if sweep.store.single:
        raise refuse("out", str(sweep.store.batch(name)), f"{why}; give another --out")
    if hosts.first():
        complain(f"batch {name} {why}; its runs begin anew")
        sweep.store.drop(name)
    hosts.meet(f"batch {name} is dropped")


def run_batch(sweep: Sweep, lanes: Lanes, batch: Batch, compiled: Compiled) -> None:
    """Advances runs side by side to their last round, and writes what they came to.

    Raises:
      Unfit: its checkpoint cannot be read.
    """
    driver, store, on, (runs, width, chunk) = sweep.command.driver, sweep.store, sweep.on, batch
    name, program = batch_name(runs), compiled.program
    begin, inside = time.perf_counter(), 0.0  # seconds, and those of them in the program
    over, own = mesh.over_lanes(on), mesh.own_lanes(on, width)
    left = sum(run.path not in sweep.done for run in runs)
    inputs = lanes.inputs(on, runs, width)
    states = program.init(inputs.seeds, inputs.data, inputs.experiments)
    with Checkpoints(store.batch(name)) as checkpoints:
        number, columns = checkpoints.round, {}
        if number:
            try:
                states, rows = hosts.together(lambda: checkpoints.restore(states))
            except ValueError as error:
                raise Unfit(f"cannot go on ({error})") from None
            columns = mesh.everyones(rows)
        description = {
            "runs": [run.path for run in runs],
            "lanes": width,
            "rounds_per_chunk": chunk,
            "provenance": sweep.provenance,
        }
        began, warnings = hosts.agree(lambda: store.begin(name, description, number > 0))
        for warning in warnings if hosts.first() else []:
            complain(warning)
        sweep.progress.batch(left, number)
        follow(sweep, lanes, batch, columns, began)
        saved = number
        while number < driver.rounds:
            limits = mesh.put(last_rounds(columns, len(runs), width, driver.rounds)[own], over)
            start = time.perf_counter()
            states, found = program.chunk(
                inputs.seeds, states, inputs.data, inputs.experiments, limits
            )
            found = mesh.everyones(jax.block_until_ready(found))
            inside += time.perf_counter() - start
            columns = extended(columns, found, driver.rounds)
            number = min(number + chunk, driver.rounds)
            sweep.progress.rounds(number, [run.kind for run in runs], columns)
            if number - saved >= driver.checkpoint_every or number == driver.rounds:
                rows = {key: column[own] for key, column in columns.items()}
                checkpoints.save(number, states, mesh.put(rows, over))
                saved = number
                follow(sweep, lanes, batch, columns, began)
    begin_last, said = time.perf_counter(), {}
    if program.conclude is not None:
        sweep.progress.concluding(0, width)
        found = []
        for some in program.conclude(inputs.seeds, states, inputs.data, inputs.experiments):
            found.append(some)
            sweep.progress.concluding(len(found) * on.shape[mesh.LANES], width)
        said = in_order(found)
    if hosts.first():
        timing = {
            "seconds": round((time.perf_counter() - begin) / len(runs), 4),
            "program_seconds": round(inside / len(runs), 4),
            "compile_seconds": round(compiled.seconds, 4),  # of all, without what comes last:
            "thieves_seconds": round((time.perf_counter() - begin_last) / len(runs), 4),
            "batch": name,
        }
        finish(sweep, lanes, batch, columns, said, began, timing)
    hosts.meet(f"batch {name} is written")
    if hosts.first() and not store.single:
        store.drop(name)
    sweep.progress.finished(left)


def follow(sweep: Sweep, lanes: Lanes, batch: Batch, columns: Columns, began: Row) -> None:
    """Lets a person see the rows of a single run so far."""
    if sweep.store.single and hosts.first():
        rows = {run.path: rows_of(run, columns, lane) for lane, run in enumerate(batch.runs)}
        rows = joined(sweep.runs, {**sweep.rows, **rows})
        sweep.store.follow(config_of(sweep, lanes, sweep.runs[-1], batch.chunk, began), rows)


def finish(
    sweep: Sweep, lanes: Lanes, batch: Batch, columns: Columns, said: Any, began: Row, timing: Row
) -> None:
    """Writes the results of a batch: of a sweep each run's, of a single run those of both, once
    both are there."""
    store, rounds, num_classes = (
        sweep.store, sweep.command.driver.rounds, lanes.dataset.num_classes,
    )  # fmt: skip
    for lane, run in enumerate(batch.runs):
        rows, stolen, draw = rows_of(run, columns, lane), stolen_of(run, said, lane), None
        if store.single:
            sweep.rows[run.path], sweep.said[run.path] = rows, stolen
            if len(sweep.rows) < len(sweep.runs):
                continue
            run = sweep.runs[-1]  # FedAvg is what it is compared with
            rows, stolen = joined(sweep.runs, sweep.rows), joined(sweep.runs, sweep.said)
            draw = drawn
        elif run.path in sweep.done:
            continue
        config = config_of(sweep, lanes, run, batch.chunk, began)
        summary = summarise(rows, run.cap, num_classes, rounds, stolen)
        picture = draw and draw(run, rows, summary)
        store.finish(run.path, config, rows, timing, summary, picture, stolen)


def config_of(sweep: Sweep, lanes: Lanes, run: Run, chunk: int, began: Row) -> Row:
    """The content of a run's config.json; `began`: what its batch was begun under."""
    strategy = described(lanes.experiment(run).strategy)
    return {
        "run": run.kind,
        **({"runs": {one.path: one.entry for one in sweep.runs}} if sweep.store.single else {}),
        "options": {**run.flags, "rounds_per_chunk": chunk},
        "strategy": {path[-1]: value for path, value in strategy},
        **began,
    }


def last_rounds(columns: Columns, filled: int, width: int, rounds: int) -> np.ndarray:
    """int32 [L]: where a lane stops: at once if it only fills up the program, where it broke down
    if it did."""
    last = np.where(np.arange(width) < filled, rounds, 0)
    if columns:
        broken = (columns["round"] > 0) & ~columns["finite"]
        last = np.where(broken.any(axis=1), np.max(columns["round"], axis=1), last)
    return last.astype(np.int32)


def extended(columns: Columns, found: Mapping[str, np.ndarray], rounds: int) -> Columns:
    """With the rounds of another chunk, up to the last; of a lane, up to where it broke down."""
    if columns:
        found = {name: np.concatenate([columns[name], new], 1) for name, new in found.items()}
    columns = {name: column[:, :rounds] for name, column in found.items()}
    broken = (columns["round"] > 0) & ~columns["finite"]
    past = np.cumsum(broken, axis=1) - broken > 0
    return {**columns, "round": np.where(past, 0, columns["round"])}


def rows_of(run: Run, columns: Columns, lane: int) -> list[Row]:
    """The rounds of a lane, as JSON values."""
    if not columns:
        return []
    there = columns["round"][lane] > 0
    rows = simulate.rows({name: column[lane][there] for name, column in columns.items()})
    return [{"run": run.kind, **plain(row)} for row in rows]


def stolen_of(run: Run, said: Any, lane: int) -> list[Row]:
    """What the measures of a lane said in the end, as JSON values, a row each."""
    found = []
    for row, columns in said.items():
        columns = dict(columns)
        if not columns.pop("tried", np.ones(lane + 1, bool))[lane]:
            continue
        values = {name: float(str(column[lane])) for name, column in columns.items()}
        whole = {name for name, column in columns.items() if column.dtype.kind == "i"}
        values |= {name: int(values[name]) for name in whole}
        found.append({"run": run.kind, **row._asdict(), **plain(values)})
    return found


def joined(runs: Sequence[Run], rows: Mapping[str, list[Row]]) -> list[Row]:
    """One run after the other."""
    return [row for run in runs for row in rows.get(run.path, [])]


def drawn(run: Run, rows: list[Row], summary: Row) -> Any:
    """What draws the picture of a single run."""

    def draw(file: Path) -> None:
        from experiments.report.figure1 import figure1  # with matplotlib, which takes a second

        scale = run.flags.get("noise_scale", "absolute")
        figure1(rows, run.cap, file, scale, summary.get("thieves"))

    return draw
