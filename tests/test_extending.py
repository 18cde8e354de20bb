"""Every file that docs/extending.md shows runs as it stands there, and does what it says."""

import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import noisefl
from noisefl import calibrate, keys, simulate
from noisefl.parts import changed

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
FILES = {
    block.split("\n")[0].removeprefix("# "): block
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
}


class Tiny(nn.Module):
    """One dense layer, so that a program compiles in a second."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


def module(name: str) -> types.ModuleType:
    """The file as a module of its own."""
    found = types.ModuleType(name.removesuffix(".py"))
    found.__dict__["__name__"] = name.removesuffix(".py")
    exec(compile(FILES[name], name, "exec"), found.__dict__)
    return found


def rows(found: types.ModuleType, data, rounds: int = 3, model=None) -> list[dict]:
    experiment = found.experiment().replace(
        cohort=noisefl.Cohort(clients_per_round=4), model=model or Tiny()
    )
    if not hasattr(found, "Doubling"):  # what is not shown here need not be compiled
        still = calibrate.Unverified(strength=1.0)
        experiment = changed(experiment, noisefl.schemes.Calibrated, calibrator=still)
    measure = getattr(found, "MEASURE", noisefl.measure.Standard(local_test_size=10))
    run = simulate.run(keys.root(1), experiment, data, rounds=rounds, measure=measure)
    return [row for _, some in run for row in some]


def test_all_are_there():
    assert set(FILES) == {
        *("stretched.py", "patient.py", "doubling.py", "median.py", "fedadam.py", "signs.py"),
        *("distance.py", "erased.py", "mine.py"),
    }


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_at_most_forty_lines(name):
    assert len(FILES[name].splitlines()) <= 40


def test_stretched_has_a_copy_a_client_and_leaves_no_trace(tiny_data):
    found = module("stretched.py")
    experiment = found.experiment().replace(
        cohort=noisefl.Cohort(clients_per_round=4), model=Tiny()
    )
    # An untaught cap, one fixed strength: copies differ, and the updates do not know the noise.
    experiment = changed(experiment, found.Stretched, calibrator=calibrate.Unverified(strength=2.0))
    key = keys.root(3)
    state = noisefl.init(key, experiment, tiny_data)
    step = jax.jit(noisefl.step)
    before, _ = step(key, state, tiny_data, experiment)
    _, info = step(key, before, tiny_data, experiment)
    copies = [noisefl.received(experiment, before, info, slot) for slot in range(4)]
    kernels = [np.asarray(copy["head"]["kernel"]) for copy in copies]
    assert len({kernel.tobytes() for kernel in kernels}) == 4
    slot = noisefl.schemes.Slot(jnp.int32(2), jnp.int32(1), info.members.clients[2])
    update, mask = experiment.scheme.recover(copies[2], copies[2], before.base, info.issue, slot)
    assert mask is None
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(update))


def test_the_thief_and_the_measure_are_in_the_rows(tiny_data):
    for row in rows(module("patient.py"), tiny_data):
        assert 0 <= row["patient_accuracy_mean"] <= row["patient_accuracy_max"] <= 1
    measured = rows(module("distance.py"), tiny_data)
    assert measured[0]["owner_from_base"] == 0  # in warm-up G = W
    assert all(row["base_moved"] > 0 for row in measured)


def test_the_calibrator_doubles_and_its_bill_is_kept(tiny_data):
    for row in rows(module("doubling.py"), tiny_data)[1:]:
        tries = row["calibration_tries"]
        assert row["strength"] == 0.5 * 2 ** (tries - 1)
        assert row["calibration_evaluations"] == 2 * tries
        assert row["calibration_samples"] == 2 * tries * tiny_data.validation_labels.size
        assert row["feasible"] == (row["shared_validation_accuracy"] <= 0.6)


def test_the_median_is_numpys(tiny_data):
    median = module("median.py").Median()
    leaf = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    found = median.combine({"w": jnp.asarray(leaf)}, None, jnp.full(5, 0.2))
    np.testing.assert_allclose(found["w"], np.median(leaf, axis=0))
    assert all(row["finite"] for row in rows(module("median.py"), tiny_data, rounds=2))


def test_fedadams_first_step_is_its_rate(tiny_data):
    """m̂ / (√v̂ + ε) of the first step is the sign of the update, where that is far above ε."""
    found = module("fedadam.py").experiment().server
    update = {"w": jnp.asarray([0.5, -2.0, 4.0])}
    base, _ = found.step({"w": jnp.zeros(3)}, update, found.init({"w": jnp.zeros(3)}))
    np.testing.assert_allclose(base["w"], [0.01, -0.01, 0.01], rtol=3e-3)
    assert all(row["finite"] for row in rows(module("fedadam.py"), tiny_data, rounds=2))


def test_a_square_of_every_image_is_erased(tiny_data):
    found = module("erased.py")
    images = jnp.full((200, 6, 6, 1), 9, jnp.uint8)
    blank = np.asarray(found.Erased(edge=3).change(keys.root(1), images))[..., 0] == 0
    assert (blank.sum((1, 2)) == 9).all()
    corners = {tuple(np.argwhere(one)[0]) for one in blank}
    assert corners == {(row, column) for row in range(4) for column in range(4)}
    assert all(row["finite"] for row in rows(found, tiny_data, rounds=2))


def test_signs_have_variance_one(tiny_data):
    found = module("signs.py")
    drawn = np.asarray(found.Signs().sample(keys.root(0), (1000,)))
    assert set(drawn) == {-1.0, 1.0}
    assert abs(drawn.mean()) < 0.16  # five standard errors
    assert all(row["finite"] for row in rows(found, tiny_data, rounds=2))


def test_a_users_model_learns(tiny_data):
    found = module("mine.py")
    curve = rows(found, tiny_data, model=found.Mine(num_classes=3))
    assert all(row["finite"] for row in curve)
    assert "stem" in found.Mine(num_classes=3).init(keys.root(0), jnp.zeros((1, 6, 6, 1)))["params"]
