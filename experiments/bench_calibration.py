"""`python -m experiments.bench_calibration`: what each calibrator costs, and what it holds.

All calibrators set the noise of the same bases, saved from several rounds of real runs (IID and
non-IID, several seeds), with the same keys; each pair that ships is judged on 10,000 test images,
disjoint from the 10,000 of validation that calibrators see. Then whole runs with each calibrator on
paired seeds. `--quick` is a smaller version of all that.
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.progress import Progress

from experiments.calibration_figures import (
    CAP,
    against_source,
    strength_ratio,
    summary,
    table,
)
from experiments.calibration_judge import Judge, make_judge
from experiments.plot_calibration import picture
from noisefl import (
    Config,
    Hyper,
    calibrate,
    fedavg,
    federate,
    keys,
    load,
    make_round,
    noise,
    split,
)
from noisefl.config import CHOICES, as_arrays, nearest, refuse
from noisefl.data import FederatedData
from noisefl.models import MODELS, by_name
from noisefl.probing import make_probe

_QUICK = flags.DEFINE_bool("quick", False, "at most 3 minutes on two cores")
_CALIBRATORS = flags.DEFINE_list("calibrators", list(CHOICES["calibrator"]), "which, of all")
_MODEL = flags.DEFINE_enum("model", "lenet5", list(MODELS), "model")
_LAYERS = flags.DEFINE_string("noise_layers", "last", "as in experiments.run")
_SEEDS = flags.DEFINE_integer(
    "seeds", 0, "seeds of the bases and runs; 0: 1 quick, else 4", lower_bound=0
)
_REPEATS = flags.DEFINE_integer("repeats", 0, "keys a base; 0: 3 quick, else 7", lower_bound=0)
_ROUNDS = flags.DEFINE_integer("rounds", 0, "of whole runs; 0: 4 quick, else 15", lower_bound=0)
_LANES = flags.DEFINE_integer(
    "lanes", 32, "side by side under vmap, not with --quick; 0: none", lower_bound=0
)
_JSON = flags.DEFINE_string("json", None, "file for the results")
_PICTURE = flags.DEFINE_string("picture", "results/calibration.png", "file for the picture")

HYPER = Hyper(learning_rate=0.1, cap=CAP, strength=0.5, strength_factor=1.2, strength_max=50.0)
# The source starts without noise; the proxies' one number was set by hand, for this setting.
OWN = {"additive": {"strength": 0.0}, "unverified": {"strength": 4.0}, "snr": {"strength": 1.0}}
SCHEMES = ("iid", "shards")


class Base(NamedTuple):
    """A base as it was before a round of a real run, with that run's data."""

    params: Any
    data: FederatedData
    first: bool  # of its run: no strength has shipped before
    accuracy: float  # without noise, on test


def main(argv: list[str]) -> None:
    try:
        check(argv)
    except (ValueError, OSError) as error:
        sys.exit(f"experiments.bench_calibration: {error}")
    console = Console(highlight=False, width=max(Console().width, 110))
    seeds = _SEEDS.value or (1 if _QUICK.value else 4)
    repeats = _REPEATS.value or (3 if _QUICK.value else 7)
    judge = make_judge(by_name(_MODEL.value, 10), config("predictive"))
    bases, round_seconds = train_bases(seeds, judge)
    results = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("compiling", total=len(_CALIBRATORS.value))
        compiled = compile_all(_CALIBRATORS.value, bases[0])
        for name in _CALIBRATORS.value:
            progress.update(task, description=name)
            result = measure(name, compiled[name], bases, repeats, round_seconds, judge)
            result |= whole_runs(name, compiled[name], seeds, judge)
            results.append(result)
            progress.advance(task)
            if not console.is_terminal:
                print(
                    f"{len(results)}/{len(_CALIBRATORS.value)} {name}", file=sys.stderr, flush=True
                )
    against_source(results)
    title = f"{_MODEL.value}, noise on {_LAYERS.value}; {len(bases) * repeats} calibrations each"
    console.print(table(results, title))
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(results, indent=1) + "\n")
    picture(results, _PICTURE.value)
    console.print(f"picture: {_PICTURE.value}")


def check(argv: list[str]) -> None:
    """Raises one line about the first flag that is wrong."""
    if argv[1:]:
        raise ValueError(f"unexpected argument {argv[1]!r}: flags begin with --")
    for name in _CALIBRATORS.value:
        if name not in CHOICES["calibrator"]:
            raise refuse("calibrators", name, nearest(name, CHOICES["calibrator"]))
    if _ROUNDS.value == 1:
        raise refuse("rounds", 1, "must be 0 or at least 2: the first has no noise")
    if _JSON.value:
        Path(_JSON.value).touch()
    Path(_PICTURE.value).parent.mkdir(parents=True, exist_ok=True)
    noise.target(by_name(_MODEL.value, 10), config("predictive"))


def config(calibrator: str) -> Config:
    return Config(
        noise_layers=_LAYERS.value,
        noise_scale="relative",
        calibrator=calibrator,
        local_test_size=1,
    )


def hyper_of(calibrator: str) -> Hyper:
    return as_arrays(HYPER.replace(**OWN.get(calibrator, {})))  # pyright: ignore


def federation(scheme: str, seed: int) -> FederatedData:
    """Each scheme and seed has a validation split of its own."""
    seed += 1000 * SCHEMES.index(scheme)
    dataset = load("mnist")
    return federate(dataset, num_clients=100, scheme=scheme, seed=seed, validation_size=10_000)


def train_bases(seeds: int, judge: Judge) -> tuple[list[Base], float]:
    """Bases of protected runs, and the seconds of a round without any calibration."""
    saved = (3, 6) if _QUICK.value else (3, 6, 9, 12)
    model, options = by_name(_MODEL.value, 10), config("predictive")
    round_ = make_round(model, options)
    step, hyper = jax.jit(round_.step), hyper_of("predictive")
    bases, times = [], []
    for scheme in SCHEMES:
        for seed in range(seeds):
            data, root = federation(scheme, seed), keys.root(seed)
            state = round_.init(keys.stream(root, "init"))
            for t in range(1, max(saved) + 1):
                if t in saved:
                    accuracy = float(judge.owner(state.base, data))
                    bases.append(Base(state.base, data, t == saved[0], accuracy))
                state, _ = step(keys.stream(root, "round", t), state, data, hyper)
            for _ in range(3):
                begin = time.perf_counter()
                jax.block_until_ready(step(root, state, data, fedavg(hyper)))
                times.append(time.perf_counter() - begin)
    return bases, float(np.median(times))


class Compiled(NamedTuple):
    """One calibrator's programs."""

    init: Any  # () → its first carry
    rule: Any  # (key, base, data, carry) → (Calibration, carry), not compiled
    rule_compiled: Any
    step: Any  # a whole round


def compile_all(names: list[str], like: Base) -> dict[str, Compiled]:
    """Before anything is timed, and on all cores: one program's compilation keeps one busy."""

    def one(name: str) -> Compiled:
        model, options = by_name(_MODEL.value, 10), config(name)
        paths = noise.target(model, options)
        cut = split.at(model, paths, options.image_shape)
        calibrator, hyper = calibrate.from_config(options), hyper_of(name)

        def rule(key, base, data, carry):
            probe = make_probe(model, cut, base, paths, data, options)
            return calibrator.calibrate(key, base, probe, hyper, carry)

        round_, root = make_round(model, options), keys.root(0)
        lowered = jax.jit(rule).lower(root, like.params, like.data, calibrator.init())
        state = jax.eval_shape(round_.init, root)
        step = jax.jit(round_.step).lower(root, state, like.data, hyper)
        return Compiled(calibrator.init, rule, lowered.compile(), step.compile())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def measure(
    name: str,
    compiled: Compiled,
    bases: list[Base],
    repeats: int,
    round_seconds: float,
    judge: Judge,
) -> dict[str, Any]:
    """Calibrates every base `repeats` times; the carry goes along the rounds of a run."""
    rows, seconds = [], []
    for repeat in range(repeats):
        carry = compiled.init()
        for index, base in enumerate(bases):
            carry = compiled.init() if base.first else carry
            key = keys.stream(keys.stream(keys.root(repeat), "base", index), "calibration")
            begin = time.perf_counter()
            found, carry = jax.block_until_ready(
                compiled.rule_compiled(key, base.params, base.data, carry)
            )
            seconds.append(time.perf_counter() - begin)
            shipped = base.params, base.data, found.draw, found.strength
            rows.append(
                {
                    "tries": int(found.tries),
                    "samples": int(found.samples),
                    "feasible": bool(found.feasible),
                    "over": bool(np.max(judge.pair(*shipped)) > np.float32(CAP)),
                    "ratio": strength_ratio(np.asarray(judge.around(*shipped)), base.accuracy),
                }
            )
    return {
        **summary(name, rows),
        "wall_seconds": float(np.median(seconds)),
        "wall_seconds_mean": float(np.mean(seconds)),
        # The median is of usual calibrations; the mean has the few that read on as well.
        "wall_share": float(np.median(seconds) / (np.median(seconds) + round_seconds)),
        "wall_share_mean": float(np.mean(seconds) / (np.mean(seconds) + round_seconds)),
        "validation_splits": len({id(base.data) for base in bases}),
        **({} if _QUICK.value else lanes(compiled, bases[-1])),
    }


def lanes(compiled: Compiled, base: Base) -> dict[str, Any]:
    """Seconds a lane of one lane, and of many under vmap, which wait for the slowest."""
    if not _LANES.value:
        return {}
    seconds = {}
    for count in (1, _LANES.value):
        many = jax.random.split(keys.root(7), count)
        carries = jax.tree.map(lambda leaf, n=count: jnp.stack([leaf] * n), compiled.init())
        lanewise = jax.jit(jax.vmap(compiled.rule, in_axes=(0, None, None, 0)))
        arguments = (many, base.params, base.data, carries)
        jax.block_until_ready(lanewise(*arguments))
        begin = time.perf_counter()
        jax.block_until_ready(lanewise(*arguments))
        seconds[count] = (time.perf_counter() - begin) / count
    return {"seconds_a_lane": seconds}


def whole_runs(name: str, compiled: Compiled, seeds: int, judge: Judge) -> dict[str, Any]:
    """Whole IID runs with the calibrator: the owner at the end, rounds over the cap, seconds."""
    count = _ROUNDS.value or (4 if _QUICK.value else 15)
    model, options, hyper = by_name(_MODEL.value, 10), config(name), hyper_of(name)
    init = make_round(model, options).init
    owners, violations, seconds = [], 0, []
    for seed in range(seeds):
        data, root = federation("iid", seed), keys.root(seed)
        state = init(keys.stream(root, "init"))
        spent = 0.0
        for t in range(1, count + 1):
            begin = time.perf_counter()
            key = keys.stream(root, "round", t)
            new, info = jax.block_until_ready(compiled.step(key, state, data, hyper))
            spent += time.perf_counter() - begin
            if bool(info.protected):
                found = info.calibration
                pair = judge.pair(state.base, data, found.draw, found.strength)
                violations += bool(np.max(pair) > np.float32(CAP))
            state = new
        owners.append(float(judge.owner(state.owner, data)))
        seconds.append(spent)
    return {
        "run_rounds": count,
        "run_owner_accuracy": owners,
        "run_rounds_over_cap": violations / (seeds * (count - 1)),
        "run_seconds": float(np.mean(seconds)),
    }


if __name__ == "__main__":
    app.run(main)
