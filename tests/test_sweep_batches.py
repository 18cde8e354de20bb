"""`sweep` around its program: groups, batches, what is put in which lane, memory, refusals.

The programs are made up: each lane answers with what it was given.
"""

from types import SimpleNamespace
from typing import Any

import jax
import many_lanes
import numpy as np
import pytest

import noisefl
from noisefl import calibrate, layout, mesh, optimizers, parts, schemes, sweep
from noisefl.parts import changed

WAYS = ("pair", "subtract", "reweight")  # other structures, whose states are of one kind


program_of: Any = sweep.Program  # of functions that are not compiled


class Programs:
    """Stands in for `trace`; remembers what was compiled.

    Args:
      bytes_a_lane: what a program says that it needs.
    """

    def __init__(self, bytes_a_lane: int = 0):
        self.compiled: list[tuple[str, int, Any]] = []
        self.last_rounds: list[list[int]] = []  # of each batch
        self.bytes_a_lane = bytes_a_lane

    def __call__(self, experiments, data, lanes, rounds_per_chunk, on, measure=None) -> Any:
        self.compiled.append((experiments.scheme.inner.cancellation, lanes, measure))
        shapes = layout.shapes(data, lanes, on), layout.shapes(experiments, lanes, on)

        def checked(*given: Any) -> None:
            wanted = [leaf.shape for leaf in jax.tree.leaves(shapes)]
            assert [leaf.shape for leaf in jax.tree.leaves(given)] == wanted

        def init(seeds, data, experiments):
            checked(data, experiments)
            assert seeds.shape == (lanes, 2)
            return {"seed": np.asarray(seeds), "round": np.zeros(lanes, np.int32)}

        def chunk(seeds, states, data, experiments, last_rounds):
            checked(data, experiments)
            if not states["round"].any():
                self.last_rounds.append(np.asarray(last_rounds).tolist())
            np.testing.assert_array_equal(states["seed"], seeds)
            rounds = states["round"][:, None] + np.arange(1, rounds_per_chunk + 1)
            rounds = np.where(rounds <= np.asarray(last_rounds)[:, None], rounds, 0)
            found: dict[str, Any] = {
                "round": rounds,
                "rate": np.asarray(experiments.local.optimizer.learning_rate)[:, None],
                "cap": np.asarray(experiments.scheme.cap)[:, None],
                "count": np.asarray(data.counts)[:, :1],
                "client": np.asarray(data.clients)[:, 0, :1],
            }
            found = {name: np.broadcast_to(leaf, rounds.shape) for name, leaf in found.items()}
            return {**states, "round": states["round"] + rounds_per_chunk}, found

        program = program_of(init, chunk, lanes * self.bytes_a_lane, {})
        return SimpleNamespace(compile=lambda: program)


@pytest.fixture(scope="module")
def on() -> Any:
    return mesh.make(devices=jax.devices()[:1])


@pytest.fixture
def programs(monkeypatch) -> Programs:
    programs = Programs()
    monkeypatch.setattr(sweep, "trace", programs)
    return programs


def made_up(total: int, seed: int, ways: int = 1) -> tuple[list[noisefl.Experiment], Any, Any]:
    """Experiments, roots and data of lanes, all different."""
    rng = np.random.default_rng(seed)
    rates, caps = rng.permutation(total) + 1.0, rng.permutation(total) / 2 / total + 0.25
    experiments = [
        changed(many_lanes.experiment(rate, cap=cap), schemes.Noised, cancellation=WAYS[n % ways])
        for n, (rate, cap) in enumerate(zip(rates, caps, strict=True))
    ]
    bits: Any = rng.integers(0, 2**32, (total, 2), np.uint32)
    sources: list[Any] = [lane.data for lane in many_lanes.lanes()[1:3]]  # of two widths
    data = [
        one.replace(counts=one.counts.at[0].set(n), clients=one.clients.at[0, 0].set(-n))
        for n in range(total)
        for one in [sources[n % 2]]
    ]
    return experiments, jax.random.wrap_key_data(bits), data


def numbers(experiments: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rates and caps of a list."""
    stacked = [(e.local.optimizer.learning_rate, e.scheme.cap) for e in experiments]
    rates, caps = np.array(stacked).T
    return rates, caps


@pytest.mark.parametrize(
    ("total", "at_once", "widths", "batches"),
    [
        (13, 3, [3, 2, 2], [[5, 5, 5], [5, 5, 0], [5, 5], [5, 5], [5, 5], [5, 5]]),
        (13, 16, [5, 4, 4], [[5] * 5, [5] * 4, [5] * 4]),
        (4, 1, [1, 1, 1], [[5], [5], [5], [5]]),
        (
            28,
            None,
            [5, 5, 5],
            [[5] * 5, [5] * 5, [5] * 5, [5, 5, 5, 5, 0], [5] * 5, [5, 5, 5, 5, 0]],
        ),
    ],
)
def test_every_lane_gets_its_own(programs, on, total, at_once, widths, batches):
    """And stands where it was given, whatever the structure of the lanes around it."""
    experiments, roots, data = made_up(total, total, ways=3)
    mine: Any = noisefl.measure.Protocol()
    result: Any = sweep.run(
        experiments, roots, data, rounds=5, rounds_per_chunk=2, on=on, lanes_at_once=at_once,
        measure=mine,
    )  # fmt: skip
    assert programs.compiled == [(w, n, mine) for w, n in zip(WAYS, widths, strict=True)]
    assert programs.last_rounds == batches  # 0 where nothing is to be run
    assert result.metrics["round"].tolist() == [[1, 2, 3, 4, 5]] * total
    rates, caps = numbers(experiments)
    places = np.arange(total)
    for name, wanted in {"rate": rates, "cap": caps, "count": places, "client": -places}.items():
        repeated = np.repeat(wanted[:, None], 5, axis=1)
        np.testing.assert_array_equal(result.metrics[name], repeated, name)
    np.testing.assert_array_equal(result.states["seed"], jax.random.key_data(roots))


def test_one_number_one_experiment_and_stacked_data_are_for_all(programs, on):
    experiments, roots, data = made_up(3, 0)
    one = changed(parts.lanes(experiments), calibrate.Additive, cap=0.25)
    result = sweep.run(one, roots, layout.stack(data), rounds=1, on=on)
    assert np.all(result.metrics["cap"] == 0.25)
    assert result.metrics["count"].tolist() == [[0], [1], [2]]
    np.testing.assert_array_equal(result.metrics["rate"][:, 0], numbers(experiments)[0])
    assert [lanes for _, lanes, _ in programs.compiled] == [3]


# Memory


def across(devices: int) -> Any:
    return SimpleNamespace(shape={mesh.LANES: devices, mesh.CLIENTS: 1})


@pytest.mark.parametrize(
    ("wanted", "devices", "room", "tried"),
    [
        (16, 1, 20, [16]),
        (16, 1, 10, [16, 8]),  # 80 % of the memory, not more
        (16, 1, 9.9, [16, 8, 4]),
        (7, 1, 1.25, [7, 3, 1]),
        (12, 4, 5, [12, 4]),  # a multiple of the devices
        (24, 4, 11, [24, 12, 4]),
    ],
)
def test_lanes_are_halved_until_they_fit(monkeypatch, wanted, devices, room, tried):
    monkeypatch.setattr(mesh, "memory_a_device", lambda on: int(room * 1e9))
    sizes: list[int] = []

    def compile(lanes: int) -> sweep.Program:
        sizes.append(lanes)
        return program_of(f"init {lanes}", None, int(lanes * 1e9), {})

    found, program = sweep.fitting(compile, wanted, across(devices))
    assert sizes == tried
    assert (found, program.init) == (tried[-1], f"init {tried[-1]}")


@pytest.mark.parametrize(("lanes", "devices", "tried"), [(8, 1, [8, 4, 2, 1]), (8, 4, [8, 4])])
def test_not_even_one_lane_a_device_fits(monkeypatch, lanes, devices, tried):
    monkeypatch.setattr(mesh, "memory_a_device", lambda on: 2_000_000_000)
    sizes: list[int] = []

    def compile(lanes: int) -> sweep.Program:
        sizes.append(lanes)
        return program_of(None, None, 3_000_000_000, {})

    refusal = f"lanes_at_once={devices}: a lane needs 3.0 GB, a device has 2.0"
    with pytest.raises(sweep.TooLarge, match=f"^{refusal}$"):
        sweep.fitting(compile, lanes, across(devices))
    assert sizes == tried


def test_what_does_not_fit_goes_in_more_batches(monkeypatch, programs, on):
    programs.bytes_a_lane = 1000
    monkeypatch.setattr(mesh, "memory_a_device", lambda on: 3000)
    experiments, roots, data = made_up(8, 1)
    result = sweep.run(experiments, roots, data, rounds=2, on=on)
    assert [lanes for _, lanes, _ in programs.compiled] == [8, 4, 2]
    assert programs.last_rounds == [[2, 2]] * 4
    np.testing.assert_array_equal(result.metrics["rate"][:, 1], numbers(experiments)[0])


# Refusals


def all_lanes(part: type, **numbers: Any) -> Any:
    return changed(many_lanes.experiment(), part, **numbers)


SIX = all_lanes(noisefl.Cohort, clients_per_round=7)
LAYER = all_lanes(noisefl.noise.Where, noise_layers="conv7")
CAP = r"experiments\.scheme\.inner\.calibrator\.cap"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiments": [many_lanes.experiment()] * 3}, "experiments='3 lanes': roots has 4"),
        ({"data": 3}, "data='3 lanes': roots has 4"),
        (
            {"experiments": all_lanes(calibrate.Additive, cap=np.full(3, 0.5))},
            rf"{CAP}=\(3,\): must be one number, or one for each of 4 roots$",
        ),
        (
            {"experiments": all_lanes(optimizers.SGD, learning_rate=np.full((4, 2), 0.5))},
            r"experiments\.local\.optimizer\.learning_rate=\(4, 2\): must be",
        ),
        ({"data": "one run's"}, "data='of one run': must be of `stack`"),
        ({"roots": "a key"}, r"roots=\(\): must be an array of keys \[L\]"),
        ({"roots": 7}, "roots='int': must be an array of keys"),
        ({"rounds": 0}, "rounds=0: must be at least 1"),
        ({"lanes_at_once": 0}, "lanes_at_once=0: must be at least 1"),
        ({"rounds_per_chunk": 0}, "rounds_per_chunk=0: must be at least 1"),
        ({"experiments": LAYER}, "noise_layers='conv7': must be first, last, all, or match"),
        ({"experiments": SIX}, "clients_per_round=7: .*6"),
    ],
)
def test_what_does_not_agree_is_refused(on, changes, message):
    experiments, roots, data = made_up(4, 0)
    given = {"experiments": experiments, "roots": roots, "data": data, **changes}
    if given["data"] == 3:
        given["data"] = data[:3]
    if given["data"] == "one run's":  # of as many clients as there are lanes
        given["data"] = data[0].replace(counts=data[0].counts[:4], clients=data[0].clients[:4])
    if given["roots"] == "a key":
        given["roots"] = roots[0]
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        sweep.run(on=on, **{"rounds": 2, **given})
    assert len(str(caught.value).splitlines()) == 1


def test_lanes_that_are_other_programs_are_no_lanes():
    pair, subtract = made_up(2, 0, ways=2)[0]
    with pytest.raises(ValueError, match=r"^lanes=1: differs from lane 0 in more than numbers$"):
        parts.lanes([pair, subtract])
    with pytest.raises(ValueError, match=r"^lanes=\[\]: must be at least one experiment$"):
        parts.lanes([])
