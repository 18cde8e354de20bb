"""`python -m experiments.study_fedavg`: rounds of plain FedAvg to a target accuracy on MNIST.

The published figures for McMahan's CNN, K = 100, C = 0.1, B = 10, IID, 99 % on test are 34 rounds
(E = 1) and 20 (E = 5), with η tuned for each (McMahan et al. 2017, table 2). Here η is the one that
first reaches the target on validation, and its rounds on test are reported, seed by seed.
"""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from noisefl import Config, Hyper, check_hyper, evaluate, fedavg, federate, keys, load, make_round
from noisefl.models import by_name

_OUT = flags.DEFINE_string("out", "results/fedavg", "folder of the results")
_MODEL = flags.DEFINE_string("model", "mcmahan", "model")
_EPOCHS = flags.DEFINE_integer("local_epochs", 1, "E", lower_bound=1)
_RATES = flags.DEFINE_list("learning_rates", ["0.1", "0.2"], "candidates for η")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "the first chooses η; all run with it")
_TARGET = flags.DEFINE_float("target", 0.99, "accuracy, a share of 1")
_ROUNDS = flags.DEFINE_integer("rounds", 60, "give up after so many")


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    config = Config(local_epochs=_EPOCHS.value, local_test_size=1)
    model = by_name(_MODEL.value, 10)
    round_ = make_round(model, config)
    step = jax.jit(round_.step)
    accuracy = jax.jit(
        lambda params, images, labels: evaluate.accuracy(
            model.apply, params, images, labels, config.eval_batch
        )
    )
    dataset = load("mnist")

    def reached(seed: int, rate: float) -> dict:
        """First rounds at which G is at the target on validation and on test, None if never."""
        data = federate(dataset, num_clients=config.num_clients, seed=seed)
        hyper = fedavg(check_hyper(Hyper(learning_rate=rate), config))
        root, first, curve = keys.root(seed), {}, []
        state = round_.init(keys.stream(root, "init"))
        start = time.perf_counter()
        for t in range(1, _ROUNDS.value + 1):
            key = keys.stream(keys.stream(root, "rounds"), "round", jnp.int32(t))
            state, _ = step(key, state, data, hyper)
            scores = {
                "validation": accuracy(state.owner, data.validation_images, data.validation_labels),
                "test": accuracy(state.owner, data.test_images, data.test_labels),
            }
            curve.append({split: round(float(score), 4) for split, score in scores.items()})
            for split, score in scores.items():
                if score >= jnp.float32(_TARGET.value):
                    first.setdefault(split, t)
            print(f"seed {seed} η {rate} round {t} {curve[-1]}", file=sys.stderr, flush=True)
            if len(first) == len(scores):
                break
        seconds = round((time.perf_counter() - start) / len(curve), 2)
        return {
            "seed": seed,
            "local_epochs": config.local_epochs,
            "learning_rate": rate,
            "rounds_validation": first.get("validation"),
            "rounds_test": first.get("test"),
            "seconds_per_round": seconds,
            "curve": curve,
        }

    seeds = [int(seed) for seed in _SEEDS.value]
    runs = [reached(seeds[0], float(rate)) for rate in _RATES.value]
    best = min(
        runs,
        key=lambda run: (run["rounds_validation"] or 10**9, -run["curve"][-1]["validation"]),
    )
    runs += [reached(seed, best["learning_rate"]) for seed in seeds[1:]]
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{_MODEL.value}_E{config.local_epochs}.json").write_text(json.dumps(runs, indent=1))
    for run in runs:
        print({name: value for name, value in run.items() if name != "curve"})


if __name__ == "__main__":
    app.run(main)
