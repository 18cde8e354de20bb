"""`python -m experiments.sweep`: many runs as one program, on one device or many.

Started again with the same command, it goes on where it was killed, to the same bits. Exit codes:
0 done (runs that broke down included), 2 bad input or too little memory, 4 another process of the
sweep is gone (or 134, if JAX's runtime notices first), 130 interrupted.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from experiments import hosts, interrupt
from experiments.plan import Run, groups, plan
from experiments.provenance import provenance
from experiments.run import compilation_cache
from experiments.sweep_batches import Sweep, run_group
from experiments.sweep_flags import NOT_OF_A_RUN, SweepOptions, parse
from experiments.sweep_group import Lanes, prepare
from experiments.sweep_progress import SweepProgress, complain
from experiments.sweep_results import is_complete
from experiments.sweep_store import SweepFolder, check
from noisefl import mesh
from noisefl.config import refuse


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
    runs, on, prepared = hosts.together(lambda: checked(options))
    here = provenance()
    if apart := hosts.differences(of_all_processes(options, runs, here)):
        allowed = f"all processes must be given the same flags and code: {', '.join(apart)}"
        raise refuse("distributed", True, allowed)
    cache = compilation_cache(options.given["compilation_cache"])
    if options.dry_run:
        from experiments.sweep_estimate import estimate  # which it alone needs

        with cache:
            done = sum(is_complete(Path(options.out) / run.path) for run in runs)
            estimate(options, prepared, on, done)
        return 0
    quiet = not hosts.first()
    with (
        open_folder(options) as folder,
        cache,
        SweepProgress(len(runs), len(prepared), options.rounds, quiet) as progress,
    ):
        if hosts.first():
            folder.claim(describe(options, runs, here))
            folder.sweep_up()
        done = set(hosts.agree([run.path for run in runs if folder.is_done(run.path)]))
        progress.skip(len(done))
        sweep = Sweep(options, folder, on, progress, here, done)

        def last_words() -> None:
            progress.stop()
            complain(f"interrupted; {again}")

        with interrupt.exit_at_once(last_words):
            left_out = [run_group(sweep, number, lanes) for number, lanes in enumerate(prepared, 1)]
        if hosts.first():
            folder.sweep_up()
    if sum(left_out):
        complain(f"{sum(left_out)} of {len(runs)} runs are left out, as said above")
        return _leave(2)
    if hosts.first():
        report(options, len(runs))
    return 0


def checked(options: SweepOptions) -> tuple[list[Run], Mesh, list[Lanes]]:
    """The runs, the devices, the groups; all that can be wrong with them is found here."""
    runs = plan(options.given, options.axes, options.baseline)
    on = mesh.make(options.client_devices)
    prepared = [prepare(group, options.given["data_dir"]) for group in groups(runs)]
    if hosts.first():
        check(Path(options.out), [run.path for run in runs])
    return runs, on, prepared


def of_all_processes(options: SweepOptions, runs: list[Run], here: dict[str, Any]) -> Any:
    """What must be the same in all of them: else they would wait for each other without end."""
    flags = ("lanes_at_once", "client_devices", "dry_run")
    return {
        "runs": [run.path for run in runs],
        **{name: options.own[name] for name in flags},
        "rounds_per_chunk": options.chunk,
        "checkpoint_every": options.checkpoint_every,
        "versions": here["versions"],
        "git_revision": here["git_revision"],
    }


def open_folder(options: SweepOptions) -> SweepFolder:
    """Held by the first process; if it is refused the folder, all are."""
    return hosts.together(lambda: SweepFolder(options.out, lock=hosts.first()))


def describe(options: SweepOptions, runs: list[Run], here: dict[str, Any]) -> dict[str, Any]:
    """For sweep.json."""
    return {
        "grid": {axis.flag: list(axis.values) for axis in options.axes},
        "runs": {run.path: run.entry for run in runs},
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


if __name__ == "__main__":
    sys.exit(main(sys.argv))
