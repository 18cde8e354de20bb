"""`sweep`: a lane is the single run, whatever lies beside it, and wherever it lies.

Lanes go in turn, on one device and as one compiled program, unless a test says otherwise: the
defaults of a CPU. To the bit is what one program makes of a lane, whatever lies beside it. The
single run is another program: XLA may fuse a product with a sum in one and not in the other, so
that its last bits are the same on some CPUs and differ on others.
"""

import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import federation as fed
import jax
import jax.numpy as jnp
import many_lanes
import numpy as np
import pytest
from conftest import USERS
from many_lanes import CHUNK, MEASURE, ROUNDS

from noisefl import keys, layout, mesh, optimizers, parts, simulate, sweep
from noisefl.measure import Protocol

# One sum in another order, in each of 4 rounds of parameters of size 1.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    """(state, numbers) of each lane by `simulate`."""
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
        many_lanes.Lane(f"{cap}, {rate}, {seed}", seed, (even, uneven)[seed % 2].data, experiment)
        for cap in (0.4, 0.5, 0.6)
        for rate in (0.1, 0.2, 0.5, 1.0)
        for experiment in [many_lanes.experiment(rate, cap=cap)]
        for seed in range(5)
    ]
    programs, log = [], io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        compile = sweep.Traced.compile
        patch.setattr(
            sweep.Traced, "compile", lambda traced: programs.append(compile(traced)) or programs[-1]
        )
        handler = logging.StreamHandler(log)
        logging.getLogger("jax").addHandler(handler)
        jax.config.update("jax_log_compiles", True)  # `jax.log_compiles` is of this thread alone
        result = many_lanes.swept(some, on=on)
        jax.config.update("jax_log_compiles", False)
        logging.getLogger("jax").removeHandler(handler)
    (program,) = programs
    return some, result, program, log.getvalue()


@pytest.fixture(scope="module")
def compiled(grid) -> sweep.Program:
    return grid[2]


@pytest.fixture
def swept(monkeypatch, compiled, on):
    """`sweep.run`, which finds its program compiled; calls it [lanes at once]."""
    monkeypatch.setattr(sweep.Traced, "compile", lambda _: compiled)
    return lambda some=None: many_lanes.swept(some, on=on)


@pytest.fixture(scope="module")
def whole(compiled, on) -> list[Any]:
    """(state, numbers) of each lane by `sweep.run`, all of them in two batches, the second of which
    is filled up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep.Traced, "compile", lambda _: compiled)
        result = many_lanes.swept(on=on)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(result))
    return [lane_of(result, number) for number in range(7)]


def assert_same(ours: Any, theirs: Any, name: str = "", **close: Any) -> None:
    def compare(path: Any, a: Any, b: Any) -> None:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if close and np.issubdtype(np.asarray(b).dtype, np.floating):
            np.testing.assert_allclose(a, b, **close, err_msg=where)
        else:
            np.testing.assert_array_equal(a, b, err_msg=where)

    jax.tree.map_with_path(compare, ours, theirs)


def lane_of(result: Any, lane: int) -> Any:
    """(state, numbers) of one lane."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[lane], tuple(result)[:2])


def inputs(on: Any) -> tuple[Any, ...]:
    """Seeds, data and experiments of a program of the first four lanes."""
    some, everyone = many_lanes.lanes()[:4], many_lanes.lanes()
    seeds = np.stack([jax.random.key_data(keys.root(lane.seed)) for lane in some])
    experiments = parts.lanes([lane.experiment for lane in some])
    columns = max(lane.data.clients.shape[1] for lane in everyone)
    data = layout.put(layout.stack([lane.data for lane in some], columns), on)
    seeds, experiments = mesh.put((seeds, experiments), mesh.over_lanes(on))
    return seeds, data, experiments


def chunks(program: sweep.Program, on: Any, stops: list[int]) -> Any:
    """(first states, states, numbers) of the first four lanes, each to its own last round."""
    seeds, data, experiments = inputs(on)
    states, found = program.init(seeds, data, experiments), []
    start = jax.tree.map(np.array, states)
    last = mesh.put(np.array(stops, np.int32), mesh.over_lanes(on))
    for _ in range(0, ROUNDS, CHUNK):
        before = states
        states, numbers = program.chunk(seeds, states, data, experiments, last)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # donated
        found.append(numbers)
    return start, states, jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *found)


def test_every_lane_is_its_single_run(alone, whole):
    """Other seeds, partitions, widths of tables, caps, rates, warm-ups and FedAvg."""
    for lane, ours, theirs in zip(many_lanes.lanes(), whole, alone, strict=True):
        assert ours[1]["round"].tolist() == [1, 2, 3, 4]
        assert_same(ours, theirs, f"{lane.name}: ", **CLOSE)


def test_the_lanes_are_worth_testing(alone):
    """They differ, some try more than once, some rounds are feasible and some are not."""
    assert len({lane.data.clients.shape[1] for lane in many_lanes.lanes()}) == 2
    for number, (_, numbers) in enumerate(alone):
        assert np.all(numbers["finite"])
        for _, other in alone[:number]:
            assert np.any(numbers["base_accuracy"] != other["base_accuracy"]) or np.any(
                numbers["strength"] != other["strength"]
            )
    every = {name: np.stack([numbers[name] for _, numbers in alone]) for name in alone[0][1]}
    assert len(np.unique(every["calibration_tries"])) > 4
    assert 0 < np.sum(~every["feasible"]) < 10
    assert every["protected"].sum(axis=1).tolist() == [3, 3, 3, 1, 0, 0, 3]


def test_the_company_of_a_lane_does_not_matter(whole, swept):
    """Another order, other neighbours, a batch of its own."""
    given = many_lanes.lanes()
    order = [5, 2, 0, 3, 3, 6, 1]
    result = swept([given[number] for number in order])
    for place, number in enumerate(order):
        assert_same(lane_of(result, place), whole[number], given[number].name)


def test_lanes_side_by_side_are_close(alone, on):
    """Under vmap, two at a time: sums run in another order. Decisions are the same."""
    _, data, experiments = inputs(on)
    program = sweep.trace(experiments, data, 4, CHUNK, on, MEASURE, side_by_side=2).compile()
    _, *found = chunks(program, on, [ROUNDS, ROUNDS, ROUNDS - 1, ROUNDS])
    for number, lane in enumerate(many_lanes.lanes()[:4]):
        ours, theirs = lane_of(found, number), alone[number]
        if number == 2:  # the last round was not run
            assert ours[0].round == ROUNDS - 1
            assert all(not np.any(leaf[-1]) for leaf in jax.tree.leaves(ours[1]))
            ours, theirs = jax.tree.map(lambda leaf: leaf[:-1], (ours[1], theirs[1]))
        assert_same(ours, theirs, lane.name, **CLOSE)


def test_each_lane_has_its_own_last_round(whole, compiled, on):
    stops = [3, 0, 4, 1]
    start, *found = chunks(compiled, on, stops)
    for number, stop in enumerate(stops):
        state, rows = lane_of(found, number)
        assert state.round == stop
        for name, theirs in whole[number][1].items():
            np.testing.assert_array_equal(rows[name][:stop], theirs[:stop])
            assert not np.any(rows[name][stop:])
    assert_same(lane_of(found, 2), whole[2])
    assert_same(lane_of(found[:1], 1), lane_of((start,), 1))  # not run: as it was


def test_going_on_from_saved_states(whole, compiled, on):
    seeds, data, experiments = inputs(on)
    last = mesh.put(np.full(4, ROUNDS, np.int32), mesh.over_lanes(on))
    states = compiled.init(seeds, data, experiments)
    states, _ = compiled.chunk(seeds, states, data, experiments, last)
    again = mesh.put(jax.tree.map(np.array, mesh.own(states)), mesh.over_lanes(on))
    found = compiled.chunk(seeds, again, data, experiments, last)
    for number in range(4):
        state, rows = lane_of(found, number)
        assert_same(state, whole[number][0])
        assert_same(rows, jax.tree.map(lambda leaf: leaf[CHUNK:], whole[number][1]))


@pytest.mark.parametrize("broken", [0, 2])
def test_a_lane_that_breaks_down_leaves_the_others_alone(whole, swept, broken):
    given = list(many_lanes.lanes())
    given[broken] = many_lanes.with_numbers(given[broken], optimizers.SGD, learning_rate=1e30)
    result = swept(given)
    assert result.metrics["finite"][broken].tolist() == [True, False, False, False]
    assert np.isnan(result.states.base["dense1"]["kernel"][broken]).any()
    for number in set(range(7)) - {broken}:
        assert_same(lane_of(result, number), whole[number], given[number].name)


def test_one_compilation_for_a_grid(grid):
    some, result, _, log = grid
    programs = re.findall(r"Finished XLA compilation of jit\((\w+)\)", log)
    assert programs.count("chunk") == programs.count("init") == 1
    assert len(programs) < 20  # the others stack and slice inputs, no more of them for more lanes
    assert result.metrics["round"].tolist() == [[1, 2, 3, 4]] * 60
    assert len(np.unique(result.metrics["strength"], axis=0)) > 30
    for number in (0, 16, 59):  # of several batches and tables
        single = many_lanes.alone(some[number])
        assert_same(lane_of(result, number), single, some[number].name, **CLOSE)


def test_what_a_program_says_of_itself(compiled, grid, on):
    """What it records; and memory: at least that of arguments and results, in which the donated
    states count once, and temporaries."""
    seeds, data, experiments = inputs(on)
    states = compiled.init(seeds, data, experiments)
    numbers = jax.tree.map(lambda leaf: leaf[:4, :CHUNK], grid[1].metrics)
    arrays = jax.tree.leaves((seeds, states, data, experiments, numbers))
    recorded = {name: (leaf.shape, leaf.dtype) for name, leaf in compiled.numbers.items()}
    assert recorded == {name: (leaf.shape, leaf.dtype) for name, leaf in numbers.items()}
    known = sum(np.asarray(leaf).nbytes for leaf in arrays)
    assert known < compiled.bytes_a_device < 10 * known


def on_devices(which: str, file: Path, number: int = 4, **more: str) -> Any:
    """(states, numbers) of `devices.py` by name, with more in its environment."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(number), "PYTHONPATH": path}
    found = subprocess.run(
        [sys.executable, here / "devices.py", which, file],
        env={**os.environ, **own, **more},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    return dict(np.load(file))


def test_lanes_over_two_devices_and_clients_over_two(alone, tmp_path):
    """Three clients over two devices: two partial sums."""
    found = on_devices("square", tmp_path / "results.npz")
    wanted = many_lanes.by_name(jax.tree.map(lambda *each: np.stack(each), *alone))
    assert_same(found, wanted, **CLOSE)


@pytest.mark.slow
def test_as_xla_compiles_by_default_a_lane_is_its_single_run(tmp_path):
    """On one device, and over four."""
    wanted, one, four = (on_devices(which, tmp_path / "results.npz", number, **USERS)
                         for which, number in (("alone", 1), ("one", 1), ("lanes", 4)))  # fmt: skip
    assert_same(one, wanted, **CLOSE)
    assert_same(four, wanted, **CLOSE)


def test_a_model_of_two_functions_has_lanes_too(on):
    """(init, apply), of which a program knows no layer."""
    some = [fed.TINY, fed.experiment(learning_rate=0.25)]
    roots, data, kept = jnp.stack([keys.root(1), keys.root(2)]), fed.federation(), Protocol()
    result = sweep.run(some, roots, [data, data], rounds=2, measure=kept, on=on)
    simulation = jax.jit(simulate.chunk_of_rounds(2, kept))
    for number, experiment in enumerate(some):
        state = simulate.begin(roots[number], experiment, data, kept)
        single = simulation(roots[number], state, data, experiment, jnp.int32(2))
        assert_same(lane_of(result, number), jax.tree.map(np.asarray, single), **CLOSE)


def test_lanes_side_by_side_share_the_images_of_a_forward_pass(on):
    """Of 34 test images, 32 each where there are two lanes, and not all 34 twice."""
    experiment = many_lanes.experiment()
    experiment = experiment.replace(strategy=experiment.strategy.replace(eval_batch=34))
    data = layout.stack([many_lanes.data()] * 2)
    numbers = parts.lanes([experiment] * 2)
    text = str(sweep.trace(numbers, data, 2, 1, on, MEASURE, side_by_side=2).chunk.jaxpr)
    assert "f32[2,32,6,6,1]" in text or "f32[32,6,6,1]" in text
    assert "f32[34,6,6,1]" not in text
