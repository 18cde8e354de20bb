"""The cap in real rounds: `feasible` says what an accuracy of our own says of both copies."""

import dataclasses

import jax
import numpy as np
import pytest

from noisefl import Config, Hyper, check_hyper, keys, make_round, noise, simulate

BASE = Config(
    image_shape=(6, 6, 1),
    num_clients=6,
    client_fraction=0.67,
    batch_size=4,
    local_epochs=2,
    noise_scale="relative",
    local_test_size=20,
    eval_batch=8,
)
# Few tries and a small step, so that some rounds reach the cap and others do not.
HYPER = Hyper(learning_rate=0.5, cap=0.5, strength_step=1.0, max_tries=3)
CASES = {
    "additive": {},
    "geometric": {"calibrator": "geometric"},
    "rescale": {"redraw": "rescale"},
    "fixed": {"calibrator": "fixed"},
    "judged on test": {"accuracy_on": "test"},
    "skip": {"on_infeasible": "skip"},
}


@pytest.mark.parametrize("case", CASES)
def test_feasible_is_the_cap_on_the_judging_split(case, tiny_model, tiny_data):
    config = dataclasses.replace(BASE, **CASES[case])
    strength = 2.5 if case == "fixed" else 1.0
    hyper = check_hyper(dataclasses.replace(HYPER, strength=strength), config)
    round_ = make_round(tiny_model, config)
    simulation = simulate.make_simulation(round_, tiny_model, config, 1)
    step = jax.jit(round_.step)

    def accuracy(params, split):
        images = np.asarray(getattr(tiny_data, f"{split}_images"), np.float32) / 255
        labels = np.asarray(getattr(tiny_data, f"{split}_labels"))
        guess = np.argmax(np.asarray(tiny_model.apply({"params": params}, images)), axis=1)
        return float(np.mean(guess == labels))

    seen = set()
    for seed in range(3):
        root = keys.root(seed)
        state = round_.init(root)
        held = jax.tree.map(np.array, state)
        for now, (row,) in simulate.chunks(simulation, root, state, tiny_data, hyper, 6):
            before, held = held, jax.tree.map(np.array, now)
            if not row["protected"]:
                continue
            key = keys.stream(root, "round", row["round"])
            _, info = step(key, jax.device_put(before), tiny_data, hyper)
            draw, strength = info.calibration.draw, info.calibration.strength
            xi = noise.scaled(before.base, draw, strength, config.noise_scale)
            copies = noise.apply(before.base, xi, 1), noise.apply(before.base, xi, -1)
            on = {split: [accuracy(c, split) for c in copies] for split in ("test", "validation")}
            for split, infix in (("test", ""), ("validation", "_validation")):
                shown = [row[f"{sign}{infix}_accuracy"] for sign in ("plus", "minus")]
                assert shown == pytest.approx(on[split], abs=1e-6)
            assert row["feasible"] == (max(on[config.accuracy_on]) <= 0.5)
            assert row["shipped"] == (row["feasible"] or config.on_infeasible == "ship")
            unchanged = jax.tree.all(jax.tree.map(np.array_equal, before.base, held.base))
            assert unchanged == (not row["shipped"])
            assert np.isnan(row["local_accuracy_mean"]) == (not row["shipped"])
            seen.add(row["feasible"])
    assert seen == {True, False}
