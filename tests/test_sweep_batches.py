"""`sweep` around its program: groups, batches, what is put in which lane, memory, refusals.

The programs are made up: each lane answers with what it was given.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import jax
import many_lanes
import numpy as np
import pytest
from many_lanes import CONFIG

from noisefl import Config, Hyper, lanes, mesh, sweep
from noisefl.simulate import Metrics

FIELDS = [field.name for field in dataclasses.fields(Metrics)]
CONFIGS = [dataclasses.replace(CONFIG, calibrator=name) for name in ("fixed", "additive", "snr")]


class Programs:
    """Stands in for `make_program`; remembers what was compiled.

    Args:
      bytes_a_lane: what a program says that it needs.
    """

    def __init__(self, bytes_a_lane: int = 0):
        self.compiled: list[tuple[Config, int, dict[str, Any]]] = []
        self.last_rounds: list[list[int]] = []  # of each batch
        self.bytes_a_lane = bytes_a_lane

    def __call__(self, model, config, data, lanes, rounds_per_chunk, on, **options: Any) -> Any:
        self.compiled.append((config, lanes, options))
        shapes = jax.tree.map(lambda leaf: leaf.shape, data)

        def init(seeds):
            assert seeds.shape == (lanes, 2)
            return {"seed": np.asarray(seeds), "round": np.zeros(lanes, np.int32)}

        def chunk(seeds, states, data, hypers, last_rounds):
            assert jax.tree.map(lambda leaf: leaf.shape, data) == shapes
            if not states["round"].any():
                self.last_rounds.append(np.asarray(last_rounds).tolist())
            np.testing.assert_array_equal(states["seed"], seeds)
            rounds = states["round"][:, None] + np.arange(1, rounds_per_chunk + 1)
            rounds = np.where(rounds <= np.asarray(last_rounds)[:, None], rounds, 0)
            found: dict[str, Any] = {
                "round": rounds,
                "owner_accuracy": np.asarray(hypers.learning_rate)[:, None],
                "strength": np.asarray(hypers.cap)[:, None],
                "local_accuracy_max": np.asarray(data.counts)[:, :1],
                "training_samples": np.asarray(data.clients)[:, 0, :1],
                "calibration_tries": np.asarray(last_rounds)[:, None],
            }
            found = {name: np.broadcast_to(leaf, rounds.shape) for name, leaf in found.items()}
            every: dict[str, Any] = {name: found.get(name, rounds) for name in FIELDS}
            return {**states, "round": states["round"] + rounds_per_chunk}, Metrics(**every)

        made_up: Any = sweep.Program
        return made_up(init, chunk, lanes * self.bytes_a_lane)


@pytest.fixture(scope="module")
def on() -> Any:
    return mesh.make(devices=jax.devices()[:1])


def made_up(total: int, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Hypers, roots and data of lanes, all different."""
    sources: list[Any] = [lane.data for lane in many_lanes.lanes()[1:3]]  # of two widths
    hypers = Hyper(
        learning_rate=rng.permutation(total) + 1.0,
        cap=rng.permutation(total) / 2 / total + 0.25,
        strength=0.5,
    )
    bits: Any = rng.integers(0, 2**32, (total, 2), np.uint32)
    data = [
        one.replace(counts=one.counts.at[0].set(n), clients=one.clients.at[0, 0].set(-n))
        for n in range(total)
        for one in [sources[n % 2]]
    ]
    return hypers, jax.random.wrap_key_data(bits), data


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
def test_every_lane_gets_its_own(monkeypatch, on, total, at_once, widths, batches):
    """And stands where it was given, whatever config the lanes around it have."""
    programs = Programs()
    monkeypatch.setattr(sweep, "make_program", programs)
    hypers, roots, data = made_up(total, np.random.default_rng(total))
    result: Any = sweep.run(
        [CONFIGS[n % 3] for n in range(total)], hypers, roots, data, model=many_lanes.Linear(),
        rounds=5, rounds_per_chunk=2, on=on, lanes_at_once=at_once, calibrator="mine",
    )  # fmt: skip
    own = {"calibrator": "mine"}  # handed on to `make_round`
    assert programs.compiled == [(c, n, own) for c, n in zip(CONFIGS, widths, strict=True)]
    assert programs.last_rounds == batches  # 0 where nothing is to be run
    assert result.metrics.round.tolist() == [[1, 2, 3, 4, 5]] * total
    for name, wanted in (
        ("owner_accuracy", hypers.learning_rate),
        ("strength", np.float32(hypers.cap)),
        ("local_accuracy_max", np.arange(total)),
        ("training_samples", -np.arange(total)),
    ):
        np.testing.assert_array_equal(
            getattr(result.metrics, name), np.repeat(np.asarray(wanted)[:, None], 5, axis=1)
        )
    np.testing.assert_array_equal(result.states["seed"], jax.random.key_data(roots))


def test_one_number_one_config_and_stacked_data_are_for_all(monkeypatch, on):
    programs = Programs()
    monkeypatch.setattr(sweep, "make_program", programs)
    hypers, roots, data = made_up(3, np.random.default_rng(0))
    result = sweep.run(
        CONFIG, hypers.replace(cap=0.25), roots, lanes.stack(data), model=many_lanes.Linear(),
        rounds=1, on=on,
    )  # fmt: skip
    assert np.all(result.metrics.strength == 0.25)
    assert result.metrics.local_accuracy_max.tolist() == [[0], [1], [2]]
    np.testing.assert_array_equal(result.metrics.owner_accuracy[:, 0], hypers.learning_rate)
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
        return sweep.Program(cast(Any, f"init {lanes}"), cast(Any, None), int(lanes * 1e9))

    found, program = sweep.fitting(compile, wanted, across(devices))
    assert sizes == tried
    assert (found, program.init) == (tried[-1], f"init {tried[-1]}")


@pytest.mark.parametrize(("lanes", "devices", "tried"), [(8, 1, [8, 4, 2, 1]), (8, 4, [8, 4])])
def test_not_even_one_lane_a_device_fits(monkeypatch, lanes, devices, tried):
    monkeypatch.setattr(mesh, "memory_a_device", lambda on: 2_000_000_000)
    sizes: list[int] = []

    def compile(lanes: int) -> sweep.Program:
        sizes.append(lanes)
        return sweep.Program(cast(Any, None), cast(Any, None), 3_000_000_000)

    refusal = f"lanes_at_once={devices}: a lane needs 3.0 GB, a device has 2.0"
    with pytest.raises(ValueError, match=f"^{refusal}$"):
        sweep.fitting(compile, lanes, across(devices))
    assert sizes == tried


def test_what_does_not_fit_goes_in_more_batches(monkeypatch, on):
    programs = Programs(bytes_a_lane=1000)
    monkeypatch.setattr(sweep, "make_program", programs)
    monkeypatch.setattr(mesh, "memory_a_device", lambda on: 3000)
    hypers, roots, data = made_up(8, np.random.default_rng(1))
    result = sweep.run(CONFIG, hypers, roots, data, model=many_lanes.Linear(), rounds=2, on=on)
    assert [lanes for _, lanes, _ in programs.compiled] == [8, 4, 2]
    assert programs.last_rounds == [[2, 2]] * 4
    np.testing.assert_array_equal(result.metrics.owner_accuracy[:, 1], hypers.learning_rate)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": [CONFIG] * 3}, "config='3 lanes': roots has 4"),
        ({"data": 3}, "data='3 lanes': roots has 4"),
        ({"hypers": Hyper(cap=np.full(3, 0.5))}, r"cap=\(3,\): must be one number, or .* 4 roots"),
        ({"hypers": Hyper(cap=np.full((4, 2), 0.5))}, r"cap=\(4, 2\): must be"),
        ({"data": "one run's"}, "data='of one run': must be of `stack`"),
        ({"rounds": 0}, "rounds=0: must be at least 1"),
        ({"rounds_per_chunk": 0}, "rounds_per_chunk=0: must be at least 1"),
        ({"config": dataclasses.replace(CONFIG, noise_layers="conv7")}, "noise_layers='conv7'"),
        ({"config": dataclasses.replace(CONFIG, num_clients=7)}, "num_clients=7: the data have 6"),
    ],
)
def test_what_does_not_agree_is_refused(on, changes, message):
    hypers, roots, data = made_up(4, np.random.default_rng(0))
    given = {"config": CONFIG, "hypers": hypers, "roots": roots, "data": data, **changes}
    if given["data"] == 3:
        given["data"] = data[:3]
    if given["data"] == "one run's":  # of as many clients as there are lanes
        given["data"] = data[0].replace(counts=data[0].counts[:4], clients=data[0].clients[:4])
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        sweep.run(model=many_lanes.Linear(), on=on, **{"rounds": 2, **given})
    assert len(str(caught.value).splitlines()) == 1
