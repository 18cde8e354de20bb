"""Parts: what every one of them declares, refuses, and compiles; found by themselves."""

import dataclasses
import math
from typing import Any, ClassVar

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import noisefl
from noisefl import calibrate, local, optimizers, owner, parts, presets, schemes, server
from noisefl.errors import nearest
from noisefl.parts import Part, changed, child, choice, count, number, part, specs, walk


def below(cls: type) -> list[type]:
    """All concrete parts of the package under a class, also those of equal names."""
    found = [deep for sub in cls.__subclasses__() for deep in (sub, *below(sub))]
    return [c for c in dict.fromkeys(found) if fed.ours(c) and not c.__dict__.get("abstract")]


PARTS = below(Part)
each_part = pytest.mark.parametrize("cls", PARTS, ids=lambda c: f"{c.__module__[8:]}.{c.__name__}")
FIELDS = [
    pytest.param(cls, name, spec, id=f"{cls.__module__[8:]}.{cls.__name__}.{name}")
    for cls in PARTS
    for name, spec in specs(cls).items()
]
each_field = pytest.mark.parametrize(("cls", "name", "spec"), FIELDS)


def refusal(make, *arguments, **fields) -> str:
    with pytest.raises(ValueError, match=r"^\w+=") as caught:
        make(*arguments, **fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


def others(made: Any, name: str, spec: parts.Spec) -> list[Any]:
    """Values that the field does not have and may have."""
    tried: dict[str, tuple[Any, ...]] = {
        "number": (0.25, 0.5, 0.75, 1.5, 3.0, 60.0),
        "count": (1, 2, 3, 150),
        "size": (1, 2, 3, 16),
        "choice": spec.choices,
        "switch": (True, False),
        "text": ("m", "last", "all", "2+3"),
    }
    allowed = []
    for value in tried.get(spec.kind, ()):
        try:
            made.replace(**{name: value})
        except ValueError:
            continue
        if value != getattr(made, name):
            allowed.append(value)
    return allowed


@each_field
def test_every_field_says_what_it_means_and_what_it_may_be(cls, name, spec):
    assert spec.help
    assert "\n" not in spec.help
    if spec.traced:
        assert math.isfinite(spec.low) or math.isfinite(spec.high)
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")  # a dataclass's own
    made = cls()
    if spec.kind in ("number", "count", "size", "choice", "switch", "text"):
        assert others(made, name, spec)


@each_field
def test_what_a_field_may_not_be_is_named_with_what_it_may(cls, name, spec):
    wrong: list[Any] = []
    if spec.kind in ("number", "count", "size"):
        wrong = [math.nan, math.inf, "one", np.array([0.5, -1e30]), True]
        step = 1 if spec.kind != "number" else 1e-3 * (abs(spec.low) or 1)
        wrong += [spec.low - step] if math.isfinite(spec.low) else []
        wrong += [spec.low] if spec.inside[0] == "(" else []
        wrong += [spec.high] if spec.inside[1] == ")" and math.isfinite(spec.high) else []
        wrong += [spec.high * 1.001] if math.isfinite(spec.high) and spec.kind == "number" else []
        wrong += [2.5] if spec.kind != "number" else []
        wrong += [None] if not spec.optional else []
    elif spec.kind == "choice":
        wrong = ["nonsense", 3]
    elif spec.kind in ("switch", "text", "child"):
        wrong = [3.5]
    for value in wrong:
        if spec.kind in ("number", "count") and value is True:
            continue  # a whole number to NumPy
        message = refusal(cls, **{name: value})
        assert message.startswith(f"{name}=")
        assert ": must be " in message
    if spec.kind == "choice":
        assert refusal(cls, **{name: "nonsense"}).endswith(", ".join(spec.choices))
    if spec.optional:
        assert getattr(cls(**{name: None}), name) is None
        assert spec.none


@pytest.mark.parametrize(("cls", "name", "spec"), [f for f in FIELDS if f.values[2].traced])  # pyright: ignore
def test_a_new_number_in_any_field_compiles_nothing(cls, name, spec):
    """As int, float or array of any kind: all are one signature, of which a program is made."""
    traces = []

    @jax.jit
    def program(made):
        traces.append(1)
        return jax.tree.leaves(made)

    first, *more = others(cls(), name, spec)
    program(cls(**{name: first}))
    kinds = [float, np.float32, np.float64, np.asarray, jnp.asarray]
    if spec.kind == "count":
        kinds = [int, np.int64, np.asarray, jnp.asarray]
    for value in more:
        for kind in kinds:
            program(cls(**{name: kind(value)}))
    whole = int(max(first, *more))
    if whole in (first, *more):
        program(cls(**{name: whole}))
    assert len(traces) == 1
    leaf = getattr(cls(**{name: first}), name)
    assert leaf.dtype == (np.float32 if spec.kind == "number" else np.int32)


@each_field
def test_a_static_change_is_another_structure(cls, name, spec):
    made = cls()
    if not spec.traced:
        for value in others(made, name, spec):
            changed = made.replace(**{name: value})
            assert jax.tree.structure(changed) != jax.tree.structure(made)
            assert jax.tree.structure(changed) == jax.tree.structure(cls(**{name: value}))


@each_part
def test_parts_are_frozen_values_that_jax_rebuilds_unseen(cls):
    made = cls()
    leaves, structure = jax.tree.flatten(made)
    assert jax.tree.structure(cls()) == structure
    for name in specs(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, name, None)
    nothing = jax.tree.unflatten(structure, [object()] * len(leaves))  # not for us to check
    assert jax.tree.structure(jax.tree.map(lambda x: 1, nothing)) == structure
    lanes = parts.lanes([made] * 3)
    assert all(np.shape(leaf) == (3, *np.shape(one))
               for leaf, one in zip(jax.tree.leaves(lanes), leaves, strict=True))  # fmt: skip


def test_numbers_by_name_are_leaves():
    adam = server.Optax(optax.adam, {"learning_rate": 1, "b1": np.float64(0.5)})
    other = server.Optax(optax.adam, {"learning_rate": jnp.float32(2), "b1": 0.25})
    assert jax.tree.structure(adam) == jax.tree.structure(other)
    assert [leaf.dtype for leaf in jax.tree.leaves(adam)] == [np.float32] * 2
    fewer = server.Optax(optax.adam, {"learning_rate": 1})
    assert jax.tree.structure(adam) != jax.tree.structure(fewer)
    match = r"^numbers\['b1'\]=nan: must be a number, finite in float32$"
    with pytest.raises(ValueError, match=match):
        server.Optax(optax.adam, {"b1": math.nan})


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (optimizers.SGD, {"learning_rate": 1e-50}),
        (calibrate.Additive, {"strength_max": 1e39}),
        (calibrate.Geometric, {"strength_factor": 1 + 1e-9}),
        (calibrate.Additive, {"max_tries": 1.5}),
        (schemes.Warmup, {"warmup_rounds": 2**31}),
    ],
)
def test_numbers_are_judged_as_the_round_sees_them(make, fields):
    """Each is in range as a Python number, and not once it is a float32 or a count."""
    [(name, value)] = fields.items()
    assert refusal(make, **fields).startswith(f"{name}={value}: must be")


def test_fields_that_do_not_go_together_and_one_bad_lane():
    assert refusal(calibrate.Fixed, cap=0.5, cap_margin=0.5).startswith("cap_margin=")
    assert refusal(calibrate.Additive, strength=5.5).startswith("strength=5.5: must be at most")
    lanes = np.array([0.1, 0.2])
    bad = refusal(calibrate.Additive, strength=lanes, strength_max=np.array([1.0, 0.15]))
    assert bad.startswith("strength=")
    assert refusal(calibrate.Fixed, cap=np.array([0.5, 1.5])).startswith("cap=array([0.5, 1.5])")
    assert calibrate.Fixed(cap=lanes).cap.shape == (2,)
    made = calibrate.Fixed()
    assert "cap_margin" in refusal(made.replace, cap_margin=0.7)
    assert refusal(schemes.UntilCap, schemes.Bare()).startswith("scheme='bare'")
    blind = schemes.Noised(calibrator=calibrate.Unverified())
    assert "vouches for none" in refusal(schemes.SkipInfeasible, blind)
    assert refusal(schemes.Warmup, 3).startswith("inner=3")


@pytest.mark.parametrize(
    ("make", "fields", "said"),
    [
        (
            noisefl.Experiment,
            {"cohort": optimizers.SGD()},
            "cohort='sgd': must be a part of the kind Cohort",
        ),
        (
            schemes.Noised,
            {"calibrator": schemes.Bare()},
            "calibrator='bare': must be a part of the kind Ca",
        ),
        (noisefl.measure.Standard, {"more": 3}, "more=3: must be several parts"),
        (noisefl.measure.Standard, {"more": (3,)}, "more=3: must be a part"),
        (
            noisefl.measure.Standard,
            {"more": [owner.ServerClients()]},
            "more='server_clients': must be a part of",
        ),
        (server.Optax, {"numbers": 3}, "numbers=3: must be numbers by name"),
        (server.Optax, {"numbers": {1: 2}}, "numbers={1: 2}: must be numbers by name"),
        (server.Optax, {"factory": 3}, "factory=3: must be a function"),
        (optimizers.Opaque, {"given": 3}, "given=3: must be an optax transformation"),
        (noisefl.Cohort, {"groups": np.array(["half"])}, "groups=array"),
        (calibrate.Fixed, {"cap": np.zeros(0)}, "cap=array"),
        (calibrate.Fixed, {"cap": np.full((3, 20), 2.0)}, "cap=array"),  # several lines of repr
        (calibrate.Fixed, {"cap": [0.5, [0.5]]}, "cap=[0.5, [0.5]]: must be a number"),
        (calibrate.Fixed, {"cap": jax.random.key(0)}, "cap=Array"),
        (
            noisefl.Experiment,
            {"channels": ((0.5,), (0.0,))},
            "channels=((0.5,), (0.0,)): must be finite",
        ),
        (noisefl.Experiment, {"channels": 3}, "channels=3: must be means and deviations"),
    ],
)
def test_what_is_no_part_of_its_kind_and_no_number(make, fields, said):
    assert refusal(make, **fields).startswith(said)


def test_a_part_of_ones_own_that_is_of_no_kind_may_stand_in():
    """As the docstrings of `Cohort` and `Training` promise."""
    mine = part(type("Mine", (Part,), {"__module__": "mine", "sizes": (1, 1)}))()
    assert noisefl.Experiment(cohort=mine).cohort is mine  # pyright: ignore
    assert "kind Calibrator" in refusal(schemes.Noised, calibrator=mine)


def test_inside_a_program_nothing_is_checked_and_all_is_cast():
    def built(x):
        made = calibrate.Fixed(cap=x, cap_margin=2 * x).replace(strength=x.astype(jnp.int32))
        return made.cap, made.strength

    cap, strength = jax.jit(built)(jnp.float32(0.5))
    assert (cap.dtype, strength.dtype) == (jnp.float32, jnp.float32)


# The machinery, on parts of our own.


@part
class Leaf(Part):
    """A number and a word."""

    size: Any = number(1.0, "how much", low=0)
    kind: str = choice("a", ("a", "b"), "which")


@part
class Wrapping(Part):
    """A part around another."""

    abstract: ClassVar[bool] = True
    inner: Part = child(Leaf, "inside")
    beside: Part | None = child(None, "beside", none="nothing")
    times: Any = count(1, "how often")


@part
class Twice(Wrapping):
    """Found by itself, while its base is not."""


def test_a_walk_goes_outside_in_and_a_wrapper_adds_no_name():
    made = Twice(Twice(Leaf(2.0), times=5), beside=Leaf(kind="b"))
    found = [(place.path, place.value) for place in walk(made) if place.spec.kind != "child"]
    assert found == [
        (("size",), 2), (("kind",), "a"), (("times",), 5),
        (("beside", "size"), 1), (("beside", "kind"), "b"), (("times",), 1),
    ]  # fmt: skip
    halved = changed(made, Leaf, size=0.5)
    assert [place.value for place in walk(halved) if place.name == "size"] == [0.5, 0.5]
    assert "size" in refusal(changed, made, Leaf, size=-1)


def test_a_new_part_is_found_by_itself():
    assert parts.implementations(Wrapping) == [Twice]
    assert parts.name_of(calibrate.SNR) == "snr"
    assert parts.name_of(owner.ServerClients) == "server_clients"
    for base in (schemes.Scheme, owner.Owner, server.Server, calibrate.Calibrator):
        assert parts.implementations(base)
        assert base not in parts.implementations(base)


@part
class Notebook(Part):
    """A base whose parts a notebook defines."""

    abstract: ClassVar[bool] = True


def test_of_a_part_that_is_defined_again_the_newest_counts():
    def cell() -> type:
        @part
        class Mine(Notebook):
            pass

        return Mine

    kept = [cell() for _ in range(3)]
    assert parts.implementations(Notebook) == kept[-1:]


def test_two_parts_of_one_name_are_refused():
    made = [part(type("Twin", (Leaf,), {"__module__": name})) for name in ("here", "there")]
    found = refusal(parts.implementations, Leaf)
    assert "name='twin': is that of two parts, here.Twin and there.Twin" in found
    made[0].__module__ = "there"  # or later tests would be refused as well
    assert parts.implementations(Leaf)[-1] is made[1]


def test_a_field_that_nothing_declares_is_refused():
    with pytest.raises(TypeError, match=r"Wrong\.loose: declare it by number\(\)"):

        @part
        class Wrong(Part):
            loose: float = 1.0


def test_lanes_stack_numbers_and_refuse_the_rest():
    made = parts.lanes([Twice(times=1), Twice(Leaf(2), times=3)])
    assert made.times.tolist() == [1, 3]
    assert (made.inner.size.dtype, made.inner.size.tolist()) == (np.float32, [1, 2])
    assert refusal(parts.lanes, []).startswith("lanes=[]")
    assert refusal(parts.lanes, [Leaf(), Leaf(kind="b")]).startswith("lanes=1: differs")


def test_a_typo_is_named():
    assert "did you mean subtract?" in refusal(schemes.Noised, cancellation="substract")
    assert nearest("abc", ["xyz"]) == "must be one of xyz"
    assert nearest("IID", ["iid", "shards"]) == "must be one of iid, shards (did you mean iid?)"
    assert nearest("lenet", ["LeNet5"]) == "must be one of LeNet5 (did you mean LeNet5?)"


# Experiments.


def test_the_default_is_the_literal_reading():
    literal = {  # ALGORITHM.md, "Readings that stay open", column "default"
        "groups": "half", "warmup_rounds": 1, "redraw": "fresh", "noise_layers": "first",
        "noise_parameters": "kernel+bias", "noise_scale": "absolute", "server_clients": "m/2",
        "server_weights": "borrowed", "cancellation": "pair", "accuracy_on": "validation",
        "clients_per_round": 10, "server_learning_rate": 1,
    }  # fmt: skip
    for made in (noisefl.Experiment(), presets.literal()):
        found = {place.name: place.value for place in walk(made)}
        assert literal.items() <= found.items()
        assert found["cap"] == np.float32(0.6)
        kinds = [type(found[name]).__name__ for name in ("calibrator", "owner", "average")]
        assert kinds == ["Additive", "ServerClients", "Mean"]
        assert isinstance(made.scheme, schemes.Warmup)


def test_fedavg_only_ends_the_noise_and_is_the_same_program():
    made = presets.quickstart()
    off = noisefl.fedavg(made)
    assert np.iinfo(np.int32).max == schemes.NEVER
    assert jax.tree.structure(off) == jax.tree.structure(made)
    fed.assert_same(changed(off, schemes.Warmup, warmup_rounds=1), made)
    two = noisefl.fedavg(parts.lanes([made, made]))
    assert two.scheme.warmup_rounds.tolist() == [schemes.NEVER] * 2  # pyright: ignore
    bare = made.replace(scheme=schemes.Bare())
    assert isinstance(noisefl.fedavg(bare).scheme, schemes.Warmup)
    assert noisefl.experiment.is_fedavg(off)  # pyright: ignore
    assert not noisefl.experiment.is_fedavg(made)  # pyright: ignore


def test_equal_experiments_are_one_program_and_an_opaque_optimizer_one_an_instance():
    def made(optimizer):
        return jax.tree.structure(fed.TINY.replace(local=local.Training(optimizer)))

    assert made(optimizers.SGD(0.1)) == made(optimizers.SGD(0.2))
    assert made(optimizers.Optax()) == made(optimizers.Optax(optax.adam, {"learning_rate": 1}))
    assert made(optimizers.SGD(0.1)) != made(optimizers.SGD(0.1, momentum=0.5))
    adam = optax.adam(1e-3)
    assert made(adam) == made(adam)
    assert hash(made(adam)) == hash(made(optimizers.Opaque(adam)))
    assert refusal(local.Training, optimizer=3).startswith("optimizer='int': must be a part")
