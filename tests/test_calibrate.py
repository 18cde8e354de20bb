"""One contract over all calibrators, each found by itself, and the probe that keeps their bill.

Fake questions know nothing of models: the accuracy of a copy is a function of strength, draw and
variant, and an image is right where its own threshold lies under that accuracy. Other test files
have each rule's closed form; `test_guarantee` has how often tested rules are wrong.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from noisefl import calibrate
from noisefl.calibrate import Bill, Probe, Questions, predictive
from noisefl.parts import implementations, lanes, name_of, specs

ON_SPLIT, TESTED = calibrate.Additive.guarantee, calibrate.Sequential.guarantee

# A rule's own fields where it has them; else its defaults.
SMALL: dict[str, Any] = {
    **{"cap": 0.7, "strength": 0.5, "strength_max": 6.0, "max_tries": 20},
    **{"strength_step": 0.7, "strength_factor": 1.4, "step": 1.4},
    **{"draws": 2, "strengths": 4, "scouts": 40, "chunk": 40, "limit": 120, "images": 30},
}
# Every choice of every rule that there is: a new one comes in by itself.
RULES = {
    "-".join([name_of(cls), *chosen]): cls(
        **{name: value for name, value in SMALL.items() if name in specs(cls)},
        **dict(zip(choices, chosen, strict=True)),
    )
    for cls in implementations(calibrate.Calibrator)
    for choices in [[name for name, spec in specs(cls).items() if spec.kind == "choice"]]
    for chosen in itertools.product(*(specs(cls)[name].choices for name in choices))
}
every = pytest.mark.parametrize("name", RULES)


@pytest.fixture(scope="module", autouse=True)
def coarse_grid():
    """Of the strengths that `Predictive` foretells: eager, each costs much."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictive, "GRID", np.geomspace(0.25, 4.0, 3))
        yield


def with_numbers(name: str, **numbers: Any) -> calibrate.Calibrator:
    """The rule with those of the numbers that it has."""
    return RULES[name].replace(
        **{k: v for k, v in numbers.items() if k in specs(type(RULES[name]))}
    )


N = 240
THRESHOLDS = jnp.asarray((np.random.default_rng(0).permutation(N) + 0.5) / N, jnp.float32)
LABELS = jnp.asarray(np.random.default_rng(1).integers(0, 2, N), jnp.int32)


class Curve(NamedTuple):
    """Accuracies by strength s, the one N(0, 1) number z of a draw, and the variant v of V.

    The base's at strength 0, else level + rate · s of the last copy or of those before it, moved by
    waves in s, by the draw, and by luck.
    """

    base: Any
    level: Any
    last_level: Any
    rate: Any = 0.0
    last_rate: Any = 0.0
    wave: Any = 0.0
    tilt: Any = 0.0
    luck: Any = 0.0

    def __call__(self, s: Any, z: Any, v: Any, variants: int) -> jax.Array:
        last = v == variants - 1
        at = jnp.where(last, self.last_level, self.level)
        at += jnp.where(last, self.last_rate, self.rate) * s
        at += self.wave * jnp.cos((3 + v) * s) + self.tilt * jnp.tanh(s * (1 + z))
        return jnp.float32(jnp.where(s > 0, at - self.luck * (z > 0.5), self.base))


CURVES = {
    "falls, the last copy slowest": Curve(0.95, 0.95, 0.95, -0.15, -0.1),
    "falls, the first copies slowest": Curve(0.95, 0.95, 0.95, -0.1, -0.2),
    "one copy above": Curve(0.9, 0.2, 0.9),
    "the base at chance": Curve(0.1, 0.1, 0.1),
    "up and down": Curve(1.0, 0.75, 0.75, wave=0.25),
    "by the draw": Curve(0.9, 0.9, 0.9, -0.02, -0.02, tilt=-0.2),
    "luck": Curve(0.9, 0.9, 0.9, luck=0.5),
    "all copies dead": Curve(0.9, np.nan, np.nan),
    "one copy dead": Curve(0.9, 0.1, np.nan),
    "the base dead": Curve(np.nan, np.nan, np.nan),
}
NUMBERS = [
    *({}, {"cap_margin": 0.1}, {"cap": 0.97}, {"cap": 0.05}, {"max_tries": 1}, {"max_tries": 3}),
    {"strength": 0.5, "strength_max": 0.5},
    {"strength_step": 0.11, "strength_factor": 1.05, "step": 1.05, "max_tries": 47},
]
CASES = list(itertools.product(CURVES, NUMBERS))


def fake(
    share: Any, labels: Any = LABELS, thresholds: Any = THRESHOLDS, variants: int = 2,
    calls: list | None = None, classes: int = 2, shared: Any = None,
) -> Probe:  # fmt: skip
    """A probe whose copies are right on the images with thresholds under share(s, draw, v).

    Args:
      share: at strength 0 the base's, whatever the draw and the variant.
      calls: takes (question, *arguments) of every call that is computed, each of a vmap.
      shared: "below" of the images.
    """

    def note(*arguments: Any, kind: str) -> None:
        if calls is not None:
            add = calls.append
            jax.debug.callback(lambda *a: add((kind, *map(np.asarray, a))), *arguments)

    def of(s: Any, draw: Any, v: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.float32(share(s, draw, v)), jnp.shape(v))

    def told(p: jax.Array, images: jax.Array) -> jax.Array:
        wrong = ~(jnp.asarray(thresholds, jnp.float32)[images] < p)
        logits = jax.nn.one_hot((jnp.asarray(labels)[images] + wrong) % classes, classes)
        return jnp.where(jnp.isnan(p), jnp.nan, logits)

    def accuracy(draw: Any, s: jax.Array) -> jax.Array:
        note(draw, s, kind="accuracy")
        return of(s, draw, jnp.arange(variants))

    def bare() -> jax.Array:
        note(kind="bare")
        return of(jnp.float32(0), jnp.float32(0), 0)

    def logits(draw: Any, s: jax.Array, v: jax.Array, images: jax.Array, kept: Any) -> jax.Array:
        note(draw, s, v, images, kind="logits")
        return told(of(s, draw, v), images)

    def clean(images: jax.Array, kept: Any) -> jax.Array:
        note(images, kind="clean")
        return told(of(jnp.float32(0), jnp.float32(0), 0), images)

    asked = Questions(
        variants, "linear", jnp.asarray(labels), jax.random.normal, accuracy, bare, logits, clean,
        shared,
    )  # fmt: skip
    return Probe(Bill.empty(), asked)


def probe_of(curve: Curve, variants: int, calls: list | None = None, size: int = N) -> Probe:
    def share(s: Any, z: Any, v: Any) -> jax.Array:
        return curve(s, z, v, variants)

    return fake(share, LABELS[:size], THRESHOLDS[:size], variants, calls)


@functools.cache
def rounds(name: str, variants: int):
    """Two rounds, a scan, of many lanes, a vmap: (keys [L, 2], curves [L], rules) → outcomes."""

    def lane(keys, curve, rule):
        def step(carry, key):
            *outcome, probe, carry = rule.calibrate(key, probe_of(curve, variants), carry)
            return carry, (*outcome, probe.bill, carry)

        return jax.lax.scan(step, rule.init(), keys)[1]

    return jax.jit(jax.vmap(lane))


@functools.cache
def all_cases(name: str, variants: int) -> Any:
    """(Decision, Evidence, Bill, carry) of all CASES [L, 2 rounds], NumPy."""
    rules = lanes([with_numbers(name, **numbers) for _, numbers in CASES])
    curves = Curve(*map(np.float32, zip(*(CURVES[kind] for kind, _ in CASES), strict=True)))  # pyright: ignore
    return jax.device_get(rounds(name, variants)(keys_of(len(CASES)), curves, rules))


@functools.cache
def keys_of(count: int) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.arange(2 * count)).reshape(count, 2)


traces: dict[str, int] = dict.fromkeys(RULES, 0)


@functools.cache
def single(name: str, variants: int):
    """One round of one lane, and the calls that its probe gets."""
    calls: list = []

    def one(key, curve, rule, carry):
        traces[name] += 1
        *outcome, probe, carry = rule.calibrate(key, probe_of(curve, variants, calls), carry)
        return (*outcome, probe.bill, carry)

    return jax.jit(one), calls


def run(name: str, kind: str, seed: int = 0, carry: Any = None, **numbers: Any) -> Any:
    """(Decision, Evidence, Bill, carry) of one round with V = 5, and its calls."""
    compiled, calls = single(name, 5)
    calls.clear()
    rule = with_numbers(name, **numbers)
    carry = rule.init() if carry is None else carry
    out = jax.device_get(compiled(jax.random.key(seed), CURVES[kind], rule, carry))
    jax.effects_barrier()
    return *out, list(calls)


def close(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), ours, theirs)


@every
@pytest.mark.parametrize("variants", [1, 2, 5])
def test_it_ends_and_feasible_is_its_guarantee(name, variants):
    """Of each case and round: ranges, bounds of the bill, and what feasible rounds vouch for."""
    guarantee, copies = RULES[name].guarantee, np.arange(variants)
    decision, evidence, bill, after = all_cases(name, variants)
    assert decision.strength.dtype == evidence.accuracy.dtype == np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(bill)} == {np.dtype(np.int32)}
    assert evidence.accuracy.shape == (len(CASES), 2, variants)
    looks_bare = guarantee != "none" and name != "fixed" and not name.startswith("additive")
    for lane, (kind, numbers) in enumerate(CASES):
        rule, curve = with_numbers(name, **numbers), CURVES[kind]
        draw, strength, feasible = (leaf[lane] for leaf in jax.tree.leaves(decision))
        accuracy, tries = evidence.accuracy[lane], bill.tries[lane]
        assert np.all((strength >= 0) & (strength <= getattr(rule, "strength_max", np.inf)))
        batch = getattr(rule, "strengths", 0) * getattr(rule, "draws", 0)
        assert tries.max() <= max(int(getattr(rule, "max_tries", 1)), 1 + max(batch, 1))

        true = np.asarray(curve(strength[:, None], draw[:, None], copies, variants))
        true = np.broadcast_to(true, (2, variants))
        bare = float(curve(0.0, 0.0, 0, variants))
        assert not np.any(feasible & np.isnan(true).any(axis=1))
        if guarantee == ON_SPLIT:  # the very copies that ship, on all images
            np.testing.assert_allclose(accuracy, true, atol=1e-6)
            np.testing.assert_array_equal(feasible, np.all(accuracy <= rule.aim, axis=1))
            assert tries.min() >= 1
        else:
            assert np.isnan(accuracy).all()
            assert not np.any(feasible & ~np.all(true <= rule.aim + 0.1, axis=1))
        if looks_bare and bare <= rule.aim - (0.1 if guarantee == TESTED else 0):
            assert np.all((strength == 0) & feasible)
            if guarantee == ON_SPLIT:
                assert np.all(accuracy == np.float32(bare))
                assert all(np.all(leaf[lane] == x) for leaf, x in zip(
                    jax.tree.leaves(bill), (1, 1, N), strict=True
                ))  # fmt: skip
        # It remembers a strength that held, and goes on remembering it.
        if not isinstance(after, tuple):
            before = np.append(np.float32(np.nan), after[lane, :1])
            kept = np.where(feasible & (strength > 0), strength, before)
            np.testing.assert_array_equal(after[lane], kept)
        # A base that does not hold is never handed out.
        assert not (looks_bare and bare > rule.aim + 0.1 and np.any(strength == 0))
    assert decision.feasible.any() == (guarantee != "none")
    assert not decision.feasible.all()


@every
def test_lanes_and_rounds_are_single_runs(name):
    """A vmap of a scan gives what one round after another gives, in each lane its own."""
    mapped, rule = all_cases(name, 5), RULES[name]
    keys = keys_of(len(CASES))
    for lane in range(0, len(CASES), 7):
        kind, numbers = CASES[lane]
        carry = rule.init()
        for t in (0, 1):
            compiled, _ = single(name, 5)
            one = compiled(keys[lane, t], CURVES[kind], with_numbers(name, **numbers), carry)
            close(one, jax.tree.map(lambda leaf, at=(lane, t): leaf[at], mapped))
            carry = one[-1]


@every
def test_jit_is_eager(name):
    rule = with_numbers(name, max_tries=2)
    with jax.disable_jit():
        probe = probe_of(CURVES["by the draw"], 5)
        *eager, probe, carry = rule.calibrate(jax.random.key(3), probe, rule.init())
    *compiled, _ = run(name, "by the draw", 3, max_tries=2)
    close(compiled, [*eager, probe.bill, carry])
    assert jax.tree.structure(carry) == jax.tree.structure(rule.init())


@every
def test_the_bill_is_what_was_asked(name):
    """Counted by the fake: images of every call; models and tries by what they are."""
    for kind, seed in (("falls, the last copy slowest", 0), ("luck", 1), ("the base at chance", 2)):
        decision, _, bill, _, calls = run(name, kind, seed)
        samples = models = tries = 0
        scouts: set = set()
        judged: set = set()
        for question, *asked in calls:
            if question in ("accuracy", "bare"):
                count = 5 if question == "accuracy" else 1
                samples, models, tries = samples + count * N, models + count, tries + 1
            else:
                samples += asked[-1].size
            if question == "clean":
                scouts, models = {*asked[-1].tolist()}, models + 1
        for question, *asked in calls:
            if question == "logits":
                draw, strength, variant, images = asked
                copy = (float(draw), float(strength), int(variant))
                if {*images.tolist()} <= scouts:
                    models += 1
                else:  # a copy before the jury
                    assert not {*images.tolist()} & scouts
                    judged.add(copy)
        models, tries = models + len(judged), tries + len({copy[:2] for copy in judged})
        assert (bill.tries, bill.evaluations, bill.samples) == (tries, models, samples)
        # What ships is what was judged last.
        if judged and decision.feasible:
            copies = {v for *copy, v in judged if copy == [decision.draw, decision.strength]}
            assert copies == ({0} if decision.strength == 0 else {0, 1, 2, 3, 4})


@every
def test_the_key_decides_the_draw(name):
    first, again, other = (run(name, "luck", seed)[0].draw for seed in (0, 0, 1))
    assert first == again
    assert first != other


@every
def test_new_numbers_compile_nothing(name):
    """Of every field that is a number, whichever a rule has."""
    run(name, "luck")
    fields = [field for field, spec in specs(type(RULES[name])).items() if spec.traced]
    assert {"cap", "cap_margin"} < set(fields) or name == "none"
    for field in fields:
        now = getattr(RULES[name], field)
        run(name, "luck", **{field: now + 1 if now.dtype == np.int32 else now * 0.9 + 0.11})
    assert traces[name] == 1


@every
@pytest.mark.parametrize(("size", "variants"), [(1, 5), (3, 1)])
def test_a_tiny_split_ends(name, size, variants):
    """One image is the least that a split can hold; what is above the cap is never vouched for."""
    rule = with_numbers(name, max_tries=2)
    for kind in ("one copy above", "the base dead"):
        probe = probe_of(CURVES[kind], variants, size=size)
        with jax.disable_jit():
            decision, *_ = rule.calibrate(jax.random.key(0), probe, rule.init())
        assert not decision.feasible
        assert decision.strength > 0 or name.startswith("additive")


def test_a_field_means_one_thing_wherever_it_stands():
    """So that flags and sweeps know one `strength`; bounds alone may differ."""
    found: dict[str, set] = {}
    for cls in implementations(calibrate.Calibrator):
        if cls.__module__.startswith("noisefl."):
            for name, spec in specs(cls).items():
                found.setdefault(name, set()).add((spec.kind, spec.help, spec.unit))
            assert cls.guarantee in (ON_SPLIT, TESTED, "none")  # pyright: ignore
            assert set(cls.judges) <= {"linear", "smooth", "discrete"}  # pyright: ignore
    assert {name: len(meanings) for name, meanings in found.items() if len(meanings) > 1} == {}


@every
def test_numbers_that_do_not_go_together_are_refused(name):
    rule = RULES[name]
    with pytest.raises(ValueError, match=r"cap_margin=0\.7: must be less than cap"):
        rule.replace(cap_margin=0.7)
    if hasattr(rule, "strength_max"):
        with pytest.raises(ValueError, match=r"strength=7\.0: must be at most strength_max"):
            rule.replace(strength=7.0)


def test_exactly_at_the_aim_holds():
    """An accuracy of 0.8 holds an aim of 0.8, and not the next float32 below it."""
    at = np.float32(0.8)
    for cap, holds in ((at, True), (np.nextafter(at, np.float32(0)), False)):
        assert calibrate.Fixed(cap=cap).holds(jnp.asarray([0.1, at])) == holds
    two = jnp.asarray([[0.1, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, np.nan]])
    assert calibrate.Fixed(cap=0.5).holds(two).tolist() == [True, False, False, False]
    assert calibrate.Fixed(cap=0.7, cap_margin=0.3).aim == pytest.approx(0.4)


def test_a_warm_start_is_a_share_of_the_round_before():
    rule = calibrate.Bisection(strength=0.5, strength_max=6.0)
    carries = [(rule.init(), 0.5), (0.0, 0.5), (1e-6, 7e-7), (2.0, 1.4), (99.0, 6.0)]
    for carry, expected in carries:
        assert rule.warm_start(jnp.float32(carry), 0.7) == pytest.approx(expected)


@pytest.mark.parametrize("variants", [1, 2, 5])
def test_questions_side_by_side_are_single_questions(variants):
    """Answers and bill, of copies that all differ; each question adds to the bill of the last."""
    probe = fake(lambda s, z, v: 0.9 - s * (1 + z) / (v + 2), variants=variants)
    draws, strengths = jnp.asarray([0.1, 0.7, 0.9]), jnp.asarray([0.2, 0.5])
    images, copies = jnp.arange(50, 90), range(variants)
    found, many = probe.accuracies(draws, strengths)
    told, many = many.logits_of(draws, strengths[1], images)
    assert found.shape == (3, 2, variants)
    assert told.shape == (3, variants, 40, 2)
    for d, draw in enumerate(draws):
        for k, strength in enumerate(strengths):
            one, probe = probe.accuracy(draw, strength)
            close(one, [0.9 - strength * (1 + draw) / (v + 2) for v in copies])
            close(found[d, k], one)
        one, probe = probe.logits(draw, strengths[1], images)
        close(told[d], one)
        for v in copies:
            looked, _ = probe.look(draw, strengths[1], jnp.int32(v), images, jnp.bool_(True))
            close(looked, one[v])
    close(probe.bill, many.bill)
    assert jax.tree.leaves(many.bill) == [6, 9 * variants, variants * (6 * N + 3 * 40)]
    before = probe.bill
    for v, first in itertools.product(copies, (True, False)):
        _, probe = probe.look(draws[0], strengths[0], jnp.int32(v), images, jnp.bool_(first))
    spent = jax.tree.map(lambda a, b: int(a - b), probe.bill, before)
    assert jax.tree.leaves(spent) == [1, variants, 2 * variants * 40]
    assert (probe.size, probe.num_classes, probe.below(images)) == (N, 2, None)
