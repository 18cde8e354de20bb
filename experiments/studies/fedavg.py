"""`python -m experiments.studies.fedavg`: rounds of plain FedAvg to a target accuracy on MNIST.

The published figures for McMahan's CNN, K = 100, C = 0.1, B = 10, IID, 99 % on test are 34 rounds
(E = 1) and 20 (E = 5), with η tuned for each (McMahan et al. 2017, table 2). Here η is the one with
the best validation accuracy after a few rounds, and its rounds on test are reported, seed by seed.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

import noisefl
from experiments.bench.command import checked
from experiments.command import end_with_flags
from noisefl import Experiment, Federation, State, models
from noisefl.local import SGD, Training

_OUT = flags.DEFINE_string("out", "results/fedavg", "folder of the results")
_MODEL = flags.DEFINE_enum("model", "mcmahan", list(models.MODELS), "model")
_EPOCHS = flags.DEFINE_integer("local_epochs", 1, "E", lower_bound=1)
_RATES = flags.DEFINE_list("learning_rates", ["0.1", "0.2"], "candidates for η")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "the first chooses η; all run with it")
_TARGET = flags.DEFINE_float("target", 0.99, "accuracy, a share of 1")
_TRIAL = flags.DEFINE_integer(
    "trial_rounds", 15, "rounds after which η is chosen on validation", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer("rounds", 60, "give up after so many", lower_bound=1)


def main(argv: list[str]) -> None:
    checked("studies.fedavg", argv, lambda: None)
    seeds = [int(seed) for seed in _SEEDS.value]
    runs = [run(seeds[0], float(rate), _TRIAL.value) for rate in _RATES.value]
    best = max(runs, key=lambda result: result["curve"][-1]["validation"])
    runs += [run(seed, best["learning_rate"], _ROUNDS.value) for seed in seeds]
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{_MODEL.value}_E{_EPOCHS.value}.json").write_text(json.dumps(runs, indent=1))
    for result in runs:
        print({name: value for name, value in result.items() if name != "curve"})


@jax.jit
def one_round(key: Any, state: State, data: Federation, experiment: Experiment) -> Any:
    """The state after a round, and the accuracies of G by split."""
    state, _ = noisefl.step(key, state, data, experiment)
    judges = {s: experiment.replace(accuracy_on=s).judge(data) for s in ("validation", "test")}
    return state, {split: judge.accuracy(state.owner) for split, judge in judges.items()}


def run(seed: int, rate: float, most: int) -> dict[str, Any]:
    """Runs until G is at the target on test, or for `most` rounds."""
    local = Training(SGD(learning_rate=rate), local_epochs=_EPOCHS.value)
    experiment = Experiment(models.by_name(_MODEL.value, 10), local=local)
    experiment = noisefl.fedavg(experiment).resolved()
    data, root = noisefl.federate(noisefl.load("mnist"), seed=seed), noisefl.keys.root(seed)
    state, curve, reached = noisefl.init(root, experiment, data), [], False
    start = time.perf_counter()
    while not reached and len(curve) < most:
        state, found = one_round(root, state, data, experiment)
        reached = bool(found["test"] >= jnp.float32(_TARGET.value))
        curve.append({split: float(str(accuracy)) for split, accuracy in found.items()})
        print(f"seed {seed} η {rate} round {len(curve)} {curve[-1]}", file=sys.stderr)
    return {
        "seed": seed,
        "local_epochs": _EPOCHS.value,
        "learning_rate": rate,
        "rounds_to_target": len(curve) if reached else None,
        "seconds_per_round": round((time.perf_counter() - start) / len(curve), 2),
        "curve": curve,
    }


if __name__ == "__main__":
    end_with_flags(main)
