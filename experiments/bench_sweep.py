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
from absl import flags
from rich.console import Console

from experiments.bench import command
from experiments.command import end_with_flags
from experiments.sweep.options import find_file
from experiments.sweep.provenance import provenance
from noisefl import mesh
from noisefl.errors import refuse

_LANES = flags.DEFINE_integer("lanes", 16, "runs of the sweeps", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 30, "of each run", lower_bound=1)
_PRESET = flags.DEFINE_string("preset", "quickstart", "a flag file of experiments.run")
_CPU_DEVICES = flags.DEFINE_list("cpu_devices", ["1", "2", "4"], "of one process")
_PROCESSES = flags.DEFINE_list("processes", ["2"], "more set-ups, with a device in each process")
_JSON = flags.DEFINE_string("json", None, "file for the results")
_LIMIT = 3600  # seconds for a command


def main(argv: list[str]) -> None:
    results = []
    for setup in command.checked("bench_sweep", argv, check, _JSON.value):
        results.append(measure(*setup))
        results[-1]["ratio"] = results[-1]["seconds_a_run"] / results[0]["seconds_a_run"]
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    command.write(_JSON.value, [*results, provenance(mesh.make())])
    lines = [
        {
            **{name: str(r[name]) for name in ("runs", "devices", "processes")},
            "s a run": f"{r['seconds_a_run']:.1f}",
            "over one alone": f"{r['ratio']:.2f}",
            "outside programs": f"{r['outside_programs']:.1%}",
        }
        for r in results
    ]
    title = f"{_PRESET.value}, {_ROUNDS.value} rounds"
    Console(highlight=False).print(command.table(title, lines))


def check() -> list[tuple[int, int, int]]:
    """(runs, devices, processes) of each command; raises one line about the first bad flag."""
    for name, words in (("cpu_devices", _CPU_DEVICES.value), ("processes", _PROCESSES.value)):
        for word in words:
            if not word.isdecimal() or not 1 <= int(word) <= 64:
                raise refuse(name, word, "must be whole numbers from 1 to 64")
    find_file(_PRESET.value)
    setups = [(1, 1, 1)] + [(_LANES.value, int(n), 1) for n in _CPU_DEVICES.value]
    return setups + [(_LANES.value, 1, int(n)) for n in _PROCESSES.value]


def measure(runs: int, devices: int, processes: int) -> dict[str, Any]:
    """One sweep of `runs` seeds."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        line = [
            *(sys.executable, "-m", "experiments.run", f"--flagfile={_PRESET.value}"),
            *(f"--grid=seed=0:{runs}", f"--rounds={_ROUNDS.value}", "--nobaseline"),
            *(f"--out={folder}/sweep", "--compilation_cache=off", f"--cpu_devices={devices}"),
        ]
        places = [[]]
        if processes > 1:
            meet = ["--distributed", f"--coordinator=127.0.0.1:{free_port()}"]
            meet += [f"--num_processes={processes}"]
            places = [[*meet, f"--process_id={place}"] for place in range(processes)]
        begin = time.perf_counter()
        started = [subprocess.Popen([*line, *place], stdout=subprocess.DEVNULL) for place in places]
        for process in started:
            stack.enter_context(process)
        try:
            codes = [process.wait(_LIMIT) for process in started]
        finally:
            for process in started:
                process.kill()
        seconds = time.perf_counter() - begin
        if any(codes):
            sys.exit(f"experiments.bench_sweep: {' '.join(line)} ended with {codes}")
        files = Path(folder).glob("sweep/runs/*/*/timing.json")
        timings = [json.loads(file.read_text()) for file in files]
    inside, whole = (sum(t[name] for t in timings) for name in ("program_seconds", "seconds"))
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
    end_with_flags(main)
