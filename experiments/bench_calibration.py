"""`python -m experiments.bench_calibration`: what each calibrator costs, and what it holds.

All calibrators set the noise of the same bases, saved from several rounds of real runs (IID and
non-IID, several seeds), with the same keys; each pair that ships is judged on 10,000 test images,
disjoint from the 10,000 of validation that calibrators see. Then whole runs with each calibrator on
paired seeds. Every rule has its default settings, which know no data set. `--quick` is a smaller
version of all that.

The scheme is the source's pair, or what `--driver` says: with `--driver='--preset=two_way
--coalition=5'` ten clients' own copies are judged, and what five of them are left with. A rule that
the scheme has already keeps the settings that it has there, but for the cap, which is 0.6. What
else those flags say (data, model, rounds, the owner's part) is not read.
"""

import functools
import importlib
import itertools
import os
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console

import noisefl
from experiments.bench import command, figures
from experiments.bench.figures import CAP, strength_ratio
from experiments.bench.judge import Judge, make_judge
from experiments.command import end_with_flags
from experiments.sweep import options
from noisefl import (
    Experiment,
    Federation,
    RoundInfo,
    State,
    calibrate,
    keys,
    models,
    noise,
    parts,
    schemes,
)
from noisefl.errors import nearest, refuse

_QUICK = flags.DEFINE_bool("quick", False, "at most 3 minutes on two cores")
_MODULES = flags.DEFINE_list("modules", [], "modules of calibrators of your own")
_CALIBRATORS = flags.DEFINE_list("calibrators", None, "which; all that there are if not given")
_MODEL = flags.DEFINE_enum("model", "lenet5", list(models.MODELS), "model")
_LAYERS = flags.DEFINE_string("noise_layers", "last", "of the pair, as in experiments.run")
_DRIVER = flags.DEFINE_string("driver", "", "flags of experiments.run that say another scheme")
_SEEDS = flags.DEFINE_integer("seeds", 0, "of bases and runs; 0: 1 quick, else 4", 0)
_REPEATS = flags.DEFINE_integer("repeats", 0, "keys a base; 0: 3 quick, else 7", 0)
_ROUNDS = flags.DEFINE_integer("rounds", 0, "of whole runs; 0: 4 quick, else 15", 0)
_LANES = flags.DEFINE_integer("lanes", 32, "side by side under vmap, not quick; 0: none", 0)
_JSON = flags.DEFINE_string("json", None, "file for the results")
_PICTURE = flags.DEFINE_string("picture", "results/calibration.png", "file for the picture")

SETTINGS = {"cap": CAP, "strength_max": 50.0}  # one σ_max for all that have one
PARTITIONS = ("iid", "shards")


class Base(NamedTuple):
    """A base as it was before a round of a real run, with that run's data."""

    params: Any
    data: Federation
    first: bool  # of its run: no strength has shipped before
    accuracy: float  # without noise, on test


class Compiled(NamedTuple):
    """One calibrator and its programs."""

    scheme: schemes.Calibrated
    experiment: Experiment
    function: Any  # (key, base, data, carry) → (secret, feasible, bill, carry), not compiled
    calibration: Any  # the same, compiled
    step: Any  # a whole round


def main(argv: list[str]) -> None:
    rules = command.checked("bench_calibration", argv, check, _JSON.value)
    seeds = _SEEDS.value or (1 if _QUICK.value else 4)
    repeats = _REPEATS.value or (3 if _QUICK.value else 7)
    scheme = scheme_of(calibrate.Predictive)
    usual = experiment_of(scheme)
    judge = make_judge(usual, scheme)
    bases, round_seconds = train_bases(usual, seeds, judge)
    results = []
    for name, compiled in compile_all(rules, bases[0]).items():
        result = measure(name, compiled, bases, repeats, round_seconds, judge)
        results.append(result | whole_runs(compiled, seeds, judge))
        print(f"{len(results)}/{len(rules)} {name}", file=sys.stderr, flush=True)
    figures.against_source(results)
    console = Console(highlight=False, width=max(Console().width, 110))
    what = _DRIVER.value or f"noise on {_LAYERS.value}"
    title = f"{_MODEL.value}, {what}; {len(bases) * repeats} calibrations each"
    console.print(command.table(title, list(map(figures.line, results))))
    command.write(_JSON.value, results)
    figures.picture(results, _PICTURE.value)
    console.print(f"picture: {_PICTURE.value}")


def check() -> dict[str, type]:
    """The calibrators of the flags by name; raises one line about the first flag that is wrong."""
    for module in _MODULES.value:
        importlib.import_module(module)
    known = {parts.name_of(cls): cls for cls in parts.implementations(calibrate.Calibrator)}
    for name in (chosen := _CALIBRATORS.value or list(known)):
        if name not in known:
            raise refuse("calibrators", name, nearest(name, list(known)))
    if _ROUNDS.value == 1:
        raise refuse("rounds", 1, "must be 0 or at least 2: the first has no noise")
    Path(_PICTURE.value).parent.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        scheme = scheme_of(known[name])
        scheme.touched(experiment_of(scheme).functions, (28, 28, 1))
    return {name: known[name] for name in chosen}


def scheme_of(rule: type) -> schemes.Calibrated:
    """The scheme with that calibrator: its defaults, but for SETTINGS."""
    own = {name: value for name, value in SETTINGS.items() if name in parts.specs(rule)}
    if not _DRIVER.value:
        on = noise.layers(_LAYERS.value, relative=True)
        return schemes.Noised(on=on, calibrator=rule(**own))
    scheme = driven(_DRIVER.value)
    there = scheme.calibrator
    return scheme.replace(calibrator=there.replace(**own) if type(there) is rule else rule(**own))


@functools.cache
def driven(text: str) -> schemes.Calibrated:
    """The scheme that these flags of experiments.run say, without what is around it."""
    asked = options.parse(["--driver", *shlex.split(text)])
    if asked is not None and asked.axes:
        raise refuse("driver", text, "must be flags of one run, without --grid")
    scheme: Any = asked and asked.setup({}).experiment.scheme
    while isinstance(scheme, schemes.Wrapper):
        scheme = scheme.inner
    if not isinstance(scheme, schemes.Calibrated):
        raise refuse("driver", text, "must be flags of a scheme that is calibrated")
    return scheme


def experiment_of(scheme: schemes.Calibrated) -> Experiment:
    return Experiment(models.by_name(_MODEL.value, 10), scheme=schemes.Warmup(scheme)).resolved()


def federation(partition: str, seed: int) -> Federation:
    """Each partition and seed has a validation split of its own."""
    seed += 1000 * PARTITIONS.index(partition)
    dataset = noisefl.load("mnist")
    return noisefl.federate(dataset, partition=partition, validation_size=10_000, seed=seed)


def rounds(
    step: Any, experiment: Experiment, data: Federation, seed: int, count: int
) -> Iterator[tuple[State, State, RoundInfo, float]]:
    """The first rounds of a run: state before, state after, what happened, seconds."""
    root = keys.root(seed)
    state = noisefl.init(root, experiment, data)
    for _ in range(count):
        begin = time.perf_counter()
        after, info = jax.block_until_ready(step(root, state, data, experiment))
        yield state, after, info, time.perf_counter() - begin
        state = after


def train_bases(experiment: Experiment, seeds: int, judge: Judge) -> tuple[list[Base], float]:
    """Bases of protected runs, and the seconds of a round without any calibration."""
    saved = (3, 6) if _QUICK.value else (3, 6, 9, 12)
    step, bases, times = jax.jit(noisefl.step), [], []
    for partition, seed in itertools.product(PARTITIONS, range(seeds)):
        data = federation(partition, seed)
        run = rounds(step, experiment, data, seed, max(saved))
        for t, (before, *_) in enumerate(run, 1):
            if t in saved:
                accuracy = float(judge.owner(before.base, data))
                bases.append(Base(before.base, data, t == saved[0], accuracy))
        bare = rounds(step, noisefl.fedavg(experiment), data, seed, 3)
        times += [seconds for *_, seconds in bare]
    return bases, float(np.median(times))


def compile_all(rules: dict[str, type], like: Base) -> dict[str, Compiled]:
    """Before anything is timed, and on all cores: one program's compilation keeps one busy."""
    root = keys.root(0)

    def one(cls: type) -> Compiled:
        scheme = scheme_of(cls)
        experiment = experiment_of(scheme)

        def calibration(key: Any, base: Any, data: Federation, carry: Any) -> Any:
            members, judge = experiment.cohort.draw(key, data.counts), experiment.judge(data)
            issue, carry = scheme.issue(key, jnp.int32(2), base, base, members, judge, carry)
            return issue.secret, issue.feasible, issue.bill, carry

        carry = scheme.init(root, like.params)
        lowered = jax.jit(calibration).lower(root, like.params, like.data, carry)
        state = jax.eval_shape(lambda key: noisefl.init(key, experiment, like.data), root)
        step = jax.jit(noisefl.step).lower(root, state, like.data, experiment)
        return Compiled(scheme, experiment, calibration, lowered.compile(), step.compile())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(rules, pool.map(one, rules.values()), strict=True))


def measure(
    name: str, compiled: Compiled, bases: list[Base], repeats: int, round_seconds: float,
    judge: Judge,
) -> dict[str, Any]:  # fmt: skip
    """Calibrates every base `repeats` times; the carry goes along the rounds of a run."""
    rows, seconds, carry = [], [], None
    for repeat in range(repeats):
        for index, base in enumerate(bases):
            key = keys.stream(keys.root(repeat), "base", index)
            if base.first:
                carry = compiled.scheme.init(keys.stream(key, "scheme"), base.params)
            begin = time.perf_counter()
            secret, feasible, bill, carry = jax.block_until_ready(
                compiled.calibration(key, base.params, base.data, carry)
            )
            seconds.append(time.perf_counter() - begin)
            shipped = base.params, base.data, secret.draw, secret.strength
            rows.append(
                {
                    "tries": int(bill.tries),
                    "samples": int(bill.samples),
                    "feasible": bool(feasible),
                    "over": bool(np.max(judge.copies(*shipped)) > np.float32(CAP)),
                    "ratio": strength_ratio(np.asarray(judge.around(*shipped)), base.accuracy),
                }
            )
    middle, mean = float(np.median(seconds)), float(np.mean(seconds))
    return {
        **figures.summary(name, compiled.scheme.calibrator.guarantee, rows),
        "wall_seconds": middle,
        "wall_seconds_mean": mean,
        # The median is of usual calibrations; the mean has the few that read on as well.
        "wall_share": middle / (middle + round_seconds),
        "wall_share_mean": mean / (mean + round_seconds),
        "validation_splits": len({id(base.data) for base in bases}),
        **({} if _QUICK.value or not _LANES.value else lanes(compiled, bases[-1])),
    }


def lanes(compiled: Compiled, base: Base) -> dict[str, Any]:
    """Seconds a lane of one lane, and of many under vmap, which wait for the slowest."""
    seconds, carry = {}, compiled.scheme.init(keys.root(7), base.params)
    for count in (1, _LANES.value):
        many = jax.random.split(keys.root(7), count)
        carries = jax.tree.map(lambda leaf, n=count: jnp.stack([leaf] * n), carry)
        lanewise = jax.jit(jax.vmap(compiled.function, in_axes=(0, None, None, 0)))
        arguments = (many, base.params, base.data, carries)
        jax.block_until_ready(lanewise(*arguments))
        begin = time.perf_counter()
        jax.block_until_ready(lanewise(*arguments))
        seconds[count] = (time.perf_counter() - begin) / count
    return {"seconds_a_lane": seconds}


def whole_runs(compiled: Compiled, seeds: int, judge: Judge) -> dict[str, Any]:
    """Whole IID runs with the calibrator: the owner at the end, rounds over the cap, seconds."""
    count = _ROUNDS.value or (4 if _QUICK.value else 15)
    owners, over, seconds = [], 0, []
    for seed in range(seeds):
        data, owner = federation("iid", seed), None
        seconds.append(0.0)
        for before, after, info, spent in rounds(
            compiled.step, compiled.experiment, data, seed, count
        ):
            seconds[-1] += spent
            owner = after.owner
            if info.issue.protected:
                secret = info.issue.secret
                copies = judge.copies(before.base, data, secret.draw, secret.strength)
                over += bool(np.max(copies) > np.float32(CAP))
        owners.append(float(judge.owner(owner, data)))
    return {
        "run_rounds": count,
        "run_owner_accuracy": owners,
        "run_rounds_over_cap": over / (seeds * (count - 1)),
        "run_seconds": float(np.mean(seconds)),
    }


if __name__ == "__main__":
    end_with_flags(main)
