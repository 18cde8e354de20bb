"""The studies: their sweeps as they are planned, their tables from folders made by hand, and what
they measure against closed forms."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import small_runs
from jax.flatten_util import ravel_pytree

from experiments.studies import early_noise, readings, silos
from experiments.sweep.plan import plan
from noisefl.local import Own


def test_the_fraction_is_balanced_and_every_reading_another_run():
    chosen = readings.fraction()
    assert chosen == readings.fraction()
    assert len({json.dumps(one) for one in chosen}) == len(chosen) == 180
    assert math.prod(map(len, readings.READINGS.values())) == 1440
    for layer in readings.COMPILED["noise_layers"]:
        of = [one for one in chosen if one["noise_layers"] == layer]
        for flag, answers in readings.READINGS.items():
            if flag != "noise_layers":
                each = [sum(one[flag] == answer for one in of) for answer in answers]
                assert each == [len(of) // len(answers)] * len(answers)
    command = readings.planned("screen", chosen, Path("out"), [])
    assert command is not None
    found = command.setups()
    assert len({json.dumps(setup.flags, sort_keys=True) for _, setup in found}) == 180
    assert {setup.driver.seed for _, setup in found} == {100}  # of none that is settled
    flags = next(setup.flags for values, setup in found if values["owner"].startswith("feeds"))
    assert (flags["calibrator"], flags["warmup_rounds"]) == ("predictive", 1)


FEDAVG = "runs/f/seed=100"


def screening(folder: Path) -> None:
    """All readings with noise on the first and the last layer; the gap is of the rate alone."""
    runs = {}
    for number, reading in enumerate(readings.fraction()):
        first = reading["noise_layers"] == "first"
        if reading["noise_layers"] not in ("first", "last"):
            continue
        path = f"runs/{number}/seed=100"
        grid = {
            **reading,
            "learning_rate": float(reading["learning_rate"]),
            "damping": float(reading["damping"]),
            "local_epochs": int(reading["local_epochs"]),
        }
        runs[path] = {"run": "noise", "seed": 100, "grid": grid, "baseline": FEDAVG}
        broke = first and reading["damping"] == "0"
        (folder / path).mkdir(parents=True)
        (folder / path / "summary.json").write_text(json.dumps({
            "failed": {"round": 3} if broke else None,
            "owner_accuracy_final": 0.9 * (1 - float(reading["learning_rate"])),
            "protected_rounds": 9,
            "rounds_over_cap_test": int(reading["local_epochs"] == "5"), "infeasible_rounds": 0,
            "shared_accuracy_max_test": 0.6,
        }))  # fmt: skip
    runs[FEDAVG] = {"run": "fedavg", "seed": 100, "grid": {}, "baseline": None}
    (folder / FEDAVG).mkdir(parents=True)
    (folder / FEDAVG / "summary.json").write_text('{"owner_accuracy_final": 0.9}')
    (folder / "sweep.json").write_text(json.dumps({"runs": runs}))


def test_what_the_screening_says(tmp_path):
    screening(tmp_path / "screen")
    table = readings.effects(readings.results(tmp_path / "screen"))
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    rows = {(flag, answer): rest for flag, answer, *rest in cells}
    assert rows["noise_layers", "first"][:3] == ["36", "50%", "2.7"]
    assert rows["noise_layers", "last"] == ["36", "0%", "2.7", "50%", "12"]
    assert rows["damping", "0"][1] == "50%"
    assert rows["learning_rate", "0.1"][2:] == ["9.0", "38%", "0"]
    assert rows["local_epochs", "5"][3:] == ["0%", "0"]
    kept = readings.screened(tmp_path)
    assert [one["noise_layers"] for one in kept] == ["first", "first", "last", "last"]
    assert all((one["learning_rate"], one["local_epochs"]) == ("0.01", "1") for one in kept)
    assert all(one["damping"] == "0.5" for one in kept[:2])
    command = readings.planned("settle", kept, tmp_path / "settle", [])
    assert command is not None
    assert len(command.setups()) == 4 * 5


def test_what_the_settled_readings_say(tmp_path, monkeypatch):
    """Two readings; of the second one seed broke down, and the cap was exceeded in a round."""
    good, bad = readings.fraction()[0], readings.fraction()[60]
    command = readings.planned("settle", [good, bad], tmp_path, [])
    assert command is not None
    runs = {}
    for one in plan(command):
        runs[one.path] = one.entry
        is_bad = one.grid.get("noise_layers") == bad["noise_layers"]
        (tmp_path / one.path).mkdir(parents=True)
        accuracy = 0.98 if one.kind == "fedavg" else 0.97 + one.seed / 1000
        (tmp_path / one.path / "summary.json").write_text(json.dumps({
            "failed": {"round": 3} if is_bad and one.seed == 2 else None,
            "owner_accuracy_final": accuracy,
            "protected_rounds": 29, "rounds_over_cap_test": int(is_bad and one.seed == 1),
            "infeasible_rounds": 0, "shared_accuracy_max_test": 0.61 if is_bad else 0.59,
        }))  # fmt: skip
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))
    labels = [" · ".join(one.values()) for one in (good, bad)]
    best = [("V1", 1, "ridge", 0.95, 0.8), ("V3", 2, "average_then_tune", 0.97, math.nan)]
    columns = ["view", "members", "thief", "thief_accuracy", "lambda"]
    frame = pd.DataFrame([(labels[0], *row) for row in best], columns=["scheme", *columns])
    monkeypatch.setattr(
        readings.reported,
        "rows",
        lambda folder, curves, names: [{"strength": names[name]} for name, _ in curves.values()],
    )
    monkeypatch.setattr(readings.reported, "best_thieves", lambda stolen: frame)
    _, _, *lines = readings.settled(tmp_path, command).splitlines()
    assert lines == [
        f"| {labels[0]} | 97.2 ± 0.2 | 98.0 ± 0.0 | 0 of 5 | 0 of 145 (0.590) | 0 | yes | "
        "95.0 (ridge), 0.80 | 97.0 (average then tune), – |",
        f"| {labels[1]} | 97.2 ± 0.2 | 98.0 ± 0.0 | 1 of 5 | 1 of 145 (0.610) | 0 | no | – | – |",
    ]


def test_the_readings_refuse_in_one_line(tmp_path, capsys):
    says = {
        "--phase=third": "phase", "--phase=settle": "holds no complete sweep",
        "--grid=seed=0:2": "a grid of its own", "--capp=0.5": "capp",
    }  # fmt: skip
    for flag, words in says.items():
        assert readings.main(["readings", f"--out={tmp_path}", flag]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert words in line


def test_cosines_of_the_same_group_and_of_the_other():
    angles = np.radians([0, 60, 90, 180])
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    groups = np.array([0, 0, 1, 1])
    same, other = early_noise.cosines(directions, groups)
    assert same == pytest.approx((math.cos(math.pi / 3) + 0) / 2, abs=1e-6)
    cosine = math.cos(math.radians(30))
    assert other == pytest.approx((0 - 1 + cosine - 0.5) / 4, abs=1e-6)
    directions[1] = np.nan  # its model broke
    same, other = early_noise.cosines(directions, groups)
    assert (same, other) == pytest.approx((0, -0.5), abs=1e-6)
    assert all(map(math.isnan, early_noise.cosines(directions[1:2], groups[1:2])))


def test_the_sharpness_is_the_largest_eigenvalue_of_the_hessian():
    """Of a linear model with cross-entropy, whose Hessian is written out."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 2, 2, 1), np.uint8), rng.integers(0, 3, 40)
    params = {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}

    def apply(params, x):
        return x.reshape(len(x), -1) @ params["kernel"]

    own = Own(jnp.asarray(images), jnp.asarray(labels), jnp.arange(30), jnp.int32(30))
    x = images[:30].reshape(30, 4) / 255
    logits = x @ np.asarray(params["kernel"], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    wanted = np.zeros((12, 12))
    for row, q in zip(x, p, strict=True):
        wanted += np.kron(np.outer(row, row), np.diag(q) - np.outer(q, q)) / 30
    assert ravel_pytree(params)[0].size == len(wanted)
    largest = np.linalg.eigvalsh(wanted)[-1]
    experiment: Any = SimpleNamespace(functions=SimpleNamespace(apply=apply))
    found = early_noise.sharpness(jax.random.key(0), experiment, params, own)
    assert 0.98 * largest < found <= largest * (1 + 1e-5)


def test_a_line_of_early_noise():
    """A run ends where W is no longer finite: of one broken client it is not."""
    row = {"same_group": 0.4, "other_group": 0.1, "rate_sharpness": 2.0, "broken": 0.0, "r": 1.0}
    rows = [
        {**row, "seed": 0, "owner": 0.5}, {**row, "seed": 0, "owner": 0.9},
        {**row, "seed": 1, "owner": None, "broken": 0.1, "rate_sharpness": None, "r": 4.0},
    ]  # fmt: skip
    found = list(early_noise.line("conv1", rows).values())
    assert found == ["conv1", "2.0", "0.40", "0.10", "2.0", "0.03", "1 of 2", "0.900"]


def test_the_silos_network_is_the_published_one():
    """44,426 parameters; their optimizer against the loop that PyTorch documents for SGD."""
    made = silos.fedavg()
    params = silos.SimpleCNN().init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(params))
    assert sizes == [6, 10, 16, 84, 120, 150, 840, 2400, 84 * 120, 120 * 256]
    assert sum(sizes) == 44_426
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    for leaf in kernels:
        fan_in = leaf.size // leaf.shape[-1]
        assert float(jnp.max(jnp.abs(leaf))) == pytest.approx(fan_in**-0.5, rel=0.05)

    optimizer: Any = made.local.optimizer
    assert optimizer.numbers == {"learning_rate": 0.01, "momentum": 0.9, "decay": 1e-5}
    step: Any = optimizer.factory(0.01, 0.9, 0.1)
    gradients = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    point, speed = np.array([1.0, -2.0, 30.0]), np.zeros(3)
    found: Any = jnp.asarray(point)
    state = step.init(found)
    for gradient in gradients:
        speed = 0.9 * speed + gradient + 0.1 * point
        point = point - 0.01 * speed
        update, state = step.update(jnp.asarray(gradient), state, found)
        found = optax.apply_updates(found, update)
    np.testing.assert_allclose(found, point, rtol=1e-6)


def test_the_silos_are_a_preset_that_trains_all_of_them_without_noise(tmp_path):
    rng = np.random.default_rng(0)
    split = (rng.integers(0, 256, (60, 28, 28), np.uint8), rng.integers(0, 10, 60))
    x_train, y_train = split
    file = tmp_path / "small.npz"
    np.savez(file, x_train=x_train, y_train=y_train, x_test=x_train[:20], y_test=y_train[:20])
    done = small_runs.main(
        "--preset=experiments.studies.silos:fedavg", f"--dataset={file}", "--num_clients=10",
        "--validation_size=10", "--rounds=1", "--nobaseline", "--thieves=none", "--local_epochs=3",
        "--local_test_size=1", f"--out={tmp_path / 'out'}",
    )  # fmt: skip
    assert done == 0
    [file] = (tmp_path / "out").rglob("metrics.jsonl")
    [row] = map(json.loads, file.read_text().splitlines())
    assert row["training_samples"] == 50 * 3
    assert row["protected"] is False
    assert row["owner_accuracy"] == row["base_accuracy"]


@pytest.mark.slow
def test_two_readings_from_the_screening_to_the_table(tmp_path, tmp_path_factory, monkeypatch):
    """On small images, with two seeds: the rows of both tables, and once more without a run."""
    of_last = [one for one in readings.fraction() if one["noise_layers"] == "last"]
    monkeypatch.setattr(readings, "fraction", lambda: of_last[:2])
    monkeypatch.setitem(readings.PHASES["settle"], "seeds", [0, 1])
    calls = small_runs.remember_programs(monkeypatch)
    small = ("--dataset", "--model", "--clients_per_round", "--num_clients", "--validation_size")
    flags = [f for f in small_runs.flags(tmp_path_factory) if f.startswith((*small, "--compil"))]
    flags += ["--rounds=3", f"--out={tmp_path}"]
    assert readings.main(["readings", *flags]) == 0
    assert "| noise_layers | last | 2 |" in (tmp_path / "screen.md").read_text()
    counts = [len(calls)]
    for _ in range(2):
        assert readings.main(["readings", "--phase=settle", *flags]) == 0
        counts.append(len(calls))
    assert counts[0] < counts[1] == counts[2]
    _, _, *rows = (tmp_path / "settle.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows] == [
        f"| {' · '.join(one.values())}" for one in readings.screened(tmp_path)
    ]
    assert all(f"of {2 * 2} (" in row for row in rows)  # protected rounds of two seeds
    assert all("), " in row.split(" | ")[7] for row in rows)  # a thief of one copy


@pytest.mark.slow
def test_one_row_of_early_noise(tmp_path):
    """Noise on the first convolution: the loss is far too sharp, and no client is left."""
    command = [sys.executable, "-m", "experiments.studies.early_noise", f"--out={tmp_path}"]
    done = subprocess.run(
        [*command, "--layers=conv1", "--seeds=1", "--rounds=1"],
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [row] = json.loads((tmp_path / "early_noise.json").read_text())
    assert row["rate_sharpness"] is None or row["rate_sharpness"] > 2
    assert row["r"] > 1
    assert "conv1" in done.stdout
