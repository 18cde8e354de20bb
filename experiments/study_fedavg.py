"""`python -m experiments.study_fedavg`: rounds of plain FedAvg to a target accuracy on MNIST.

The published figures for McMahan's CNN, K = 100, C = 0.1, B = 10, IID, 99 % on test are 34 rounds
(E = 1) and 20 (E = 5), with η tuned for each (McMahan et al. 2017, table 2). Here η is the one with
the best validation accuracy after a few rounds, and its rounds on test are reported, seed by seed.
"""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from noisefl import (
    Config,
    Hyper,
    check_hyper,
    evaluate,
    fedavg,
    federate,
    keys,
    load,
    make_round,
    strategy,
)
from noisefl.models import by_name

_OUT = flags.DEFINE_string("out", "results/fedavg", "folder of the results")
_MODEL = flags.DEFINE_string("model", "mcmahan", "model")
_EPOCHS = flags.DEFINE_integer("local_epochs", 1, "E", lower_bound=1)
_RATES = flags.DEFINE_list("learning_rates", ["0.1", "0.2"], "candidates for η")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "the first chooses η; all run with it")
_TARGET = flags.DEFINE_float("target", 0.99, "accuracy, a share of 1")
_TRIAL = flags.DEFINE_integer(
    "trial_rounds", 15, "rounds after which η is chosen on validation", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer("rounds", 60, "give up after so many", lower_bound=1)


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    config = Config(local_epochs=_EPOCHS.value, local_test_size=1)
    model = by_name(_MODEL.value, 10)
    round_ = make_round(model, config)
    step = jax.jit(round_.step)
    accuracy = jax.jit(
        lambda params, images, labels: evaluate.accuracy(
            model.apply, params, images, labels, strategy.eval_batch(config)
        )
    )
    dataset = load("mnist")

    def run(seed: int, rate: float, rounds: int) -> dict:
        """Runs until G is at the target on test, or for `rounds`."""
        data = federate(dataset, num_clients=config.num_clients, seed=seed)
        hyper = fedavg(check_hyper(Hyper(learning_rate=rate), config))
        root, curve = keys.root(seed), []
        state = round_.init(keys.stream(root, "init"))
        start = time.perf_counter()
        reached = False
        while not reached and len(curve) < rounds:
            key = keys.stream(keys.stream(root, "rounds"), "round", state.round + 1)
            state, _ = step(key, state, data, hyper)
            validation = accuracy(state.owner, data.validation_images, data.validation_labels)
            test = accuracy(state.owner, data.test_images, data.test_labels)
            reached = bool(test >= jnp.float32(_TARGET.value))
            curve.append({"validation": float(str(validation)), "test": float(str(test))})
            print(f"seed {seed} η {rate} round {len(curve)} {curve[-1]}", file=sys.stderr)
        return {
            "seed": seed,
            "local_epochs": config.local_epochs,
            "learning_rate": rate,
            "rounds_to_target": len(curve) if reached else None,
            "seconds_per_round": round((time.perf_counter() - start) / len(curve), 2),
            "curve": curve,
        }

    seeds = [int(seed) for seed in _SEEDS.value]
    runs = [run(seeds[0], float(rate), _TRIAL.value) for rate in _RATES.value]
    best = max(runs, key=lambda result: result["curve"][-1]["validation"])
    runs += [run(seed, best["learning_rate"], _ROUNDS.value) for seed in seeds]
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{_MODEL.value}_E{config.local_epochs}.json").write_text(json.dumps(runs, indent=1))
    for result in runs:
        print({name: value for name, value in result.items() if name != "curve"})


if __name__ == "__main__":
    app.run(main)
