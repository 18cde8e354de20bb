"""`simulate`: many rounds are the single rounds, in order; rows are what they say they are.

One tiny federation, three compiled programs: chunks of 5 rounds, of 1 round, and the bare step.
"""

import functools
import json
from typing import ClassVar

import example_parts as examples
import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_nets as nets

import noisefl
from noisefl import calibrate, keys, schemes, simulate
from noisefl.local import SGD
from noisefl.measure import Measure, Standard
from noisefl.parts import changed, part

ROUNDS, CAP, KEY = 5, 0.6, keys.root(1)
DATA = fed.federation()
EXPERIMENT = fed.experiment(
    scheme=schemes.SkipInfeasible(fed.TINY.scheme), noise_scale="relative", cap=CAP,
    strength=1.0, strength_step=1.0, max_tries=5, local_epochs=2,
).resolved()  # fmt: skip


@part
class Counting(Measure):
    """Remembers how many rounds it saw; meets every client of a round."""

    abstract: ClassVar[bool] = True

    def init(self, key, experiment, data, state):
        return jnp.int32(0)

    def observe(self, experiment, data, round, key, copy, returned, own):
        return own.count, round

    def update(self, experiment, before, after, info, observed, data, carry):
        counts, rounds = observed
        met = jnp.all(counts == info.members.counts) & jnp.all(rounds == after.round)
        return {"seen": carry + 1, "met": met}, carry + 1


KEPT = Standard(local_test_size=20, every=2, more=(Counting(), examples.Distance()))


@pytest.fixture(scope="module")
def chunks():
    """`simulate.chunk_of_rounds`, so that `simulate.run` compiles each size once."""
    made = functools.cache(simulate.chunk_of_rounds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "chunk_of_rounds", made)
        yield made


def begin():
    state = simulate.begin(KEY, EXPERIMENT, DATA, KEPT)
    base = jax.tree.map(jnp.float32, fed.trained())
    state = fed.replaced(state, base=base, owner=jax.tree.map(jnp.copy, base))
    return fed.replaced(state, measured=KEPT.init(KEY, EXPERIMENT.resolved(), DATA, state))


@pytest.fixture(scope="module")
def run(chunks):
    """run(size of chunks, …) → (host copies of the states after each chunk, rows)."""

    def go(size, state=None, rounds=ROUNDS, experiment=EXPERIMENT, key=KEY):
        states, rows = [], []
        state = begin() if state is None else state
        for now, some in simulate.run(
            key, experiment, DATA, rounds=rounds, measure=KEPT, rounds_per_chunk=size, state=state
        ):
            states.append(jax.tree.map(np.array, now))
            rows += some
        return states, rows

    return go


@pytest.fixture(scope="module")
def by_chunk(run):
    return run(ROUNDS)


@pytest.fixture(scope="module")
def by_round(run):
    return run(1)


def same_rows(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5, nan_ok=True)


def test_a_chunk_is_its_rounds(by_chunk, by_round):
    """Two programs: XLA may order a sum otherwise, which is worth a few units in the last place."""
    fed.assert_same(by_chunk[0][-1], by_round[0][-1], **fed.CLOSE)
    same_rows(by_chunk[1], by_round[1])


def test_rounds_are_manual_steps(by_round):
    """And the rows are those of the models that the steps made, by the reference's forward pass."""
    state = fed.replaced(begin(), measured=())
    for t, row in enumerate(by_round[1], 1):
        before = state
        state, info = fed.step(KEY, state, DATA, EXPERIMENT)
        fed.assert_same(fed.replaced(by_round[0][t - 1], measured=()), state, **fed.CLOSE)
        copies, returned = info.observed
        models = {
            **{"owner": state.owner, "base": state.base},
            **{"plus": fed.lane(copies, 0), "minus": fed.lane(copies, -1)},
        }
        for split in ("test", "validation"):
            judged = getattr(DATA, f"{split}_images"), getattr(DATA, f"{split}_labels")
            judged = tuple(map(np.asarray, judged))
            of = {n: nets.accuracy(fed.NET, nets.as_float64(m), *judged) for n, m in models.items()}
            of["shared"] = max(of["plus"], of["minus"])
            if split == "test":
                found = {name: row[f"{name}_accuracy"] for name in of}
            else:
                del of["base"]
                found = {name: row[f"{name}_validation_accuracy"] for name in of}
                asked = not info.issue.protected  # of copies that no calibrator has looked at
                if t % 2:
                    of |= {n: np.nan for n in of if n == "owner" or asked}
            assert found == pytest.approx(of, abs=1e-6, nan_ok=True)
        issue, images = info.issue, slice(20)
        test = np.asarray(DATA.test_images)[images], np.asarray(DATA.test_labels)[images]
        local = [
            nets.accuracy(fed.NET, nets.as_float64(fed.lane(returned, slot)), *test)
            for slot in range(4)
        ]
        if t % 2 or not issue.shipped:
            local = [np.nan]
        assert row["local_accuracy_mean"] == pytest.approx(np.mean(local), abs=1e-6, nan_ok=True)
        assert row["local_accuracy_max"] == pytest.approx(np.max(local), abs=1e-6, nan_ok=True)
        tries = int(issue.bill.tries)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.base))
        exact = {
            "round": t, "protected": t > 1, "calibration_tries": tries,
            "calibration_evaluations": 2 * tries, "finite": True, "seen": t, "met": True,
            "calibration_samples": 2 * fed.VALIDATION * tries,
            "copy_bytes": 4 * parameters * issue.shipped.item(),
            "training_samples": 2 * int(info.members.counts.sum()) * bool(issue.shipped),
            "feasible": bool(issue.feasible), "shipped": bool(issue.shipped),
        }  # fmt: skip
        assert exact.items() <= row.items()
        assert row["strength"] == pytest.approx(float(issue.strength), rel=1e-6)
        assert row["relative_strength"] == pytest.approx(float(issue.strength), rel=1e-5)
        # The cap, on the split on which it is judged; and what a skipped round changes.
        if t > 1:
            assert row["feasible"] == (row["shared_validation_accuracy"] <= CAP)
        assert row["shipped"] == row["feasible"]
        if not row["shipped"]:
            fed.assert_same((state.base, state.owner), (before.base, before.owner))
        assert (row["base_moved"] > 0) == row["shipped"]


def test_the_run_is_worth_testing(by_round):
    """Noise on, more than one try, feasible and infeasible copies that differ."""
    rows = by_round[1]
    assert max(row["calibration_tries"] for row in rows) > 1
    assert len({row["strength"] for row in rows[1:]}) > 1
    assert any(row["plus_accuracy"] != row["minus_accuracy"] for row in rows)
    assert any(row["owner_accuracy"] != row["base_accuracy"] for row in rows)
    assert {row["feasible"] for row in rows[1::2]} == {True, False}  # measured, and not shipped


def test_the_same_key_is_the_same_bits_and_another_another_run(run, by_chunk):
    states, rows = run(ROUNDS)
    fed.assert_same(states, by_chunk[0])
    assert repr(rows) == repr(by_chunk[1])
    assert run(ROUNDS, key=keys.root(12))[1] != by_chunk[1]


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_the_last_round_may_lie_inside_a_chunk(run, by_chunk, by_round, stop):
    states, rows = run(ROUNDS, rounds=stop)
    assert states[-1].round == stop
    assert repr(rows) == repr(by_chunk[1][:stop])
    fed.assert_same(states[-1], by_round[0][stop - 1], **fed.CLOSE)


@pytest.mark.parametrize("size", [1, ROUNDS])
def test_going_on_from_a_saved_state(run, by_chunk, by_round, size):
    whole, whole_rows = by_round if size == 1 else by_chunk
    first, head = run(size, rounds=2)
    saved = jax.tree.map(jnp.asarray, first[-1])
    states, tail = run(size, saved)
    fed.assert_same(states[-1], whole[-1])
    assert repr(head + tail) == repr(whole_rows)
    assert run(1, jax.tree.map(jnp.asarray, states[-1]), rounds=ROUNDS) == ([], [])


def test_rows_past_the_end_are_zero_and_a_run_begins_by_itself(chunks):
    simulation = jax.jit(chunks(ROUNDS, KEPT), donate_argnums=1)
    state, numbers = simulation(KEY, begin(), DATA, EXPERIMENT, jnp.int32(2))
    assert state.round == 2
    assert numbers["round"].tolist() == [1, 2, 0, 0, 0]
    assert all(not np.any(leaf[2:]) for leaf in numbers.values())
    given = {"measure": KEPT, "rounds_per_chunk": ROUNDS}
    [(ours, _)] = simulate.run(KEY, EXPERIMENT, DATA, rounds=1, **given)
    first, _ = fed.step(KEY, noisefl.init(KEY, EXPERIMENT, DATA), DATA, EXPERIMENT)
    fed.assert_same(fed.replaced(ours, measured=()), first, **fed.CLOSE)


def test_the_state_is_donated_and_new_numbers_compile_nothing(chunks):
    program = jax.jit(chunks(ROUNDS, KEPT), donate_argnums=1)
    state = begin()
    given = (DATA, EXPERIMENT, jnp.int32(9))
    after, _ = program(KEY, state, *given)
    with pytest.raises(RuntimeError, match=r"deleted|donated"):
        np.asarray(state.base["stem"]["kernel"])
    before = program._cache_size()  # pyright: ignore
    other = changed(EXPERIMENT, calibrate.Additive, cap=0.4, strength=np.float64(0.3))
    other = changed(noisefl.fedavg(other), SGD, learning_rate=1)
    program(keys.root(4), after, fed.federation(seed=4), other, jnp.int32(7))
    assert program._cache_size() == before == 1  # pyright: ignore


def test_fedavg_is_the_run_without_noise(run):
    for row in run(ROUNDS, experiment=noisefl.fedavg(EXPERIMENT))[1]:
        assert (row["protected"], row["feasible"], row["shipped"]) == (False, True, True)
        assert row["owner_accuracy"] == row["base_accuracy"]
        assert row["plus_accuracy"] == row["minus_accuracy"] == row["shared_accuracy"]
        spent = ("strength", "calibration_tries", "calibration_evaluations", "calibration_samples")
        assert [row[name] for name in spent] == [0, 0, 0, 0]


def test_rows_are_plain_and_short(by_chunk):
    for row in by_chunk[1]:
        assert {type(value) for value in row.values()} == {bool, int, float}
        assert list(row) == ["round", *sorted(set(row) - {"round"})]
        assert repr(json.loads(json.dumps(row))) == repr(row)
        for value in row.values():
            if isinstance(value, float):
                assert repr(np.float32(value)) in (f"np.float32({value!r})", "np.float32(nan)")
    assert by_chunk[1][1]["strength"] == 5.0
    some = np.array([0.6, 0.1, np.nan, 1, 1 / 3], np.float32)
    found = [row["a"] for row in simulate.rows({"a": jnp.asarray(some), "round": jnp.arange(5)})]
    assert found == pytest.approx([0.6, 0.1, np.nan, 1.0, 0.33333334], rel=0, abs=0, nan_ok=True)


def test_an_empty_chunk_is_refused():
    """It would never reach the last round."""
    with pytest.raises(ValueError, match="rounds_per_chunk=0: must be at least 1"):
        simulate.chunk_of_rounds(0)


@pytest.mark.slow
def test_no_tracer_leaks():
    with jax.checking_leaks():
        given = (KEY, begin(), DATA, EXPERIMENT)
        jax.eval_shape(lambda *arguments: simulate.measured_step(*arguments, KEPT), *given)  # pyright: ignore
