"""`python -m experiments.run`: FedAvg and a scheme side by side; with --grid, many runs.

Started again with the same command, it goes on where it was stopped, to the same bits. Exit codes:
0 done (runs of a grid that broke down included), 2 bad input or too little memory, 3 a single run
broke down (NaN), 4 another process is gone (or 134, if JAX's runtime notices first), 130
interrupted.
"""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from experiments import interrupt
from experiments.command import complain, end
from experiments.sweep import hosts
from experiments.sweep.execute import Sweep, run_group
from experiments.sweep.options import CommandLine, parse
from experiments.sweep.plan import Run, groups, plan
from experiments.sweep.prepare import compilation_cache, forget, prepare
from experiments.sweep.progress import Progress
from experiments.sweep.provenance import provenance
from experiments.sweep.store import Store, check, is_complete
from experiments.sweep.summary import table
from noisefl import mesh
from noisefl.errors import refuse


def main(argv: list[str]) -> int:
    """Runs one command line; returns the exit code."""
    again = "go on with: " + shlex.join(["python", "-m", "experiments.run", *argv[1:]])
    try:
        command = parse(argv)
        if command is None:
            return 0
        command.driver.start_devices()
        return run(command, again)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        complain(str(error))
        return _leave(2)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        complain(f"another process is gone, or failed ({error}); {again}")
        return _leave(4)
    except KeyboardInterrupt:  # before or after all rounds; see `interrupt` for the time between
        complain(f"interrupted; {again}")
        return _leave(interrupt.EXIT_CODE)


def run(command: CommandLine, again: str) -> int:
    """Checks everything that can be, then runs group after group."""
    driver, single, out = command.driver, command.single, Path(command.out)
    runs, on = hosts.together(lambda: planned(command))
    here = provenance(on)
    description = describe(command, runs, here)
    if apart := hosts.differences(of_all_processes(command, runs, here)):
        allowed = f"all processes must be given the same flags and code: {', '.join(apart)}"
        raise refuse("distributed", True, allowed)

    def complete() -> list[str]:
        folders = {run.path: out if single else out / run.path for run in runs}
        return [path for path, folder in folders.items() if is_complete(folder, driver.rounds)]

    hosts.agree(lambda: check(out, single, description))
    done = set(hosts.agree(complete))
    if len(done) == len(runs) and not driver.dry_run:
        return report(command, len(runs))
    wanted = [
        group
        for group in groups(runs)
        if driver.dry_run or any(run.path not in done for run in group.runs)
    ]
    prepared = hosts.together(lambda: [prepare(group, driver, on) for group in wanted])
    cache = compilation_cache(driver.compilation_cache)
    if driver.dry_run:
        from experiments.sweep.estimate import estimate  # which it alone needs

        with cache:
            estimate(command, prepared, on, len(done))
        return 0
    with (
        hosts.together(lambda: Store(out, single, hosts.first())) as store,
        cache,
        Progress(len(runs), len(prepared), driver.rounds, not hosts.first()) as progress,
    ):
        hosts.agree(lambda: store.claim(description))
        progress.skip(len(done))
        sweep = Sweep(command, runs, store, on, progress, here, done, {}, {})

        def last_words() -> None:
            progress.stop()
            complain(f"interrupted; {again}")

        with interrupt.exit_at_once(last_words):
            if hosts.first():
                store.tidy(done)
            left_out = 0
            for number, lanes in enumerate(prepared, 1):
                if number > 1:
                    forget()
                left_out += run_group(sweep, number, lanes)
            if hosts.first():
                store.tidy(set(complete()))
    if left_out:
        complain(f"{left_out} of {len(runs)} runs are left out, as said above")
        return _leave(2)
    return report(command, len(runs))


def planned(command: CommandLine) -> tuple[list[Run], Mesh]:
    """All runs, FedAvg before what it is compared with, and the devices for them."""
    runs, share = plan(command), command.driver.client_devices
    alone, devices = jax.process_count() == 1, jax.devices()
    if share is None:
        clients = min(sum(run.experiment.cohort.sizes) for run in runs)
        share = mesh.idle(len(devices), len(runs), clients) if alone else 1
    return runs, mesh.make(share, devices[: len(runs) * share] if alone else None)


def of_all_processes(command: CommandLine, runs: list[Run], here: dict[str, Any]) -> Any:
    """What must be the same in all of them: else they would wait for each other without end."""
    names = ("lanes_at_once", "client_devices", "dry_run", "rounds_per_chunk", "checkpoint_every")
    return {
        "runs": [[run.path, run.flags] for run in runs],
        **{name: getattr(command.driver, name) for name in names},
        "versions": here["versions"],
        "git_revision": here["git_revision"],
    }


def describe(command: CommandLine, runs: list[Run], here: dict[str, Any]) -> dict[str, Any]:
    """What the file says that makes a folder ours: config.json, or sweep.json of a grid."""
    varied = {axis.flag: axis.values for axis in command.axes}
    options = {name: value for name, value in runs[-1].flags.items() if name not in varied}
    grid = {flag: list(values) for flag, values in varied.items()}
    return {
        **({} if command.single else {"grid": grid}),
        "runs": {run.path: run.entry for run in runs},
        "options": options,
        **here,
    }


def report(command: CommandLine, runs: int) -> int:
    """Says what the folder holds; of a single run its table, and 3 if one of its two broke down."""
    if not hosts.first():
        return 0
    console, out = Console(highlight=False, markup=False), command.out
    if not command.single:
        console.print(f"{out} holds {runs} runs", soft_wrap=True)
        line = f"tables and pictures: python -m experiments.report {shlex.quote(out)}"
        console.print(line, soft_wrap=True)
        return 0
    try:
        summary = json.loads((Path(out) / "summary.json").read_text())
        shown = table(summary, command.driver.seed, out)
        failed = summary["failed"] or summary.get("baseline_failed")
        cause = str(failed["cause"]) if failed else ""
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        allowed = f"its summary.json is damaged ({error!r}); remove it, and give the command again"
        raise refuse("out", out, allowed) from None
    console.print(shown)
    stolen = "thieves.jsonl, " if "thieves" in summary else ""
    files = f"config.json, metrics.jsonl, {stolen}summary.json, figure1.png"
    console.print(f"{out} holds {files}", soft_wrap=True)
    if failed:
        complain(cause)
        return 3
    return 0


def _leave(code: int) -> int:
    """With several processes, at once: JAX would wait for the others on the way out."""
    if jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    end(main)
