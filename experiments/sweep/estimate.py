"""What a sweep would cost: one round of one batch of each group is run and timed."""

import math
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from experiments.sweep import hosts
from experiments.sweep.options import CommandLine
from experiments.sweep.prepare import Compiled, Lanes, forget
from noisefl import mesh
from noisefl.sweep import TooLarge


def estimate(command: CommandLine, prepared: Sequence[Lanes], on: Mesh, done: int) -> None:
    """Prints a line a group: runs, lanes at once, batches, compilation, memory, time.

    All runs are counted, those that are `done` as well. The round that is timed is a protected one
    of the first batch, from an untrained model: the calibration of trained ones may take longer or
    shorter.
    """
    driver = command.driver
    table = Table()
    for column in ("group", "runs", "at once", "batches", "compile", "memory a\ndevice", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    total = 0.0
    talk = Console(stderr=True, highlight=False, markup=False, quiet=not hosts.first())
    for number, one in enumerate(prepared, 1):
        if number > 1:
            forget()
        talk.print(f"group {number}/{len(prepared)}: compiling and timing a round", soft_wrap=True)
        title, chunk = str(number), driver.rounds_per_chunk
        try:
            compiled = one.compile(on, one.width(on, driver.lanes_at_once), chunk)
        except TooLarge:
            table.add_row(title, _runs(one), "–", "–", "–", "too large", "–")
            continue
        width, program, compilation = compiled
        batches = math.ceil(len(one.group.runs) / width)
        chunks = math.ceil(driver.rounds / chunk)
        of_chunk, of_thieves = _seconds(one, on, compiled, chunk)
        seconds = compilation + batches * (chunks * of_chunk + of_thieves)
        total += seconds
        table.add_row(
            title, _runs(one), str(width), str(batches), f"{compilation:.0f} s",
            f"{program.bytes_a_device / 1e9:.2f} GB", _duration(seconds),
        )  # fmt: skip
    console = Console(highlight=False, markup=False, quiet=not hosts.first())
    console.print(  # no title of the table, which would be as narrow
        f"{sum(len(one.group.runs) for one in prepared)} runs of {driver.rounds} rounds on "
        f"{on.devices.size} devices ({on.shape[mesh.LANES]} x {on.shape[mesh.CLIENTS]} of "
        f"lanes x clients), {len(prepared)} compilations",
        soft_wrap=True,
    )
    for number, one in enumerate(prepared, 1):  # of any length: they do not fit a column
        console.print(f"group {number}: {one.group.title}", soft_wrap=True)
    console.print(table)
    already = f"; {done} of the runs are done already" if done else ""
    console.print(f"in all about {_duration(total)}{already}; nothing was written", soft_wrap=True)


def _seconds(one: Lanes, on: Mesh, compiled: Compiled, chunk: int) -> tuple[float, float]:
    """Of one chunk of protected rounds of a whole batch, and of what its measures do in the end."""
    width, program, _ = compiled
    inputs = one.inputs(on, one.group.runs[:width], width, warmed_up=True)
    last = np.full(len(mesh.own_lanes(on, width)), chunk, np.int32)
    states = program.init(inputs.seeds, inputs.data, inputs.experiments)
    given = inputs.data, inputs.experiments, mesh.put(last, mesh.over_lanes(on))
    jax.block_until_ready(states)
    begin = time.perf_counter()
    states, _ = jax.block_until_ready(program.chunk(inputs.seeds, states, *given))
    of_chunk = time.perf_counter() - begin
    if program.conclude is None:
        return of_chunk, 0.0
    said = program.conclude(inputs.seeds, states, inputs.data, inputs.experiments)
    next(said)  # compiles it as well
    begin = time.perf_counter()
    if next(said, None) is None:  # there was one lane a device, and is once more
        next(program.conclude(inputs.seeds, states, inputs.data, inputs.experiments))
    return of_chunk, (time.perf_counter() - begin) * width / on.shape[mesh.LANES]


def _runs(one: Lanes) -> str:
    fedavg = sum(run.kind == "fedavg" for run in one.group.runs)
    return f"{len(one.group.runs)}{f' ({fedavg} FedAvg)' if fedavg else ''}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
