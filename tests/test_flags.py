"""Flags: every field of every part by name and path, classes, presets, one-line refusals."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import noisefl
from experiments.flags import fields
from experiments.sweep import options
from experiments.sweep.options import Setup, catalogue, preset_of
from noisefl import calibrate, measure, models, noise, owner, parts, presets, schemes, server
from noisefl.models import MODELS

KNOWN = catalogue(preset_of("quickstart"))
CLASSES = [name for name, flag in KNOWN.items() if flag.kinds]
OF_PARTS = [name for name, flag in KNOWN.items() if flag.path[0] not in parts.specs(options.Driver)]


def parse(*args: str) -> options.CommandLine:
    parsed = options.parse(["run", *args])
    assert parsed is not None
    return parsed


def setup(*args: str) -> Setup:
    return parse(*args).setup({})


def refusal(*args: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        parse(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(a: Any, b: Any) -> bool:
    """Of one structure, with the same numbers."""
    equal = jax.tree.map(lambda x, y: np.array_equal(x, y) and x.dtype == y.dtype, a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(equal))


def held(found: Setup, name: str) -> list[Any]:
    """What the parts of a run hold in the field of this flag."""
    roots = (found.experiment, ()), (found.deal, ("data",)), (found.measures, ("measure",))
    return [
        place.value
        for root, path in roots
        for place in parts.walk(root, path)
        if place.path == KNOWN[name].path and place.name != "inner"
    ]


def another(name: str) -> Any:
    """An allowed value that neither is the default of any class nor that of the preset."""
    flag = KNOWN[name]
    special = {
        "server_clients": "3m", "noise_layers": "conv2", "strength_max": 60.0,
        "attacks": "scratch+bare_copy", "coalitions": "2+3",
    }  # fmt: skip
    if name in special:
        return special[name]
    if flag.kinds:
        return next(n for n, cls in reversed(flag.classes.items()) if not fields.is_wrapper(cls))
    if flag.spec.choices:
        return flag.spec.choices[-1]
    if flag.spec.kind == "switch":
        return False
    return 7 if flag.whole else 1.5 if flag.spec.low == 1 else 0.125


def having(name: str) -> list[str]:
    """Flags that choose the parts which have this one."""
    chosen, path = [], KNOWN[name].path
    for end in range(1, len(path)):
        above = next((f for f in KNOWN.values() if f.kinds and f.path == path[:end]), None)
        if above is None:
            continue
        below = next(flag for flag in KNOWN.values() if flag.path[: end + 1] == path[: end + 1])
        owners = below.owners if end + 1 < len(path) else KNOWN[name].owners
        standing = [n for n, cls in above.classes.items() if cls in owners]
        if standing:
            chosen += [f"--{above.name}={standing[0]}", *judged(standing[0])]
    return chosen


def judged(choice: str) -> list[str]:
    """Flags of a calibrator that can judge this scheme, if the preset's cannot."""
    cls = KNOWN["scheme"].classes.get(choice)
    return ["--calibrator=additive"] if getattr(cls, "moves", "") == "discrete" else []


# Every field has a flag


@pytest.mark.parametrize("name", OF_PARTS)
def test_every_field_can_be_set_by_name_and_by_path(name):
    value = another(name)
    for flag in (name, ".".join(KNOWN[name].path)):
        parsed = parse(*having(name), f"--{flag}={fields.shown(value)}").setup({})
        described = parsed.flags[name].split("+")[-1] if KNOWN[name].kinds else parsed.flags[name]
        assert described == value
        if KNOWN[name].path[-2:-1] != ("numbers",) and not KNOWN[name].kinds:
            (holds,) = held(parsed, name)
            assert holds == (np.float32(value) if isinstance(value, float) else value)


def test_all_fields_of_all_parts_are_there():
    """Counted the other way round: from the classes."""
    bases = (schemes.Scheme, calibrate.Calibrator, owner.Owner, noise.Distribution)
    every = (cls for base in bases for cls in parts.implementations(base))
    for cls in (cls for cls in every if cls.__module__.startswith("noisefl.")):
        for name, spec in parts.specs(cls).items():
            if spec.kind in fields.VALUES:
                assert any(cls in f.owners and f.path[-1] == name for f in KNOWN.values()), name
    assert {"num_clients", "local_test_size", "seed", "conv", "accuracy_on"} <= set(KNOWN)


def test_names_are_short_where_they_are_unique():
    assert KNOWN["cap"].path == ("scheme", "calibrator", "cap")
    assert KNOWN["num_clients"].path == ("data", "num_clients")
    last = [flag.path[-1] for flag in KNOWN.values()]
    for name, flag in KNOWN.items():
        if last.count(flag.path[-1]) == 1:
            assert name == flag.path[-1]
        assert name in (flag.path[-1], ".".join(flag.path))


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_a_kind_can_be_chosen(name):
    flag = KNOWN[name]
    assert len(flag.choices) > 1 or flag.spec.optional
    for choice in flag.choices:
        if (name, choice) in (("scheme", "until_cap"), ("scheme", "skip_infeasible")):
            continue  # around the pair that is there, below
        found = setup(*having(name), f"--{name}={choice}", *judged(choice)).flags[name]
        assert choice in found.split("+")


def test_what_hands_out_no_model_goes_inside_no_wrapper():
    """FedAvg cannot go before a scheme whose clients train nothing."""
    assert setup("--scheme=bare").flags["scheme"] == "warmup+bare"
    found = setup("--scheme=statistics", "--ridge=0.5")
    assert (found.flags["scheme"], found.flags["ridge"]) == ("statistics", 0.5)
    assert isinstance(found.experiment.scheme, schemes.Statistics)
    assert not {"warmup_rounds", "cap", "calibrator"} & set(found.flags)
    assert "scheme='statistics'" in refusal("--scheme=warmup+statistics")
    for name in ("quantised", "sub_model"):
        said = refusal(f"--scheme={name}")
        assert "calibrator='predictive'" in said
        assert name in said


def test_thieves_are_there_unless_they_are_sent_away():
    assert isinstance(setup().measures.thieves, measure.Thieves)  # pyright: ignore
    assert setup("--thieves=none").measures.thieves is None  # pyright: ignore
    assert not {"attacks", "coalitions"} & set(setup("--thieves=none").flags)
    assert "attacks='scratsch'" in refusal("--attacks=scratsch")
    assert "did you mean scratch?" in refusal("--attacks=bare_copy+scratsch")
    assert "coalitions='1'" in refusal("--coalitions=1")
    until = {str(j): setup(f"--kept_copies={j}", "--rounds=7") for j in (1, 3)}
    kept = {j: one.measures.thieves for j, one in until.items()}  # pyright: ignore
    assert (kept["1"].until, kept["3"].until) == (None, 7)  # the last round


@pytest.mark.parametrize("name", ["literal", "mcmahan", "own_classes", "quickstart", "two_way"])
def test_without_flags_a_preset_is_what_its_function_returns(name):
    assert same(setup(f"--flagfile={name}").experiment, getattr(presets, name)())
    assert same(setup(f"--preset={name}").experiment, getattr(presets, name)())


@pytest.mark.parametrize("name", ["quickstart", "literal"])
def test_what_is_described_can_be_given(name):
    """All values of a run as flags are the run."""
    flags = setup(f"--flagfile={name}").flags
    given = [f"--{flag}={fields.shown(value)}" for flag, value in flags.items() if flag in KNOWN]
    assert len(given) > 30
    assert setup(f"--flagfile={name}", *given).flags == flags
    assert setup(*given).flags == flags  # from another experiment
    assert json.loads(json.dumps(flags)) == flags
    assert not {"cohort", "local", "strategy", "on"} & set(flags)  # each can be one class alone


def test_only_what_is_given_changes():
    before, after = setup().flags, setup("--cap=0.5", "--batch_size=20", "--seed=3").flags
    changed = {name: after[name] for name in after if after[name] != before[name]}
    assert changed == {"cap": 0.5, "batch_size": 20, "seed": 3}
    assert set(after) == set(before)


def test_values_are_checked_together_however_they_come():
    found = setup("--strength=60", "--strength_max=70", "--cap=0.01", "--cap_margin=0.005").flags
    assert (found["strength"], found["strength_max"]) == (60.0, 70.0)
    assert refusal("--strength=60").startswith("strength=60.0: must be at most strength_max")


def test_numbers_are_described_by_their_shortest_decimal():
    found = setup("--cap=0.30000001192092896", "--max_tries=12")
    assert (found.flags["cap"], found.flags["max_tries"]) == (0.3, 12)
    assert [one.dtype for one in held(found, "cap")] == [np.float32]


@pytest.mark.parametrize(
    ("flag", "word", "value"),
    [
        *(("momentum", "none", None), ("momentum", "0", 0.0), ("clip_norm", "2", 2.0)),
        *(("eval_batch", "auto", None), ("eval_batch", "none", None), ("eval_batch", "9", 9)),
    ],
)
def test_optional_values(flag, word, value):
    assert setup(f"--{flag}={word}").flags[flag] == value


@pytest.mark.parametrize("text", ["0", "7", "m", "m/2", "4m", "3m/2"])
def test_server_clients_may_be_given_in_m(text):
    assert held(setup(f"--server_clients={text}"), "server_clients") == [text]


# Classes


def test_another_class_keeps_what_was_set_and_has_its_own_defaults_elsewhere():
    (rule,) = held(setup("--cap=0.4", "--calibrator=sequential"), "calibrator")
    assert isinstance(rule, calibrate.Sequential)
    assert (rule.cap, rule.step) == (np.float32(0.4), np.float32(1.1))  # predictive's is 1.07
    of_literal = setup("--flagfile=literal", "--calibrator=geometric")
    assert held(of_literal, "strength") == [1]  # additive's, 0, would be refused
    same_class = setup("--calibrator=predictive", "--scheme=noised").experiment
    assert same(same_class, presets.quickstart())


def test_what_a_preset_set_is_kept_by_another_class(own):
    start = ["--preset", f"{own}:experiment"]
    assert setup(*start).flags["strength"] == 3.0
    for name in ("geometric", "additive", "cautious"):
        assert setup(*start, f"--calibrator={name}").flags["strength"] == 3.0
    softer = setup(*start, "--scheme=softer").flags
    assert (softer["scheme"], softer["calibrator"]) == ("warmup+softer", "predictive")
    assert (softer["noise_layers"], softer["noise_scale"]) == ("last", "relative")
    made = setup(*start, "--server=optax", "--server.numbers.b1=0.5").experiment.server
    assert isinstance(made, server.Optax)
    assert made.factory(0.1) == "of mine"  # and not optax's function of that name


def test_a_part_is_changed_where_it_is_wrapped():
    on = setup("--scheme=bare").experiment.scheme
    assert isinstance(on, schemes.Warmup)
    assert isinstance(on.inner, schemes.Bare)
    assert isinstance(setup("--owner=server_clients").experiment.owner, owner.ServerClients)


@pytest.mark.parametrize(
    ("flag", "chain"),
    [
        ("--owner=keep_best", "keep_best+server_clients"),
        ("--owner=feeds_back+keep_best", "feeds_back+keep_best+server_clients"),
        ("--owner=feeds_back+server_clients", "feeds_back+server_clients"),
        ("--scheme=warmup", "warmup+noised"),  # it is there
        ("--scheme=skip_infeasible", "skip_infeasible+warmup+noised"),
        ("--scheme=until_cap+warmup", "until_cap+warmup+noised"),
        ("--scheme=until_cap+noised", "until_cap+noised"),  # all that is wanted
        ("--scheme=noised", "warmup+noised"),
        ("--noise_distribution=laplace", "laplace"),
    ],
)
def test_wrappers_go_around_what_is_there(flag, chain):
    name = flag.removeprefix("--").partition("=")[0]
    found = setup(flag, *(["--warmup_rounds=4"] if "warmup" in chain else []))
    assert found.flags[name] == chain
    assert found.flags["calibrator"] == "predictive"
    assert found.flags["noise_scale"] == "relative"
    if "warmup" in chain:
        assert found.flags["warmup_rounds"] == 4
    else:
        assert ("warmup_rounds" in found.flags) == (name != "scheme")


def test_the_model_is_the_presets_or_one_by_name():
    assert setup("--flagfile=mcmahan").flags["model"] == "mcmahan"
    for name, cls in MODELS.items():
        found = setup(f"--model={name}")
        assert found.flags["model"] == name
        assert isinstance(found.experiment.model, cls)


def test_models_of_other_fields_are_other_models():
    small, large = models.LeNet5(num_classes=3), models.LeNet5(num_classes=4)
    assert fields.plain(models.LeNet5()) == "lenet5"
    assert len({fields.plain(small), fields.plain(large), fields.plain(models.LeNet5())}) == 3


# Presets and flag files

OWN = """
from noisefl import calibrate, measure, presets, schemes, server
from noisefl.parts import Number, changed, number, part

@part
class Cautious(calibrate.Additive):
    caution_of_mine: Number = number(0.5, "how much more than it takes", low=0)

@part
class Softer(schemes.Noised):
    pass

MEASURE = measure.Standard(more=(measure.Protocol(),))

def experiment():
    mine = server.Optax(adam, {"learning_rate": 0.01, "b1": 0.9})
    return changed(presets.quickstart(), calibrate.Search, strength=3.0).replace(server=mine)

def adam(learning_rate):
    return "of mine"

def nothing():
    return 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of one's own that the command line names."""
    (tmp_path / "flags_of_mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "flags_of_mine"
    sys.modules.pop("flags_of_mine", None)


def test_parts_presets_and_measures_of_ones_own(own):
    preset = f"--preset={own}:experiment"
    found = parse(preset, "--calibrator=cautious", "--caution_of_mine=2", "--server.numbers.b1=0.8")
    assert (found.preset, found.out) == (own, f"results/{own}")
    made = found.setup({})
    assert made.flags["caution_of_mine"] == 2.0
    assert made.flags["calibrator"] == "cautious"
    assert (made.flags["server.numbers.b1"], made.flags["server.factory"]) == (0.8, "adam")
    assert isinstance(made.experiment.server, server.Optax)
    assert made.experiment.server.numbers["b1"] == np.float32(0.8)
    assert isinstance(made.measures, measure.Standard)
    assert made.flags["measure.more"] == [fields.plain(measure.Protocol())]
    assert parse("--preset", f"{own}:experiment", "--caution_of_mine=1", "--calibrator=cautious")
    assert "server.numbers.b1='inf': must be" in refusal(preset, "--server.numbers.b1=inf")
    assert "server.numbers.b1=1e+39: must be" in refusal(preset, "--server.numbers.b1=1e39")
    assert "must have a function nothing" in refusal(f"--preset={own}:nothing")
    assert "must have a function gone" in refusal(f"--preset={own}:gone")


def test_the_flag_files_are_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # found from anywhere
    assert options.file_names() == ["literal", "mcmahan", "own_classes", "quickstart", "two_way"]
    for name in options.file_names():
        found = parse(f"--flagfile={name}")
        assert (found.preset, found.driver.out) == (name, str(Path("results") / name))
        assert found.driver.preset == name
        assert (options.FILES / f"{name}.flags").read_text().startswith("#")  # says why
    literal = setup("--flagfile=literal.flags")
    assert same(literal.experiment, noisefl.Experiment())
    assert (literal.driver.rounds, literal.deal.partition) == (30, "iid")
    assert setup("--flagfile=mcmahan").flags["local_epochs"] == 5
    assert parse("--flagfile=mcmahan").driver.rounds == 100
    assert setup().flags == setup("--flagfile=quickstart").flags


def test_flags_override_a_file_wherever_they_stand(tmp_path):
    own = tmp_path / "own.flags"
    own.write_text("# mine\n\n--rounds=7 --cap=0.5\n--noise_layers='conv.* x'\n")
    for args in (["--rounds=3", f"--flagfile={own}"], ["--flagfile", str(own), "--rounds=3"]):
        found = parse(*args)
        assert (found.driver.rounds, found.out) == (3, str(Path("results") / "own"))
        assert found.setup({}).flags["noise_layers"] == "conv.* x"
        assert found.setup({}).flags["cap"] == 0.5
    own.write_text("--noise_layers='conv\n")
    assert refusal(f"--flagfile={own}").startswith(f"flagfile='{own}': cannot be read")
    own.write_text(f"--cap=0.5\n--flagfile={own}\n")
    assert refusal(f"--flagfile={own}").startswith(f"flagfile='{own}': must not name another")


def test_where_the_results_go():
    assert parse("--grid=cap=0.3").out == str(Path("results") / "quickstart-sweep")
    assert parse("--preset=literal").out == str(Path("results") / "literal")
    assert parse("--flagfile=mcmahan", "--preset=literal").out == str(Path("results") / "mcmahan")
    assert parse("--out=there", "--grid=cap=0.3").out == "there"


# The driver's own


def test_the_drivers_own_flags():
    for args, wanted in (([], True), (["--nobaseline"], False), (["--baseline"], True)):
        assert parse(*args).driver.baseline is wanted
    found = parse("--distributed", "--coordinator=here:1", "--num_processes=2", "--process_id=0")
    assert (found.driver.num_processes, found.driver.process_id) == (2, 0)
    assert parse("--lanes_at_once=auto").driver.lanes_at_once is None
    assert parse("--lanes_at_once=3").driver.lanes_at_once == 3
    assert parse().single
    assert not parse("--grid=seed=0").single


@pytest.mark.parametrize(("args", "devices"), [([], min(os.cpu_count() or 1, 8)),
                                               (["--cpu_devices=3"], 3)])  # fmt: skip
def test_a_cpu_is_split_into_its_cores(monkeypatch, args, devices):
    asked = {}
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    parse(*args).driver.start_devices()
    assert asked == {"jax_num_cpu_devices": devices}


# Refusals


# A path that the file system refuses is one that is not there, since Python 3.14.
TOO_LONG = "or a file" if sys.version_info >= (3, 14) else "cannot be read"


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--flagfile=mcmahon"], ["flagfile='mcmahon'", "did you mean mcmahan?"]),
        (["--preset=literl"], ["preset='literl'", "did you mean literal?", "module:function"]),
        (["--preset=no.such:thing"], ["preset='no.such:thing'", "cannot be imported"]),
        (["--preset=..a:x"], ["preset='..a:x'", "cannot be imported (TypeError"]),
        (["--preset=noisefl:fedavg"], ["preset='noisefl:fedavg'", "fedavg fails (TypeError"]),
        (["--flagfile=~no_such_user/own"], ["flagfile='~no_such_user/own'", "cannot be read"]),
        ([f"--flagfile={'a' * 300}"], ["flagfile='aaa", TOO_LONG]),
        (["--lerning_rate=1"], ["--lerning_rate", "did you mean --learning_rate?"]),
        (["--cpu_devicez=1"], ["did you mean --cpu_devices?"]),
        (["--scheme.calibrator.capp=1"], ["did you mean --scheme.calibrator.cap?"]),
        (["--numbers.learning_rate=1"], ["spell it out: --local.optimizer.numbers.learning_rate"]),
        (["--rounds=many"], ["rounds='many'", "a whole number"]),
        (["--rounds=0"], ["rounds=0", "at least 1"]),
        (["--rounds=9999999999"], ["rounds='9999999999'", "less than 2147483648"]),
        (["--seed=-1"], ["seed=-1", "at least 0"]),
        (["--stratified=3"], ["stratified='3'", "true or false"]),
        (["--cap"], ["--cap"]),
        (["results"], ["'results'", "flags begin with --"]),
        (["--partition=shard"], ["partition='shard'", "did you mean shards?"]),
        (["--model=lenet"], ["model='lenet'", "did you mean lenet5?"]),
        (["--calibrator=aditive"], ["calibrator='aditive'", "did you mean additive?"]),
        (["--scheme=warmup+noise"], ["scheme='warmup+noise'", "did you mean noised?"]),
        (["--scheme=noised+warmup"], ["scheme='noised+warmup'", "noised goes around nothing"]),
        (["--scheme=skip_infeasible", "--calibrator=snr"], ["skip every round"]),
        (["--scheme=until_cap+bare"], ["has no cap"]),
        (["--server_clients=2k"], ["server_clients='2k'", "m/2"]),
        (["--cap=0"], ["cap=0.0", "greater than 0 and less than 1"]),
        (["--cap=1e-50"], ["cap=1e-50", "greater than 0"]),
        (["--cap_margin=0.7"], ["cap_margin=0.7: must be less than cap"]),
        (["--learning_rate=nan"], ["learning_rate='nan'", "a finite number"]),
        (["--momentum=x"], ["momentum='x'", "or none: plain SGD"]),
        (["--max_tries=1.5"], ["max_tries='1.5'", "a whole number"]),
        (["--conv=winograd", "--precision=bfloat16"], ["winograd"]),
        (["--lanes_at_once=0"], ["lanes_at_once=0", "at least 1"]),
        (["--lanes_at_once=all"], ["lanes_at_once='all'", "a whole number, or none: what fits"]),
        (["--cpu_devices=9999"], ["cpu_devices=9999", "at most 1024"]),
        (["--client_devices=0"], ["client_devices=0", "at least 1"]),
        (["--num_processes=2"], ["num_processes=2: needs --distributed"]),
        (["--process_id=0"], ["process_id=0: needs --distributed"]),
        (["--coordinator=here:1"], ["coordinator='here:1': needs --distributed"]),
        (["--strength_factor=2"], ["strength_factor=2.0", "of geometric, parallel alone"]),
        (["--grid=strength_factor=2,3"], ["grid='strength_factor=2.0,3.0'", "geometric, parallel"]),
        (["--scheme=bare", "--cap=0.5"], ["cap=0.5: is of "]),
        (["--grid=capp=0.3,0.5"], ["grid='capp=0.3,0.5'", "did you mean cap?"]),
        (["--grid=cap=0.3", "--grid=cap=0.4"], ["grid='cap=0.4'", "has an axis already"]),
        (["--grid=cap=0.3,2"], ["cap=2.0", "less than 1"]),
    ],
)
def test_bad_input_is_one_line(args, wanted):
    said = refusal(*args)
    for words in wanted:
        assert words in said


def test_a_flag_of_one_combination_is_enough():
    args = ["--grid=calibrator=additive,geometric", "--strength_factor=2"]
    additive, geometric = (setup for _, setup in parse(*args).setups())
    assert "strength_factor" not in additive.flags
    assert geometric.flags["strength_factor"] == 2.0
