"""`python -m experiments.run`: FedAvg and Noise-based Federated Averaging on one seed.

Exit codes: 0 done, 2 bad input, 3 training broke down (NaN), 130 interrupted.
"""

import contextlib
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from rich.console import Console

from experiments import interrupt
from experiments.loading import dataset_of, federated, model_of
from experiments.options import MAY_CHANGE, Options, parse
from experiments.plot import figure1
from experiments.progress import RunProgress
from experiments.provenance import provenance
from experiments.summary import summarise, table
from noisefl import Hyper, Round, fedavg, keys, make_round, simulate
from noisefl.data import FederatedData
from noisefl.record import RunFolder

RUNS = ("fedavg", "noise")


class BrokenDown(Exception):
    """Parameters became NaN or infinite; the message is one line."""


class Experiment(NamedTuple):
    """All that training needs, checked."""

    options: Options
    round: Round
    program: jax.stages.Lowered
    data: FederatedData
    num_classes: int


def main(argv: list[str]) -> int:
    """Runs one command line; returns the exit code."""
    again = "go on with: " + shlex.join(
        ["python", "-m", "experiments.run", *(a for a in argv[1:] if a != "--resume"), "--resume"]
    )
    try:
        options = parse(argv)
        return 0 if options is None else run(options, again)
    except BrokenDown as error:
        complain(str(error))
        return 3
    except (ValueError, OSError) as error:
        complain(str(error))
        return 2
    except KeyboardInterrupt:  # before or after training; see `interrupt` for the time between
        complain(f"interrupted; {again}")
        return interrupt.EXIT_CODE


def run(options: Options, again: str) -> int:
    """Trains, records, draws, reports. Cheap checks come first, the folder is taken after all."""
    out, cap = options.driver.out, options.cap
    resume = options.driver.resume
    with (
        RunFolder(out, options.flags, resume=resume, runs=RUNS, may_change=MAY_CHANGE) as folder,
        compilation_cache(options.driver.compilation_cache),
    ):
        if folder.summary is not None:
            return report(folder, options, "is complete")
        experiment = prepare(options)
        for warning in folder.claim(provenance()):
            complain(warning)
        with RunProgress(options.driver.rounds, len(RUNS)) as progress:

            def last_words() -> None:
                with folder.writing:
                    progress.stop()
                    complain(f"interrupted; {again}")

            try:
                with interrupt.exit_at_once(last_words):
                    timing = train(experiment, folder, progress)
            except BrokenDown:
                draw(folder, options)
                raise
        draw(folder, options)
        folder.finish(summarise(folder.rows, cap, experiment.num_classes, timing))
        return report(folder, options, "holds")


def prepare(options: Options) -> Experiment:
    """Loads the data and traces the program, which finds what is wrong with them."""
    driver = options.driver
    dataset = dataset_of(driver.dataset, driver.data_dir)
    data = federated(dataset, options.federation)
    config = dataclasses.replace(options.config, image_shape=dataset.train_images.shape[1:])
    model = model_of(options, dataset)
    round_ = make_round(model, config)
    simulation: Any = simulate.make_simulation(round_, model, config, driver.rounds_per_chunk)
    root = keys.root(driver.seed)
    state = jax.eval_shape(round_.init, root)
    # Both runs are one program: FedAvg is a value of `hyper`, not another code path.
    program = simulation.lower(root, state, data, options.hyper, jnp.int32(0))
    return Experiment(options, round_, program, data, dataset.num_classes)


def train(experiment: Experiment, folder: RunFolder, progress: RunProgress) -> dict[str, float]:
    """Does whatever rounds of both runs are not done yet.

    Returns:
      Seconds of compilation, and of all that is neither compilation nor compiled programs:
      records, checkpoints, progress.
    """
    options, driver = experiment.options, experiment.options.driver
    root = keys.root(driver.seed)
    begin = time.perf_counter()
    program = experiment.program.compile()
    init = jax.jit(experiment.round.init).lower(root).compile()
    compiled = time.perf_counter()
    programs = 0.0
    for name in RUNS:
        hyper: Hyper = fedavg(options.hyper) if name == "fedavg" else options.hyper
        start_state = init(keys.stream(root, "init"))
        start_state = folder.restore(name, like=start_state) or start_state
        saved = int(start_state.round)
        progress.skip(saved)
        start = time.perf_counter()
        for state, rows in simulate.chunks(
            program, keys.stream(root, "rounds"), start_state, experiment.data, hyper, driver.rounds
        ):
            elapsed = time.perf_counter() - start
            programs += elapsed
            seconds = elapsed / len(rows)
            sound = [row["finite"] for row in rows]
            rows = rows if all(sound) else rows[: sound.index(False) + 1]
            rows = folder.append(name, rows, seconds)
            progress.update(rows)
            if not all(sound):
                raise BrokenDown(cause([row for row in folder.rows if row["run"] == name]))
            done = rows[-1]["round"]
            if done - saved >= driver.checkpoint_every or done == driver.rounds:
                folder.save(name, state, done)
                saved = done
            start = time.perf_counter()
    driver = time.perf_counter() - compiled - programs
    return {"compile_seconds": round(compiled - begin, 3), "driver_seconds": round(driver, 3)}


def cause(rows: Sequence[dict[str, Any]]) -> str:
    """One line on a run whose last round ended with NaN or infinite parameters."""
    last = rows[-1]
    line = f"run {last['run']}, round {last['round']}: the model is NaN or infinite; likely cause: "
    # FedAvg has survived the same rounds at the same learning rate.
    recent = [row for row in rows[-3:] if row["protected"]]
    if recent:
        worst = max(recent, key=lambda row: row["strength"])
        line += f"noise of strength {worst['strength']} in round {worst['round']} "
        line += "(see --strength_max, --cancellation), or "
    return f"{line}--learning_rate too large (--clip_norm helps); rounds so far are kept"


@contextlib.contextmanager
def compilation_cache(choice: str) -> Iterator[None]:
    """Keeps compiled programs over processes: in a folder, "auto" the user's cache, or "off"."""
    before = jax.config.values["jax_compilation_cache_dir"]  # the environment may have set it
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "noisefl" / "jax"
    path = {"off": None, "auto": before or str(cache)}.get(choice, choice)
    jax.config.update("jax_compilation_cache_dir", path)
    reset_cache()  # JAX looks at the setting only once
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        reset_cache()


def draw(folder: RunFolder, options: Options) -> None:
    """The picture of the rounds so far."""
    picture = folder.path / "figure1.png"
    figure1(folder.rows, options.cap, picture, options.config.noise_scale)


def report(folder: RunFolder, options: Options, what: str) -> int:
    """Prints the table of a complete folder."""
    console = Console(highlight=False)
    files = "config.json, metrics.jsonl, summary.json, figure1.png"
    console.print(table(folder.summary or {}, options.driver.seed, options.driver.out))
    console.print(f"{options.driver.out} {what}: {files}", soft_wrap=True)
    return 0


def complain(message: str) -> None:
    """One line on standard error, in one piece: other threads write there as well."""
    sys.stderr.write(f"experiments.run: {' '.join(message.split())}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
