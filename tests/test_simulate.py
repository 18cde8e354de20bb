"""`simulate`: many rounds are the single rounds, in order; metrics are what they say they are.

One tiny federation, three compiled programs: chunks of 5 rounds, of 1 round, and the bare step.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from noisefl import Config, Hyper, check_hyper, fedavg, keys, make_round, noise, simulate

ROUNDS = 5
CONFIG = Config(
    image_shape=(6, 6, 1),
    num_clients=6,
    client_fraction=0.67,
    batch_size=4,
    local_epochs=2,
    noise_scale="relative",
    local_test_size=20,
    eval_batch=8,
)
HYPER = check_hyper(
    Hyper(
        learning_rate=0.5, cap=0.55, strength=0.4, strength_step=0.4, strength_max=6.0, max_tries=9
    ),
    CONFIG,
)
KEY = keys.root(11)


@pytest.fixture(scope="module")
def parts(tiny_model):
    round_ = make_round(tiny_model, CONFIG)
    whole = simulate.make_simulation(round_, tiny_model, CONFIG, ROUNDS)
    single = simulate.make_simulation(round_, tiny_model, CONFIG, 1)
    return round_, whole, single, jax.jit(round_.init)


@pytest.fixture(scope="module")
def run(parts, tiny_data):
    """run(size of chunks, …) → (host copies of the states after each chunk, rows)."""
    _, whole, single, init = parts

    def go(simulation, state=None, rounds=ROUNDS, hyper=HYPER, key=KEY):
        start = init(keys.stream(KEY, "init")) if state is None else state
        states, rows = [], []
        for now, some in simulate.chunks(simulation, key, start, tiny_data, hyper, rounds):
            states.append(jax.tree.map(np.array, now))
            rows += some
        return states, rows

    return lambda size, *args, **kw: go({ROUNDS: whole, 1: single}[size], *args, **kw)


@pytest.fixture(scope="module")
def by_chunk(run):
    return run(ROUNDS)


@pytest.fixture(scope="module")
def by_round(run):
    return run(1)


def bitwise(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def same_rows(ours, theirs, tolerance):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance, nan_ok=True)


def test_a_chunk_is_its_rounds(by_chunk, by_round):
    """Two programs: XLA may order a sum otherwise, which is worth a few units in the last place."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        by_chunk[0][-1],
        by_round[0][-1],
    )
    same_rows(by_chunk[1], by_round[1], 1e-5)


def test_rounds_are_manual_steps(parts, by_round, tiny_model, tiny_data):
    """And the metrics are those of the models that the steps made, by NumPy's argmax."""
    round_, _, _, init = parts
    step = jax.jit(round_.step)
    forward = jax.jit(tiny_model.apply)
    state = init(keys.stream(KEY, "init"))

    def accuracy(params, split):
        images = np.asarray(getattr(tiny_data, f"{split}_images"), np.float32) / 255
        labels = np.asarray(getattr(tiny_data, f"{split}_labels"))
        guess = np.argmax(np.asarray(forward({"params": params}, images)), axis=1)
        return pytest.approx(np.mean(guess == labels), abs=1e-6)

    for t, row in enumerate(by_round[1], 1):
        base = state.base
        state, info = step(keys.stream(KEY, "round", t), state, tiny_data, HYPER)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            by_round[0][t - 1],
            state,
        )
        found = info.calibration
        xi = noise.scaled(base, found.draw, found.strength, CONFIG.noise_scale)
        plus, minus = noise.apply(base, xi, 1), noise.apply(base, xi, -1)
        assert row["round"] == t
        assert row["protected"] == (t > 1)
        assert row["owner_accuracy"] == accuracy(state.owner, "test")
        assert row["base_accuracy"] == accuracy(state.base, "test")
        assert row["plus_accuracy"] == accuracy(plus, "test")
        assert row["minus_accuracy"] == accuracy(minus, "test")
        assert row["owner_validation_accuracy"] == accuracy(state.owner, "validation")
        assert row["plus_validation_accuracy"] == accuracy(plus, "validation")
        assert row["minus_validation_accuracy"] == accuracy(minus, "validation")
        assert row["strength"] == pytest.approx(float(found.strength), rel=1e-6)
        assert row["relative_strength"] == pytest.approx(float(found.strength), rel=1e-5)
        assert row["calibration_tries"] == found.tries
        assert row["calibration_evaluations"] == 2 * found.tries
        assert row["calibration_samples"] == 2 * 21 * found.tries
        counts = np.asarray(tiny_data.counts)[np.asarray(info.clients)]
        assert row["training_samples"] == 2 * counts.sum()
        local = np.asarray(info.local_accuracy)
        assert row["local_accuracy_mean"] == pytest.approx(np.mean(local), abs=1e-6)
        assert row["local_accuracy_max"] == pytest.approx(np.max(local), abs=1e-6)
        assert (row["feasible"], row["shipped"], row["finite"]) == (
            bool(found.feasible),
            True,
            True,
        )


def test_the_run_is_worth_testing(by_round):
    """Noise on, more than one try, feasible and infeasible copies that differ."""
    rows = by_round[1]
    assert max(row["calibration_tries"] for row in rows) > 1
    assert len({row["strength"] for row in rows[1:]}) > 1
    assert any(row["plus_accuracy"] != row["minus_accuracy"] for row in rows)
    assert any(row["owner_accuracy"] != row["base_accuracy"] for row in rows)
    for row in rows[1:]:
        under = max(row["plus_validation_accuracy"], row["minus_validation_accuracy"]) <= 0.55
        assert row["feasible"] == under


def test_same_seed_same_bits(run, by_chunk):
    states, rows = run(ROUNDS)
    bitwise(states, by_chunk[0])
    assert rows == by_chunk[1]


def test_another_key_is_another_run(run, by_chunk):
    rows = run(ROUNDS, key=keys.root(12))[1]
    assert rows != by_chunk[1]


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_the_last_round_may_lie_inside_a_chunk(run, by_chunk, by_round, stop):
    states, rows = run(ROUNDS, rounds=stop)
    assert states[-1].round == stop
    assert rows == by_chunk[1][:stop]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        states[-1],
        by_round[0][stop - 1],
    )


def test_going_on_from_a_saved_state(run, by_chunk, by_round):
    for size, (whole, whole_rows) in ((1, by_round), (ROUNDS, by_chunk)):
        first, head = run(size, rounds=2)
        saved = jax.tree.map(jnp.asarray, first[-1])
        states, tail = run(size, saved)
        bitwise(states[-1], whole[-1])
        assert head + tail == whole_rows


def test_nothing_to_do(run, by_round):
    saved = jax.tree.map(jnp.asarray, by_round[0][2])
    assert run(1, saved, rounds=3) == ([], [])


def test_rows_past_the_end_are_zero(parts, tiny_data):
    _, whole, _, init = parts
    state, metrics = whole(KEY, init(KEY), tiny_data, HYPER, jnp.int32(2))
    assert state.round == 2
    assert metrics.round.tolist() == [1, 2, 0, 0, 0]
    assert all(not np.any(leaf[2:]) for leaf in jax.tree.leaves(metrics))


def test_the_state_is_donated(parts, tiny_data):
    _, _, single, init = parts
    state = init(KEY)
    single(KEY, state, tiny_data, HYPER, jnp.int32(9))
    with pytest.raises(RuntimeError, match=r"deleted|donated"):
        np.asarray(state.base["conv1"]["kernel"])


def test_new_numbers_compile_nothing(parts, run):
    _, whole, _, _ = parts
    run(ROUNDS)
    before = whole._cache_size()
    run(ROUNDS, hyper=Hyper(cap=0.4, strength=0.3, learning_rate=np.float64(0.1)), rounds=2)
    assert whole._cache_size() == before == 1


def test_fedavg_is_the_run_without_noise(run):
    for row in run(ROUNDS, hyper=fedavg(HYPER))[1]:
        assert not row["protected"]
        assert row["feasible"]
        assert row["owner_accuracy"] == row["base_accuracy"]
        assert row["plus_accuracy"] == row["minus_accuracy"]
        assert row["plus_validation_accuracy"] == row["minus_validation_accuracy"]
        spent = ("strength", "calibration_tries", "calibration_evaluations", "calibration_samples")
        assert [row[name] for name in spent] == [0, 0, 0, 0]


def test_rows_are_plain_and_short(by_chunk):
    for row in by_chunk[1]:
        assert {type(value) for value in row.values()} == {bool, int, float}
        assert json.loads(json.dumps(row)) == row
        for value in row.values():
            if isinstance(value, float):
                assert float(repr(np.float32(value)).split("(")[1][:-1]) == value
    assert by_chunk[1][1]["strength"] in [0.4, 0.8, 1.2, 1.6, 2.0, 2.4, 2.8, 3.2, 3.6]


def test_a_nan_and_a_decimal_survive(parts, tiny_data):
    _, whole, _, init = parts
    _, metrics = whole(KEY, init(KEY), tiny_data, HYPER, jnp.int32(0))
    metrics = dataclasses.replace(metrics, plus_accuracy=jnp.array([0.6, 0.1, jnp.nan, 1, 1 / 3]))
    found = [row["plus_accuracy"] for row in simulate.rows(metrics)]
    assert found == pytest.approx([0.6, 0.1, np.nan, 1.0, 0.33333334], rel=0, abs=0, nan_ok=True)


def test_no_tracer_leaks(parts, tiny_data):
    round_, _, _, init = parts
    with jax.checking_leaks():
        jax.make_jaxpr(round_.step)(KEY, init(KEY), tiny_data, HYPER)


def test_an_empty_chunk_is_refused(tiny_model):
    """It would never reach the last round."""
    round_ = make_round(tiny_model, CONFIG)
    with pytest.raises(ValueError, match="rounds_per_chunk=0: must be at least 1"):
        simulate.make_simulation(round_, tiny_model, CONFIG, 0)
