"""`sweep`: a lane is the single run, whatever lies beside it, and wherever it lies.

Lanes go in turn, on one device and as one compiled program, unless a test says otherwise: the
defaults of a CPU. They are then the single run to the bit.
"""

import dataclasses
import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import many_lanes
import numpy as np
import pytest
from many_lanes import CHUNK, CONFIG, ROUNDS, Linear

from noisefl import keys, lanes, mesh, sweep

# One sum in another order, in each of 4 rounds of parameters of size 1.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    """(state, metrics) of each lane by `simulate`."""
    return [many_lanes.alone(lane) for lane in many_lanes.lanes()]


@pytest.fixture(scope="module")
def on() -> Any:
    return mesh.make(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def grid(on) -> Any:
    """3 caps × 4 learning rates × 5 seeds by `sweep.run`: (lanes, result, program, JAX's log).

    Its program of 4 lanes is that of the other tests as well, so that it is compiled once.
    """
    even, _, uneven, *_ = many_lanes.lanes()
    some = [
        many_lanes.Lane(f"{cap}, {rate}, {seed}", seed, (even, uneven)[seed % 2].data, hyper)
        for cap in (0.4, 0.5, 0.6)
        for rate in (0.1, 0.2, 0.5, 1.0)
        for hyper in [many_lanes.hyper(cap=cap, learning_rate=rate)]
        for seed in range(5)
    ]
    programs, log = [], io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        make = sweep.make_program
        patch.setattr(
            sweep, "make_program", lambda *a, **k: programs.append(make(*a, **k)) or programs[-1]
        )
        handler = logging.StreamHandler(log)
        logging.getLogger("jax").addHandler(handler)
        with jax.log_compiles():
            result = many_lanes.swept(some, on=on)
        logging.getLogger("jax").removeHandler(handler)
    (program,) = programs
    return some, result, program, log.getvalue()


@pytest.fixture(scope="module")
def compiled(grid) -> sweep.Program:
    return grid[2]


@pytest.fixture
def swept(monkeypatch, compiled, on):
    """`sweep.run`, which finds its program compiled; calls it [lanes at once]."""

    def go(some=None, **options):
        monkeypatch.setattr(sweep, "make_program", lambda *args, **_: compiled)
        return many_lanes.swept(some, **{"on": on, **options})

    return go


def assert_same(ours: Any, theirs: Any, name: str = "", **close: Any) -> None:
    def compare(path: Any, a: Any, b: Any) -> None:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if close and np.issubdtype(np.asarray(b).dtype, np.floating):
            np.testing.assert_allclose(a, b, **close, err_msg=where)
        else:
            np.testing.assert_array_equal(a, b, err_msg=where)

    jax.tree.map_with_path(compare, ours, theirs)


def lane_of(result: Any, lane: int) -> Any:
    """(state, metrics) of one lane."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[lane], tuple(result))


def inputs(on: Any, some: Any) -> tuple[Any, ...]:
    """Seeds, data, hypers and last rounds of a program of these lanes."""
    seeds = np.stack([jax.random.key_data(keys.root(lane.seed)) for lane in some])
    hypers = jax.tree.map(lambda *leaves: np.stack(leaves), *(lane.hyper for lane in some))
    columns = max(lane.data.clients.shape[1] for lane in many_lanes.lanes())
    data = lanes.put(lanes.stack([lane.data for lane in some], columns), on)
    return *mesh.put((seeds, hypers), mesh.over_lanes(on)), data


def test_every_lane_is_its_single_run(alone, swept):
    """Other seeds, partitions, widths of tables, caps, rates, warm-ups and FedAvg; in two batches,
    the second of which is filled up."""
    result = swept()
    assert result.metrics.round.tolist() == [[1, 2, 3, 4]] * 7
    for number, lane in enumerate(many_lanes.lanes()):
        assert_same(lane_of(result, number), alone[number], f"{lane.name}: ")
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(result))


def test_the_lanes_are_worth_testing(alone):
    """They differ, some try more than once, some rounds are feasible and some are not."""
    lanes = many_lanes.lanes()
    assert len({lane.data.clients.shape[1] for lane in lanes}) == 2
    for number, (_, metrics) in enumerate(alone):
        assert np.all(metrics.finite)
        for _, other in alone[:number]:
            assert np.any(metrics.base_accuracy != other.base_accuracy) or np.any(
                metrics.strength != other.strength
            )
    tries = np.stack([metrics.calibration_tries for _, metrics in alone])
    assert len(np.unique(tries)) > 4
    feasible = np.stack([metrics.feasible for _, metrics in alone])
    assert 0 < np.sum(~feasible) < 10
    protected = np.stack([metrics.protected for _, metrics in alone])
    assert protected.sum(axis=1).tolist() == [3, 3, 3, 1, 0, 0, 3]


def test_the_company_of_a_lane_does_not_matter(alone, swept):
    """Another order, other neighbours, a batch of its own."""
    given = many_lanes.lanes()
    order = [5, 2, 0, 3, 3, 6, 1]
    result = swept([given[number] for number in order])
    for place, number in enumerate(order):
        assert_same(lane_of(result, place), alone[number], given[number].name)


def test_lanes_side_by_side_are_close(alone, on):
    """Under vmap, two at a time: sums run in another order. Decisions are the same."""
    some = many_lanes.lanes()[:4]
    seeds, hypers, data = inputs(on, some)
    program = sweep.make_program(Linear(), CONFIG, data, 4, CHUNK, on, side_by_side=2)
    states, chunks = program.init(seeds), []
    last = mesh.put(np.array([ROUNDS, ROUNDS, ROUNDS - 1, ROUNDS], np.int32), mesh.over_lanes(on))
    for _ in range(0, ROUNDS, CHUNK):
        states, metrics = program.chunk(seeds, states, data, hypers, last)
        chunks.append(metrics)
    metrics = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *chunks)
    for number, lane in enumerate(some):
        state, rows = lane_of((states, metrics), number)
        if number == 2:  # the last round was not run
            assert state.round == ROUNDS - 1
            assert all(not np.any(leaf[-1]) for leaf in jax.tree.leaves(rows))
            ours, theirs = jax.tree.map(lambda leaf: leaf[:-1], (rows, alone[number][1]))
            assert_same(ours, theirs, lane.name, **CLOSE)
        else:
            assert_same((state, rows), alone[number], lane.name, **CLOSE)


def test_each_lane_has_its_own_last_round(alone, compiled, on):
    some = many_lanes.lanes()[:4]
    seeds, hypers, data = inputs(on, some)
    states, chunks = compiled.init(seeds), []
    start = jax.tree.map(np.array, states)
    stops = [3, 0, 4, 1]
    last = mesh.put(np.array(stops, np.int32), mesh.over_lanes(on))
    for _ in range(0, ROUNDS, CHUNK):
        states, metrics = compiled.chunk(seeds, states, data, hypers, last)
        chunks.append(metrics)
    metrics = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *chunks)
    for number, stop in enumerate(stops):
        state, rows = lane_of((states, metrics), number)
        assert state.round == stop
        for ours, theirs in zip(
            jax.tree.leaves(rows), jax.tree.leaves(alone[number][1]), strict=True
        ):
            np.testing.assert_array_equal(ours[:stop], theirs[:stop])
            assert not np.any(ours[stop:])
    assert_same(lane_of((states, metrics), 2)[0], alone[2][0])
    assert_same(lane_of((states,), 1), lane_of((start,), 1))  # not run: as it was


def test_going_on_from_saved_states(alone, compiled, on):
    seeds, hypers, data = inputs(on, many_lanes.lanes()[:4])
    last = mesh.put(np.full(4, ROUNDS, np.int32), mesh.over_lanes(on))
    states, _ = compiled.chunk(seeds, compiled.init(seeds), data, hypers, last)
    saved = mesh.own(states)
    again = mesh.put(jax.tree.map(np.array, saved), mesh.over_lanes(on))
    states, metrics = compiled.chunk(seeds, again, data, hypers, last)
    for number in range(4):
        state, rows = lane_of((states, metrics), number)
        assert_same(state, alone[number][0])
        assert_same(rows, jax.tree.map(lambda leaf: leaf[CHUNK:], alone[number][1]))


@pytest.mark.parametrize("broken", [0, 2])
def test_a_lane_that_breaks_down_leaves_the_others_alone(alone, swept, broken):
    given = list(many_lanes.lanes())
    huge = many_lanes.hyper(learning_rate=1e30)
    given[broken] = given[broken]._replace(hyper=huge)
    result = swept(given)
    assert result.metrics.finite[broken].tolist() == [True, False, False, False]
    assert np.isnan(result.states.base["dense1"]["kernel"][broken]).any()
    for number in set(range(7)) - {broken}:
        assert_same(lane_of(result, number), alone[number], given[number].name)


def test_one_compilation_for_a_grid(grid):
    some, result, _, log = grid
    programs = re.findall(r"Finished XLA compilation of jit\((\w+)\)", log)
    assert programs.count("chunk") == programs.count("init") == 1
    assert len(programs) < 20  # the others stack and slice inputs, no more of them for more lanes
    assert result.metrics.round.tolist() == [[1, 2, 3, 4]] * 60
    assert len(np.unique(result.metrics.strength, axis=0)) > 30
    for number in (0, 16, 59):  # of several batches and tables
        assert_same(lane_of(result, number), many_lanes.alone(some[number]), some[number].name)


def test_the_memory_of_a_program_is_at_least_that_of_its_arrays(compiled, grid, on):
    """Arguments and results, in which the donated states count once; and temporaries."""
    seeds, hypers, data = inputs(on, many_lanes.lanes()[:4])
    states = compiled.init(seeds)
    metrics = jax.tree.map(lambda leaf: leaf[:4, :CHUNK], grid[1].metrics)
    known = sum(leaf.nbytes for leaf in jax.tree.leaves((seeds, states, data, hypers, metrics)))
    assert known < compiled.bytes_a_device < 10 * known


# On four devices


@pytest.fixture(scope="module")
def on_four(tmp_path_factory) -> dict[str, np.ndarray]:
    file = tmp_path_factory.mktemp("four") / "results.npz"
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, here / "four_devices.py", file],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    return dict(np.load(file))


def test_lanes_over_four_devices_and_clients_over_two(alone, on_four):
    """Lanes alone: the same bits, but for one ratio of sums that is only reported. Three clients
    over two devices: two partial sums."""
    names = [field.name for field in dataclasses.fields(alone[0][1])]
    wanted = sweep.Result(*jax.tree.map(lambda *leaves: np.stack(leaves), *map(tuple, alone)))
    seen = set()
    for path, leaf in jax.tree.leaves_with_path(wanted):
        name = jax.tree_util.keystr(path)
        seen |= {f"lanes{name}", f"square{name}"}
        if name.endswith("relative_strength"):
            np.testing.assert_allclose(on_four[f"lanes{name}"], leaf, **CLOSE, err_msg=name)
        else:
            np.testing.assert_array_equal(on_four[f"lanes{name}"], leaf, err_msg=name)
        np.testing.assert_allclose(on_four[f"square{name}"], leaf, **CLOSE, err_msg=name)
    assert seen == set(on_four)
    assert len(seen) == 2 * (len(names) + len(jax.tree.leaves(alone[0][0])))
