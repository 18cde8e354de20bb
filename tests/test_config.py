"""`config`: what is refused, in which words, and what is derived."""

import dataclasses
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from noisefl import NEVER, Config, Hyper, check_hyper, fedavg
from noisefl.config import CHOICES, as_arrays, nearest


def refusal(function, *arguments, **keywords) -> str:
    with pytest.raises(ValueError, match=r"^\w+=") as caught:
        function(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def hyper_refusal(*config: Config, **fields) -> str:
    return refusal(check_hyper, Hyper(**fields), *(config or [Config()]))


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_accepted_and_nothing_else(name):
    for choice in CHOICES[name]:
        assert getattr(dataclasses.replace(Config(), **{name: choice}), name) == choice
    message = refusal(Config, **{name: "nonsense"})
    assert message == f"{name}='nonsense': must be one of {', '.join(CHOICES[name])}"


def test_every_string_field_has_choices():
    free = {"noise_layers"}  # first, last, all, or any regular expression
    strings = {f.name for f in dataclasses.fields(Config) if isinstance(f.default, str)}
    assert strings - free == set(CHOICES)


def test_the_default_is_the_literal_reading():
    literal = {  # ALGORITHM.md, "Readings that stay open", column "default"
        "group_sizes": "half",
        "warmup": "rounds",
        "redraw": "fresh",
        "calibrator": "additive",
        "noise_layers": "first",
        "noise_parameters": "kernel+bias",
        "noise_scale": "absolute",
        "noise_distribution": "gaussian",
        "server_clients": None,
        "server_weights": "borrowed",
        "next_base": "base",
        "cancellation": "pair",
        "keep_best": False,
        "accuracy_on": "validation",
        "num_clients": 100,
        "client_fraction": 0.1,
    }
    assert literal.items() <= dataclasses.asdict(Config()).items()
    assert Hyper().warmup_rounds == 1
    assert Hyper().cap == 0.6


def test_a_typo_is_named():
    assert "did you mean gaussian?" in refusal(Config, noise_distribution="gausian")
    assert nearest("abc", ["xyz"]) == "must be one of xyz"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("num_clients", 0, "must be a whole number, at least 1"),
        ("local_epochs", 0, "must be a whole number, at least 1"),
        ("batch_size", 0, "must be a whole number, at least 1"),
        ("eval_batch", -1, "must be a whole number, at least 1"),
        ("clients_at_once", -1, "must be a whole number, not negative"),
        ("local_test_size", -1, "must be a whole number, not negative"),
        ("server_clients", -1, "must be a whole number, not negative"),
        ("server_clients", 2.5, "must be a whole number, not negative"),
        ("batch_size", 2.5, "must be a whole number, at least 1"),
        ("image_shape", (28, 28), "must be (height, width, channels)"),
        ("image_shape", (0, 28, 1), "must be (height, width, channels)"),
        ("client_fraction", 0.0, "must be in (0, 1]"),
        ("client_fraction", 1.001, "must be in (0, 1]"),
        ("client_fraction", math.nan, "must be in (0, 1]"),
    ],
)
def test_bounds_of_config(name, value, allowed):
    assert refusal(Config, **{name: value}) == f"{name}={value!r}: {allowed}"


def test_bounds_themselves_are_allowed():
    config = Config(
        num_clients=2,
        client_fraction=1.0,
        local_epochs=1,
        batch_size=1,
        server_clients=0,
        clients_at_once=0,
        local_test_size=0,
        eval_batch=1,
    )
    assert config.num_server_clients == 0


@pytest.mark.parametrize(
    ("population", "fraction", "group_sizes", "m", "groups", "server"),
    [
        (100, 0.1, "half", 10, (5, 5), 5),
        (100, 0.07, "half", 7, (4, 3), 3),  # the odd one goes to a
        (100, 0.07, "full", 7, (7, 7), 3),
        (2, 1.0, "half", 2, (1, 1), 1),
        (10, 0.5, "full", 5, (5, 5), 2),
        (100, 0.29, "half", 29, (15, 14), 14),  # 0.29 · 100 = 29 − 4e-15 in floats
    ],
)
def test_derived_sizes(population, fraction, group_sizes, m, groups, server):
    config = Config(num_clients=population, client_fraction=fraction, group_sizes=group_sizes)
    assert (config.sampled, config.groups, config.cohort) == (m, groups, sum(groups))
    assert config.num_server_clients == server
    assert dataclasses.replace(config, server_clients=17).num_server_clients == 17


def test_one_sampled_client_is_refused():
    message = refusal(Config, num_clients=100, client_fraction=0.01)
    assert re.match(r"client_fraction=0\.01: .*1 of num_clients=100.*at least 2", message)
    assert "client_fraction=0.001" in refusal(Config, num_clients=100, client_fraction=0.001)


def test_two_full_groups_need_enough_clients():
    message = refusal(Config, num_clients=10, client_fraction=0.6, group_sizes="full")
    assert message.startswith("group_sizes='full'")
    assert "12" in message
    assert "num_clients=10" in message


def test_config_is_frozen_and_a_value():
    assert hash(Config()) == hash(Config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().batch_size = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [  # the last bad value and the first good one are as close as they get
        ("learning_rate", (-1.0, 0.0, math.inf), (1e-6, 10.0)),
        ("learning_rate_decay", (0.0, 1.001), (1e-3, 1.0)),
        ("momentum", (-0.1, 1.0), (0.0, 0.999)),
        ("clip_norm", (0.0, math.inf), (1e-6, 1e6)),
        ("cap", (0.0, 1.0, 60), (0.01, 0.99)),
        ("cap_margin", (-0.01, 0.6, 0.7), (0.0, 0.59)),
        ("strength", (-0.1, 5.001), (0.0, 5.0)),
        ("strength_step", (0.0, math.inf), (1e-6, 10.0)),
        ("strength_factor", (1.0, 0.5, math.inf), (1.001, 10.0)),
        ("strength_max", (0.0, math.inf), (1e-6, 1e6)),
        ("max_tries", (0, NEVER + 1), (1, NEVER)),
        ("warmup_rounds", (-1, NEVER + 1), (0, NEVER)),
    ],
)
def test_bounds_of_hyper(name, bad, good):
    for value in bad:
        assert hyper_refusal(**{name: value}).startswith(f"{name}={value!r}: must ")
    for value in good:
        leaf = getattr(check_hyper(Hyper(**{name: value}), Config()), name)
        assert leaf == np.asarray(value, leaf.dtype)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Hyper)])
def test_every_hyper_field_is_bounded(name):
    for value in (math.nan, -1):
        assert hyper_refusal(**{name: value}).startswith(f"{name}={value!r}: ")


def test_one_bad_lane_is_enough():
    assert hyper_refusal(cap=np.array([0.5, 1.5, 0.2])).startswith("cap=array([0.5, 1.5, 0.2])")
    lanes = np.array([0.1, 0.2])
    assert "strength" in hyper_refusal(strength=lanes, strength_max=np.array([1.0, 0.15]))
    assert check_hyper(Hyper(cap=lanes), Config()).cap.shape == (2,)


def test_choices_that_exclude_each_other():
    message = hyper_refusal(Config(calibrator="geometric"), strength=0.0)
    assert message == "strength=0.0: must be positive with calibrator='geometric'"
    check_hyper(Hyper(strength=0.1), Config(calibrator="geometric"))
    with pytest.raises(ValueError, match="redraw='rescale': needs a loop"):
        Config(calibrator="fixed", redraw="rescale")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 1e-50),
        ("strength_max", 1e39),
        ("strength_factor", 1 + 1e-9),
        ("max_tries", 1.5),
    ],
)
def test_numbers_are_judged_as_the_round_sees_them(name, value):
    """Each is in range as a Python number, and not once it is a float32 or a count."""
    assert hyper_refusal(Config(), **{name: value}).startswith(f"{name}={value}: must be")


def test_numbers_of_any_kind_become_one_signature():
    kinds = [
        Hyper(cap=0.5, max_tries=3, strength=1),
        Hyper(cap=np.float64(0.5), max_tries=np.int64(3), strength=np.int32(1)),
        Hyper(cap=jnp.float32(0.5), max_tries=jnp.int32(3), strength=jnp.float32(1)),
    ]
    for checked in (check_hyper(kind, Config()) for kind in kinds):
        for field in dataclasses.fields(Hyper):
            leaf = getattr(checked, field.name)
            counts = field.name in ("max_tries", "warmup_rounds")
            assert isinstance(leaf, jax.Array)
            assert leaf.dtype == (jnp.int32 if counts else jnp.float32)
            assert not leaf.weak_type
        assert (checked.cap, checked.max_tries, checked.strength) == (0.5, 3, 1)


def test_fedavg_only_ends_the_noise():
    hyper = Hyper(cap=0.3, warmup_rounds=7)
    off = fedavg(hyper)
    assert off.warmup_rounds == NEVER == np.iinfo(np.int32).max
    assert dataclasses.replace(off, warmup_rounds=7) == hyper
    lanes = fedavg(as_arrays(Hyper(warmup_rounds=jnp.array([1, 2])))).warmup_rounds
    assert (lanes.dtype, lanes.tolist()) == (jnp.int32, [NEVER, NEVER])


@pytest.mark.parametrize("of", [Config, Hyper])
def test_every_field_is_documented_in_order(of):
    section = (inspect.getdoc(of) or "").split("Attributes:\n")[1]
    documented = re.findall(r"^  (\w+): \S", section, re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(of)]
