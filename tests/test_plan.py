"""From a grid to runs, their folders, their FedAvg runs, groups and batches. Nothing is run."""

import json
import re
from typing import Any

import jax
import numpy as np
import pytest

from experiments.flags.fields import is_wrapper, shown
from experiments.sweep import options
from experiments.sweep.options import WHOLE_SWEEP, catalogue, preset_of
from experiments.sweep.plan import PROTECTION, Run, batch_name, batches, groups, plan
from noisefl import presets, schemes

KNOWN = catalogue(preset_of("literal"))


def runs_of(*args: str) -> list[Run]:
    """Of the literal reading; `cap=0.4,0.5` is an axis, the rest are flags."""
    grid = [f"--grid={arg}" if arg[:2] != "--" else arg for arg in args]
    command = options.parse(["run", "--flagfile=literal", *grid])
    assert command is not None
    return plan(command)


def noise(*args: str) -> list[Run]:
    return runs_of("--nobaseline", *args)


def only(**changes: Any) -> Run:
    seed = changes.pop("seed", 0)
    given = [f"--{name}={shown(value)}" for name, value in changes.items()]
    (run,) = noise(f"seed={seed}", *given)
    return run


def digest(run: Run) -> str:
    """Of its path, which says nothing else but the seed."""
    match = re.fullmatch(r"runs/([0-9a-f]{12})/seed=(\d+)", run.path)
    assert match is not None
    assert int(match[2]) == run.flags["seed"] == run.seed
    return match[1]


def warmup(run: Run) -> int:
    """Its rounds."""
    assert isinstance(run.experiment.scheme, schemes.Warmup)
    return int(run.experiment.scheme.warmup_rounds)


# What the literal reading's run has, without what is the same for all runs of a sweep.
RESULTS = sorted(set(only().flags) & set(KNOWN) - set(WHOLE_SWEEP) - {"seed"})
SHARED = [name for name in RESULTS if KNOWN[name].path[0] in PROTECTION]


def other(name: str) -> str:
    """An allowed value that is not the literal reading's."""
    flag, now = KNOWN[name], only().flags[name]
    special = {"dataset": "fashion_mnist", "noise_layers": "last", "server_clients": "3"}
    special |= {"attacks": "bare_copy", "coalitions": "3"}
    if name in special:
        return special[name]
    if flag.kinds:
        plain = [n for n, cls in flag.classes.items() if not is_wrapper(cls)]
        wraps = [n for n, cls in flag.classes.items() if is_wrapper(cls)]
        return next((n for n in [*plain, *wraps] if n not in str(now).split("+")), "none")
    if flag.spec.choices:
        return next(one for one in flag.spec.choices if one not in (now, "preset"))
    return "7" if flag.whole else "1.5" if flag.spec.low >= 1 else "0.125"


# A single run


def test_a_single_run_is_fedavg_and_noise():
    command = options.parse(["run", "--cap=0.5"])
    assert command is not None
    fedavg, protected = plan(command)
    assert [run.path for run in (fedavg, protected)] == ["fedavg", "noise"]
    assert [run.kind for run in (fedavg, protected)] == ["fedavg", "noise"]
    assert (fedavg.cap, protected.cap) == (None, 0.5)
    assert (fedavg.baseline, protected.baseline) == (None, "fedavg")
    assert protected.entry == {
        **{"run": "noise", "seed": 0, "cap": 0.5, "grid": {}, "baseline": "fedavg"}
    }
    (group,) = groups([fedavg, protected])
    assert group.runs == (fedavg, protected)  # two lanes of one program
    assert [run.path for run in plan(options.parse(["run", "--nobaseline"]))] == ["noise"]  # pyright: ignore


# Folders


@pytest.mark.parametrize("name", RESULTS)
def test_what_a_result_depends_on_is_in_the_digest(name):
    assert digest(only(**{name: other(name)})) != digest(only())


@pytest.mark.parametrize(
    "changes",
    [
        *({"seed": 5}, {"out": "there"}, {"data_dir": "/elsewhere"}, {"rounds_per_chunk": 7}),
        *({"checkpoint_every": 1}, {"compilation_cache": "off"}, {"lanes_at_once": 3}),
        *({"client_devices": 2}, {"eval_batch": "auto"}, {"calibrator": "additive"}),
        *({"cap": 0.6}, {"model": "lenet5"}, {"scheme": "warmup+noised"}, {"dry_run": True}),
    ],
)
def test_what_no_result_depends_on_is_not(changes):
    assert digest(only(**changes)) == digest(only())
    assert only(**changes).flags["seed"] == changes.get("seed", 0)


def test_the_same_configuration_has_one_folder_however_it_is_given():
    """In the grid or outside, axes in either order, another spelling, among other values."""
    wanted = [only(cap=cap, learning_rate=0.5).path for cap in (0.4, 0.5)]
    assert len(set(wanted)) == 2
    for runs in (
        noise("cap=0.4,0.5", "--learning_rate=0.5"),
        noise("scheme.calibrator.cap=.4,5e-1", "local.optimizer.learning_rate=0.50"),
        noise("learning_rate=0.5,0.1", "cap=0.4,0.5")[:2],
        noise("--learning_rate=0.5", "--nostratified", "calibrator=additive,predictive",
              "cap=0.4,0.5")[:2],
    ):  # fmt: skip
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
        assert (run.kind, run.baseline) == ("noise", None)
        assert run.cap == run.grid["cap"]
        assert run.experiment.scheme.cap == np.float32(run.grid["cap"])
        assert run.setup.driver.seed == run.seed == run.grid["seed"]
        assert json.loads(json.dumps([run.flags, run.entry])) == [run.flags, run.entry]


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("owner=keep_best,keep_best+server_clients", "owner=keep_best, seed=0"),
        ("scheme=warmup,noised", "scheme=warmup, seed=0"),
    ],
)
def test_two_spellings_of_one_run_are_refused(axis, message):
    second = axis.split(",")[1]
    name = axis.split("=")[0]
    wanted = f"grid='{name}={second}, seed=0': is the same run as {message}: leave one out"
    with pytest.raises(ValueError, match=f"^{re.escape(wanted)}$"):
        noise(axis, "seed=0:2")


def test_an_axis_that_a_run_does_not_have_makes_no_runs():
    runs = runs_of("calibrator=additive,geometric", "strength_factor=1.5,2", "seed=0:2")
    assert [run.grid for run in runs if run.kind == "noise"] == [
        *({"calibrator": "additive", "seed": seed} for seed in (0, 1)),
        *({"calibrator": "geometric", "strength_factor": factor, "seed": seed}
          for factor in (1.5, 2.0) for seed in (0, 1)),
    ]  # fmt: skip
    assert sum(run.kind == "fedavg" for run in runs) == 2


# FedAvg


def noise_of(*args: str) -> Run:
    (run,) = (run for run in runs_of("seed=0", *args) if run.kind == "noise")
    return run


@pytest.mark.parametrize("name", SHARED)
def test_runs_that_differ_in_the_protection_alone_share_fedavg(name):
    one, two = noise_of(), noise_of(f"--{name}={other(name)}")
    assert one.path != two.path
    assert one.baseline == two.baseline


@pytest.mark.parametrize("name", [name for name in RESULTS if name not in SHARED] + ["seed"])
def test_runs_that_differ_elsewhere_do_not(name):
    one = noise_of()
    two = runs_of("seed=1")[1] if name == "seed" else noise_of(f"--{name}={other(name)}")
    assert one.baseline != two.baseline


def test_what_fedavg_depends_on_is_all_but_the_protection():
    assert {"cap", "calibrator", "scheme", "owner", "noise_layers", "accuracy_on"} <= set(SHARED)
    rest = {name for name in RESULTS if name not in SHARED}
    assert {"learning_rate", "partition", "model", "conv", "local_test_size", "groups"} <= rest
    assert {"average", "server", "server_learning_rate", "seed"} <= {
        *rest,
        *runs_of("seed=0")[0].flags,
    }


def test_fedavg_runs_once_and_before_those_that_need_it():
    runs = runs_of("cap=0.4,0.5", "calibrator=additive,bisection", "momentum=none,0.5", "seed=0:2")
    assert len(runs) == 16 + 4
    fedavg = {run.path: place for place, run in enumerate(runs) if run.kind == "fedavg"}
    assert len(fedavg) == 4
    for place, run in enumerate(runs):
        if run.kind == "noise":
            assert run.baseline is not None
            assert fedavg[run.baseline] < place
            paired = runs[fedavg[run.baseline]]
            same = ("seed", "momentum", "learning_rate", "partition", "validation_size", "model")
            assert [paired.flags[n] for n in same] == [run.flags[n] for n in same]
            assert paired.grid == {n: run.grid[n] for n in ("momentum", "seed")}
            assert paired.baseline is None
            assert warmup(paired) == schemes.NEVER
            assert not set(paired.flags) & set(SHARED)
            assert warmup(run) == 1


def test_fedavg_and_noise_are_never_one_folder():
    assert len({digest(run) for run in runs_of("cap=0.4,0.5")}) == 3


# Groups and batches


@pytest.mark.parametrize(
    "axis",
    [
        *("cap=0.4,0.5", "learning_rate=0.1,1", "seed=0:3", "partition=iid,shards,lognormal"),
        *("dirichlet_alpha=0.1,1", "strength=0.1,0.2", "max_tries=1,9", "warmup_rounds=0,5"),
        *("size_sigma=1,2", "momentum=0.5,0.9", "clip_norm=1,2", "learning_rate_decay=0.5,1"),
        "server_learning_rate=0.5,1",
    ],
)
def test_numbers_seeds_and_partitions_share_a_program(axis):
    runs = runs_of(axis)
    (group,) = groups(runs)
    assert list(group.runs) == runs


@pytest.mark.parametrize(
    "axis",
    [
        *("calibrator=additive,fixed", "momentum=none,0.5", "clip_norm=none,1", "owner=keep_best"),
        *("num_clients=50,100", "clients_per_round=10,20", "batch_size=5,10", "local_epochs=1,2"),
        *("model=mlp,lenet5", "noise_layers=first,last", "noise_scale=absolute,relative"),
        *("server_clients=0,1", "validation_size=100,200", "dataset=mnist,fashion_mnist"),
        *("eval_batch=auto,7", "conv=auto,lax", "cancellation=pair,subtract"),
        *("noise_distribution=gaussian,laplace", "scheme=until_cap+warmup", "local_test_size=5,6"),
    ],
)
def test_static_options_each_have_a_program(axis):
    if "," not in axis:  # against what the preset has
        runs = noise("seed=0:2") + noise(axis, "seed=0:2")
    else:
        runs = noise(axis, "seed=0:2")
    found = groups(runs)
    assert [group.runs for group in found] == [tuple(runs[:2]), tuple(runs[2:])]
    for group in found:
        assert len({jax.tree.structure(run.experiment) for run in group.runs}) == 1
        assert len({run.setup.driver.dataset for run in group.runs}) == 1


def test_groups_are_called_by_what_tells_them_apart():
    runs = runs_of("num_clients=50,100", "cap=0.4,0.5", "calibrator=additive,fixed", "momentum=0")
    assert [group.title for group in groups(runs)] == [
        f"lenet5, mnist, {calibrator}, num_clients={clients}"
        for clients in (50, 100)
        for calibrator in ("additive", "fixed")
    ]
    assert [group.title for group in groups(runs_of("seed=0:3"))] == ["lenet5, mnist, additive"]
    assert [group.title for group in groups(runs_of("seed=0:3", "--scheme=bare"))] == [
        "lenet5, mnist, warmup+bare"
    ]


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


def test_runs_that_differ_in_the_seed_alone_share_their_experiment():
    runs = runs_of("cap=0.4,0.5", "seed=0:1000")
    assert len(runs) == 3000
    assert len({id(run.setup.experiment) for run in runs}) == 2  # so that ten thousand fit
    assert len(groups(runs)) == 1


# Refusals


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("cap=0.5,2", "cap=2.0: must be a number, greater than 0 and less than 1"),
        ("seed=0,-1", "seed=-1: must be a whole number, at least 0"),
        ("cap_margin=0.1,0.7", "cap_margin=0.7: must be less than cap"),
        ("max_tries=1,100000000000000000000", "must be less than 2147483648"),
        ("server_clients=1,2k", "server_clients='2k'"),
        ("server_clients=1,99999999999m", "server_clients='99999999999m'"),
        ("model=mlp,lenet", "'lenet' must be one of"),
        ("rounds=3,4", "--rounds is one for the whole sweep"),
    ],
)
def test_a_combination_that_a_run_refuses_is_refused(grid, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        runs_of(grid)
    assert "\n" not in str(caught.value)


def test_presets_have_the_flags_that_fedavg_depends_on():
    """Nothing of the protection hides in what FedAvg is told by."""
    for name in ("quickstart", "literal", "mcmahan", "two_way", "own_classes"):
        run = runs_of("seed=0", f"--preset={name}")[0]
        assert run.kind == "fedavg"
        bare = getattr(presets, name)()
        assert jax.tree.structure(run.experiment) == jax.tree.structure(bare)
