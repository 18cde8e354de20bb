"""The studies: their flags are the driver's, each reading is another run, and what they measure is
what closed forms say."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments.studies import early_noise
from noisefl.local import Own

CODE = """
import json, pathlib
from absl import flags
flags.FLAGS.mark_as_parsed()
from experiments.studies.readings import READINGS, command
from experiments.sweep.options import parse
lines = {name: ["run", *command(name, "0", pathlib.Path("out"))] for name in READINGS}
print(json.dumps({name: parse(line).setup({}).flags for name, line in lines.items()}))
"""


def test_each_reading_is_another_run():
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len({json.dumps(flags) for flags in found.values()}) == len(found)
    base = found["literal, geometric step"]
    for name, changed in {
        "literal": {"calibrator": "additive", "noise_scale": "absolute", "validation_size": 5000},
        "keep-best": {"owner": "keep_best+server_clients"},
        "next base = G": {"owner": "feeds_back+server_clients"},
        "4m server-side clients": {"server_clients": "4m"},
    }.items():
        assert changed.items() <= found[name].items()
        assert not changed.items() & base.items()


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
