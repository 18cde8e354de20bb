"""What a sweep would cost: one round of one batch of each group is run and timed."""

import math
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from experiments import hosts
from experiments.sweep_flags import SweepOptions
from experiments.sweep_group import Lanes
from noisefl import mesh
from noisefl.sweep import TooLarge


def estimate(options: SweepOptions, prepared: Sequence[Lanes], on: Mesh, done: int) -> None:
    """Prints a line a group: runs, lanes at once, batches, compilation, memory, time.

    All runs are counted, those that are `done` as well.

    The round that is timed is a protected one of the first batch, from an untrained model: the
    calibration of trained ones may take longer or shorter.
    """
    table = Table(
        title=f"{sum(len(one.group.runs) for one in prepared)} runs of {options.rounds} rounds on "
        f"{on.devices.size} devices ({on.shape[mesh.LANES]} x {on.shape[mesh.CLIENTS]} of "
        f"lanes x clients), {len(prepared)} compilations",
        title_justify="left",
    )
    for column in ("group", "runs", "at once", "batches", "compile", "memory a device", "time"):
        first = column == "group"
        table.add_column(column, justify="left" if first else "right", no_wrap=not first)
    total = 0.0
    talk = Console(stderr=True, highlight=False, quiet=not hosts.first())
    for number, one in enumerate(prepared, 1):
        talk.print(f"group {number}/{len(prepared)}: compiling and timing a round", soft_wrap=True)
        begin, title = time.perf_counter(), one.group.title
        try:
            width = one.width(on, options.lanes_at_once)
            width, program = one.compile(on, width, options.chunk)
        except TooLarge:
            table.add_row(title, _runs(one), "–", "–", "–", "too large", "–")
            continue
        compiled = time.perf_counter() - begin
        batches = math.ceil(len(one.group.runs) / width)
        chunks = math.ceil(options.rounds / options.chunk)
        seconds = compiled + batches * chunks * _seconds(one, on, width, program, options.chunk)
        total += seconds
        table.add_row(
            title,
            _runs(one),
            str(width),
            str(batches),
            f"{compiled:.0f} s",
            f"{program.bytes_a_device / 1e9:.2f} GB",
            _duration(seconds),
        )
    console = Console(highlight=False, quiet=not hosts.first())
    console.print(table)
    already = f"; {done} of the runs are done already" if done else ""
    console.print(f"in all about {_duration(total)}{already}; nothing was written", soft_wrap=True)


def _seconds(one: Lanes, on: Mesh, width: int, program, chunk: int) -> float:
    """Of one chunk of protected rounds of a whole batch."""
    inputs = one.inputs(on, one.group.runs[:width], width)
    noisy = inputs.hypers.replace(
        warmup_rounds=mesh.put(
            np.zeros(len(mesh.own_lanes(on, width)), np.int32), mesh.over_lanes(on)
        )
    )
    own = len(mesh.own_lanes(on, width))
    last = mesh.put(np.full(own, chunk, np.int32), mesh.over_lanes(on))
    states = jax.block_until_ready(program.init(inputs.seeds))
    begin = time.perf_counter()
    jax.block_until_ready(program.chunk(inputs.seeds, states, inputs.data, noisy, last))
    return time.perf_counter() - begin


def _runs(one: Lanes) -> str:
    fedavg = sum(run.kind == "fedavg" for run in one.group.runs)
    return f"{len(one.group.runs)}{f' ({fedavg} FedAvg)' if fedavg else ''}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
