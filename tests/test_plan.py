"""From a grid to runs, their folders, their FedAvg runs, groups and batches. Nothing is run."""

import json
import re
from typing import Any

import pytest

from experiments import helppage, options
from experiments.grid import WHOLE_SWEEP, parse_grid
from experiments.plan import Run, batch_name, batches, groups, plan
from noisefl import Config
from noisefl.config import CHOICES, NEVER

GIVEN = {**options.defaults(), "out": "here"}


def runs_of(*grid: str, baseline: bool = True, **changes: Any) -> list[Run]:
    return plan({**GIVEN, **changes}, parse_grid(grid), baseline)


def noise(*grid: str, **changes: Any) -> list[Run]:
    return runs_of(*grid, baseline=False, **changes)


def digest(run: Run) -> str:
    """Of its path, which says nothing else but the seed."""
    match = re.fullmatch(r"runs/([0-9a-f]{12})/seed=(\d+)", run.path)
    assert match is not None
    assert int(match[2]) == run.flags["seed"]
    return match[1]


def only(**changes: Any) -> Run:
    (run,) = noise(**changes)
    return run


# Values that are allowed beside the defaults, each another result.
OTHERS: dict[str, Any] = {
    "strength": 0.5,
    "strength_factor": 2.0,
    "momentum": 0.5,
    "clip_norm": 2.0,
    "learning_rate_decay": 0.5,
    "dataset": "fashion_mnist",
    "model": "mlp",
    "noise_layers": "last",
    "server_clients": "3",
    "clients_at_once": "3",
    "eval_batch": "7",
    "redraw": "rescale",
    "keep_best": True,
    "cap_margin": 0.25,
    "partition": "shards",
}
RESULTS = sorted(
    set(GIVEN) - {"seed", "out", "resume", "rounds_per_chunk", "checkpoint_every"}
    - {"compilation_cache", "data_dir"}
)  # fmt: skip


def other(name: str) -> Any:
    if name in OTHERS:
        return OTHERS[name]
    if name in helppage._CHOICES:
        choices = [value for value in helppage._CHOICES[name] if value != GIVEN[name]]
        return choices[0]
    return GIVEN[name] + 1 if isinstance(GIVEN[name], int) else GIVEN[name] / 2


# Folders


@pytest.mark.parametrize("name", RESULTS)
def test_what_a_result_depends_on_is_in_the_digest(name):
    strong = {"strength": 0.25}  # which some calibrators need
    assert digest(only(**{**strong, name: other(name)})) != digest(only(**strong))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 5},
        {"out": "there"},
        {"data_dir": "/elsewhere"},
        {"rounds_per_chunk": 7},
        {"checkpoint_every": 1},
        {"compilation_cache": "off"},
        {"resume": True},
        {"server_clients": "5"},  # m/2 of m = 10
        {"eval_batch": "auto"},
    ],
)
def test_what_no_result_depends_on_is_not(changes):
    assert digest(only(**changes)) == digest(only())
    assert only(**changes).flags["seed"] == changes.get("seed", 0)


def test_the_same_configuration_has_one_folder_however_it_is_given():
    """In the grid or outside, axes in either order, another spelling, among other values."""
    wanted = [only(cap=cap, learning_rate=0.5).path for cap in (0.4, 0.5)]
    assert len(set(wanted)) == 2
    turned = {name: GIVEN[name] for name in reversed(GIVEN)}
    for runs in (
        noise("cap=0.4,0.5", learning_rate=0.5),
        noise("cap=.4,5e-1", "learning_rate=0.50"),
        noise("learning_rate=0.5,0.1", "cap=0.4,0.5")[:2],
        plan({**turned, "learning_rate": 0.5}, parse_grid(["cap=0.4,0.5"]), False),
    ):
        assert [run.path for run in runs] == wanted


def test_seeds_of_one_configuration_lie_side_by_side():
    runs = noise("seed=3:6")
    assert [run.path.rpartition("/")[2] for run in runs] == ["seed=3", "seed=4", "seed=5"]
    assert len({digest(run) for run in runs}) == 1


def test_the_last_axis_varies_fastest_and_every_run_knows_its_place():
    runs = noise("cap=0.4,0.5", "seed=0:2")
    assert [run.grid for run in runs] == [
        {"cap": cap, "seed": seed} for cap in (0.4, 0.5) for seed in (0, 1)
    ]
    for run in runs:
        assert run.kind == "noise"
        assert run.baseline is None
        assert run.options.hyper.cap == pytest.approx(run.grid["cap"])
        assert run.options.driver.seed == run.options.federation["seed"] == run.grid["seed"]
        assert json.loads(json.dumps(run.flags)) == run.flags
        assert set(run.flags) == set(options.defaults())


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("server_clients=m/2,5,2", "grid='server_clients=5, seed=0': is the same run as "),
        (
            "eval_batch=7,07",
            "grid='eval_batch=07, seed=0': is the same run as eval_batch=7, seed=0",
        ),
    ],
)
def test_two_spellings_of_one_run_are_refused(axis, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        noise(axis, "seed=0:2")


# FedAvg

NOISE = sorted({*helppage.GROUPS["Noise"], *helppage.GROUPS["Calibration"]})
SERVER = sorted(helppage.GROUPS["Server"])
SHARED = [*NOISE, *SERVER]


@pytest.mark.parametrize("name", SHARED)
def test_runs_that_differ_in_the_noise_alone_share_fedavg(name):
    (one,) = noise_of(strength=0.25)
    (two,) = noise_of(**{"strength": 0.25, name: other(name)})
    assert one.path != two.path
    assert one.baseline == two.baseline


def noise_of(*grid: str, **changes: Any) -> list[Run]:
    return [run for run in runs_of(*grid, **changes) if run.kind == "noise"]


@pytest.mark.parametrize("name", [name for name in RESULTS if name not in SHARED] + ["seed"])
def test_runs_that_differ_elsewhere_do_not(name):
    (one,), (two,) = noise_of(), noise_of(**{name: 1 if name == "seed" else other(name)})
    assert one.baseline != two.baseline


def test_the_groups_of_flags_are_what_they_were():
    """A flag that moves to one of them would be taken for one that FedAvg does not depend on."""
    training = {field for field in vars(Config()) if field not in SHARED} - {"clipping"}
    assert training == {
        *("image_shape", "num_clients", "client_fraction", "group_sizes", "local_epochs"),
        *("batch_size", "batch_order", "momentum", "clients_at_once", "gather"),
        *("local_test_size", "eval_batch"),
    }
    assert not set(SHARED) & set(WHOLE_SWEEP)


def test_fedavg_runs_once_and_before_those_that_need_it():
    runs = runs_of("cap=0.4,0.5", "calibrator=additive,fixed", "momentum=0,0.5", "seed=0:2")
    assert len(runs) == 16 + 4
    fedavg = {run.path: place for place, run in enumerate(runs) if run.kind == "fedavg"}
    assert len(fedavg) == 4
    for place, run in enumerate(runs):
        if run.kind == "noise":
            assert run.baseline is not None
            assert fedavg[run.baseline] < place
            paired = runs[fedavg[run.baseline]]
            same = ("seed", "momentum", "learning_rate", "partition", "validation_size")
            assert [paired.flags[n] for n in same] == [run.flags[n] for n in same]
            assert paired.grid == {n: run.grid[n] for n in ("momentum", "seed")}
            assert (paired.baseline, paired.hyper.warmup_rounds) == (None, NEVER)
            assert not set(paired.flags) & set(SHARED)
            assert run.hyper.warmup_rounds == 1


def test_fedavg_and_noise_are_never_one_folder():
    runs = runs_of("cap=0.4,0.5")
    assert len({digest(run) for run in runs}) == 3


# Groups and batches


@pytest.mark.parametrize(
    "axis",
    [
        *("cap=0.4,0.5", "learning_rate=0.1,1", "seed=0:3", "partition=iid,shards,lognormal"),
        *("dirichlet_alpha=0.1,1", "strength=0.1,0.2", "max_tries=1,9", "warmup_rounds=0,5"),
        *("size_sigma=1,2", "momentum=0.5,0.9", "clip_norm=1,2", "error_rate=0.1,0.2"),
        "learning_rate_decay=0.5,1",
    ],
)
def test_numbers_seeds_and_partitions_share_a_program(axis):
    runs = runs_of(axis)
    (group,) = groups(runs)
    assert list(group.runs) == runs


@pytest.mark.parametrize(
    "axis",
    [
        *("calibrator=additive,fixed", "momentum=0,0.5", "clip_norm=0,1", "num_clients=50,100"),
        *("client_fraction=0.1,0.2", "batch_size=5,10", "local_epochs=1,2", "model=mlp,lenet5"),
        *("noise_layers=first,last", "noise_scale=absolute,relative", "server_clients=0,1"),
        *("validation_size=100,200", "dataset=mnist,fashion_mnist", "eval_batch=auto,7"),
        *(f"conv={','.join(helppage._CHOICES['conv'][:2])}", "cancellation=pair,subtract"),
        f"warmup={','.join(CHOICES['warmup'])}",
    ],
)
def test_static_options_each_have_a_program(axis):
    runs = noise(axis, "seed=0:2")
    found = groups(runs)
    assert [group.runs for group in found] == [tuple(runs[:2]), tuple(runs[2:])]
    for group in found:
        for run in group.runs:
            assert (run.options.config, run.options.lowering) == (group.config, group.lowering)
            assert (run.options.driver.model, run.options.driver.dataset) == (
                group.model,
                group.dataset,
            )


def test_groups_are_called_by_what_tells_them_apart():
    runs = runs_of("num_clients=50,100", "cap=0.4,0.5", "calibrator=additive,fixed", "momentum=0")
    assert [group.title for group in groups(runs)] == [
        f"lenet5, mnist, {calibrator}, num_clients={clients}"
        for clients in (50, 100)
        for calibrator in ("additive", "fixed")
    ]
    assert [group.title for group in groups(runs_of("seed=0:3"))] == ["lenet5, mnist, additive"]


def test_every_run_is_in_one_group_and_one_batch():
    runs = runs_of("calibrator=additive,fixed", "cap=0.3,0.4,0.5", "seed=0:2")
    found = groups(runs)
    dealt = [run for group in found for some in batches(group.runs, 4) for run in some]
    assert sorted(run.path for run in dealt) == sorted(run.path for run in runs)
    assert [len(some) for some in batches(runs, 4)] == [4, 4, 4, 2]
    assert [run for some in batches(runs, 5) for run in some] == runs


def test_a_batch_is_named_by_its_runs_in_their_order():
    runs = noise("seed=0:4")
    names = [batch_name(runs), batch_name(runs[::-1]), batch_name(runs[:2]), batch_name(runs[2:])]
    assert len(set(names)) == 4
    assert batch_name(noise("seed=0:4")) == names[0]
    assert all(re.fullmatch("[0-9a-f]{12}", name) for name in names)


# Refusals


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("cap=0.5,2", "cap=2.0: must be in (0, 1)"),
        ("seed=0,-1", "seed=-1: must be 0 to 2147483647"),
        ("client_fraction=0.1,0.01", "client_fraction=0.01: samples 1 of num_clients=100"),
        ("max_tries=1,100000000000000000000", "max_tries"),
        ("seed=0,99999999999", "seed=99999999999"),
        ("server_clients=2k", "server_clients='2k'"),
        ("server_clients=1,99999999999m", "server_clients=999999999990: must be less than 2147"),
        ("num_clients=60,99999999999999999999", "num_clients=99999999999999999999: must be less"),
        ("eval_batch=1,9999999999", "eval_batch=9999999999: must be less than 2147483648"),
    ],
)
def test_a_combination_that_a_run_refuses_is_refused(grid, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        runs_of(grid)
    assert "\n" not in str(caught.value)
