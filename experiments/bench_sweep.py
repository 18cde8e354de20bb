"""`python -m experiments.bench_sweep`: what a run costs in a sweep, against one on its own.

Whole commands, compilation included, each in a process of its own that starts without compiled
programs: one run on one device, then sweeps of more runs, on more devices and in more processes.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.options import find_preset
from experiments.provenance import provenance
from noisefl.config import refuse

_LANES = flags.DEFINE_integer("lanes", 16, "runs of the sweeps", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 30, "of each run", lower_bound=1)
_PRESET = flags.DEFINE_string("preset", "quickstart", "a preset of experiments.run, or a file")
_CPU_DEVICES = flags.DEFINE_list("cpu_devices", ["1", "2", "4"], "of one process")
_PROCESSES = flags.DEFINE_list("processes", ["2"], "more set-ups, with a device in each process")
_JSON = flags.DEFINE_string("json", None, "file for the results")
_LIMIT = 3600  # seconds for a command


def main(argv: list[str]) -> None:
    try:
        setups = checked(argv)
    except (ValueError, OSError) as error:
        sys.exit(f"experiments.bench_sweep: {error}")
    results = []
    for setup in setups:
        results.append(measure(*setup))
        results[-1]["ratio"] = results[-1]["seconds_a_run"] / results[0]["seconds_a_run"]
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps([*results, provenance()], indent=1) + "\n")
    table = Table(title=f"{_PRESET.value}, {_ROUNDS.value} rounds", title_justify="left")
    columns = ("runs", "devices", "processes", "s a run", "over one alone", "outside programs")
    for column in columns:
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            *(str(r[name]) for name in ("runs", "devices", "processes")),
            f"{r['seconds_a_run']:.1f}",
            f"{r['ratio']:.2f}",
            f"{r['outside_programs']:.1%}",
        )
    Console(highlight=False).print(table)


def checked(argv: list[str]) -> list[tuple[int, int, int]]:
    """(runs, devices, processes) of each command; raises one line about the first bad flag."""
    if argv[1:]:
        raise ValueError(f"unexpected argument {argv[1]!r}: flags begin with --")
    for name, words in (("cpu_devices", _CPU_DEVICES.value), ("processes", _PROCESSES.value)):
        for word in words:
            if not word.isdecimal() or not 1 <= int(word) <= 64:
                raise refuse(name, word, "must be whole numbers from 1 to 64")
    find_preset(_PRESET.value)
    if _JSON.value:
        Path(_JSON.value).touch()
    setups = [(1, 1, 1)] + [(_LANES.value, int(n), 1) for n in _CPU_DEVICES.value]
    return setups + [(_LANES.value, 1, int(n)) for n in _PROCESSES.value]


def measure(runs: int, devices: int, processes: int) -> dict[str, Any]:
    """One sweep of `runs` seeds."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        command = [
            *(sys.executable, "-m", "experiments.sweep", f"--flagfile={_PRESET.value}"),
            *(f"--grid=seed=0:{runs}", f"--rounds={_ROUNDS.value}", "--nobaseline"),
            *(f"--out={folder}/sweep", "--compilation_cache=off", f"--cpu_devices={devices}"),
        ]
        places = [[]]
        if processes > 1:
            meet = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
            places = [
                ["--distributed", *meet, f"--process_id={place}"] for place in range(processes)
            ]
        begin = time.perf_counter()
        started = [
            stack.enter_context(
                subprocess.Popen([*command, *place], stdout=subprocess.DEVNULL, stderr=sys.stderr)
            )
            for place in places
        ]
        try:
            codes = [process.wait(_LIMIT) for process in started]
        finally:
            for process in started:
                process.kill()
        seconds = time.perf_counter() - begin
        if any(codes):
            sys.exit(f"experiments.bench_sweep: {' '.join(command)} ended with {codes}")
        timings = [
            json.loads(f.read_text()) for f in Path(folder).glob("sweep/runs/*/*/timing.json")
        ]
    inside = sum(timing["program_seconds"] for timing in timings)
    whole = sum(timing["seconds"] for timing in timings)
    return {
        "runs": runs,
        "devices": devices * processes,
        "processes": processes,
        "seconds": seconds,
        "seconds_a_run": seconds / runs,
        # Of the time after compilation: data, records, checkpoints, progress.
        "outside_programs": 1 - inside / whole,
        "cores": os.cpu_count(),
        "backend": jax.default_backend(),
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    app.run(main)
