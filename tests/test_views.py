"""Views, made of the very rounds that were simulated, and no secret in them.

The rounds are run again one by one by `noisefl.step`, whose observer tells what every client
received and returned; who takes part is drawn on the host; and views are put together from that by
hand, in NumPy.
"""

import functools
from typing import Any, ClassVar

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_thieves import (
    BASE,
    DATA,
    KEY,
    SCHEMES,
    Moved,
    flat,
)

import noisefl
from noisefl import calibrate, keys, measure, schemes, simulate, theft
from noisefl.attacks import View
from noisefl.measure import Thieves
from noisefl.parts import changed, implementations, part, static
from noisefl.round import members_of
from noisefl.theft import Instance, Seen

ROUNDS, M = 6, 4


def experiment_of(name: str, at_once: int = 1) -> Any:
    experiment = fed.experiment(scheme=SCHEMES[name], clients_at_once=at_once).resolved()
    return experiment if name == "pair" else experiment.replace(local=Moved())


def begun(experiment: Any, made: Any, key: Any = KEY) -> Any:
    """`simulate.begin`, but with a base that is trained."""
    remembered = simulate.begin(key, experiment, DATA, made).measured
    return fed.replaced(fed.start(experiment), measured=remembered)


def rounds(experiment: Any, made: Any, number: int = ROUNDS) -> list[Any]:
    """States after each round."""
    step = jax.jit(lambda state: simulate.measured_step(KEY, state, DATA, experiment, made))
    state, states = begun(experiment, made), []
    for _ in range(number):
        state, numbers = step(state)
        assert set(numbers) == {"round"}
        states.append(state)
    return states


@functools.cache
def watched(name: str, at_once: int, kept: int) -> list[Any]:
    made = Thieves(until=ROUNDS, kept_copies=kept, singles=2, coalitions="2+4")
    return rounds(experiment_of(name, at_once), made)


@functools.cache
def again(name: str, at_once: int) -> tuple[list[Any], list[Any], list[Any]]:
    """States after each round, what its clients received and what they returned, slot by slot."""
    experiment = experiment_of(name, at_once)
    step = jax.jit(functools.partial(noisefl.step, observe=fed.observe))
    state, states, received, returned = fed.start(experiment), [], [], []
    for _ in range(ROUNDS):
        state, info = step(KEY, state, DATA, experiment)
        states.append(state)
        received.append([fed.plain(fed.lane(info.observed[0], slot)) for slot in range(M)])
        returned.append([fed.plain(fed.lane(info.observed[1], slot)) for slot in range(M)])
    return states, received, returned


@functools.cache
def members(t: int) -> tuple[list[int], list[int]]:
    """Clients of round t and their groups, drawn on the host."""
    drawn = fed.TINY.cohort.draw(keys.of_round(KEY, t), DATA.counts)
    return np.asarray(drawn.clients).tolist(), np.asarray(drawn.groups).tolist()


def in_turn(t: int) -> list[int]:
    """The first of group a, the first of b, the second of a, …"""
    clients, groups = members(t)
    a, b = ([k for k, g in zip(clients, groups, strict=True) if g == one] for one in (0, 1))
    return [k for both in zip(a, b, strict=True) for k in both]


def assert_view(view: View, name: str, at_once: int, kept: int, clients: list[int], now: int):
    """Bitwise what these clients had seen after round `now`, put together by hand."""
    _, received, returned = again(name, at_once)
    assert view.present.shape == view.rounds.shape == (kept, len(clients))
    for a, k in enumerate(clients):
        mine = [t for t in range(1, now + 1) if k in members(t)[0]][-kept:]
        mine = [0] * (kept - len(mine)) + mine  # older ones first, and nothing before them
        assert view.rounds[:, a].tolist() == mine
        assert view.present[:, a].tolist() == [t > 0 for t in mine]
        for j, t in enumerate(mine):
            if t:
                slot = members(t)[0].index(k)
                for ours, theirs in ((view.copies, received), (view.returned, returned)):
                    there = jax.tree.map(lambda leaf, j=j, a=a: leaf[j, a], ours)
                    fed.assert_same(there, theirs[t - 1][slot])
                copy = received[t - 1][slot]
                known = {path: leaf[j, a] for path, leaf in flat(view.spread).items()}
                assert known == pytest.approx(spread(name, t, copy), rel=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((view.copies, view.returned)))


NOISED = {"pair": "stem", "own noise": "head"}  # the first layer, and the last


def spread(name: str, t: int, copy: Any) -> dict[Any, float]:
    """σ of copy − W by path: none in warm-up and on the layer without noise."""
    known = dict.fromkeys(flat(copy), 0.0)
    noised = NOISED[name]
    layer = flat(copy[noised])
    if t > 1:
        squares = sum(np.sum(np.square(x, dtype=float)) for x in layer.values())
        rms = np.sqrt(squares / sum(x.size for x in layer.values()))
        sigma = 2.0 if name == "pair" else 2.0 * rms / np.sqrt(1 + 2.0**2)
        known |= {(noised, *path): sigma for path in layer}
    return known


# Views of the very rounds.


def test_the_rounds_are_worth_a_look():
    """Some clients took part in fewer rounds than are kept, and some in more."""
    times = [sum(k in members(t)[0] for t in range(1, 7)) for k in in_turn(ROUNDS)]
    assert min(times) == 2
    assert max(times) == 5
    assert in_turn(ROUNDS) != members(ROUNDS)[0] != sorted(members(ROUNDS)[0])


@pytest.mark.parametrize(
    ("name", "at_once", "kept"),
    [("pair", 1, 3), ("own noise", 2, 2)],
)
def test_a_view_is_what_its_members_were_given_and_gave_back(name, at_once, kept):
    states, clients = watched(name, at_once, kept), in_turn(ROUNDS)
    for t, state in enumerate(states, 1):
        seen = state.measured
        assert seen.clients.tolist() == clients
        assert seen.times.tolist() == [
            sum(k in members(s)[0] for s in range(1, t + 1)) for k in clients
        ]
        assert bool(seen.protected) == (t > 1)
        assert_view(seen.view, name, at_once, kept, clients, t)
        # And the thieves have changed nothing.
        alone = fed.plain(again(name, at_once)[0][t - 1])
        fed.assert_same(fed.plain(fed.replaced(state, measured=())), alone)
    touched = {path: bool(yes) for path, yes in states[-1].measured.touched.items()}
    assert touched == {path: path[0] == NOISED[name] for path in flat(BASE)}


@pytest.mark.parametrize("m", [1, 2, 5, 6])
def test_followed_clients_are_of_both_groups_in_turn(m):
    """Of an odd cohort group a has one more; of fewer members than followers all are followed."""
    experiment = fed.experiment(clients_per_round=m, scheme=schemes.Bare()).resolved()
    last = experiment.cohort.draw(keys.of_round(KEY, 9), DATA.counts)
    clients = last.clients.tolist()
    a, b = clients[: -(-m // 2)], clients[-(-m // 2) :]
    wanted = [x[i] for i in range(m) for x in (a, b) if i < len(x)]
    made = Thieves(until=9, singles=4, coalitions="")
    seen = made.init(KEY, experiment, DATA, fed.start())
    assert seen.clients.tolist() == (wanted + [-1] * 4)[:4]
    places = np.asarray(made.places(last, seen)).tolist()
    assert [places.index(n) if n in places else -1 for n in range(4)] == [
        clients.index(k) if k in clients else -1 for k in seen.clients.tolist()
    ]
    assert set(places) <= {0, 1, 2, 3, 4}


def test_without_a_last_round_a_view_is_of_the_newest_round_alone():
    states = rounds(experiment_of("pair"), Thieves(singles=3, coalitions="2"), 4)
    for t, state in enumerate(states, 1):
        clients = in_turn(t)[:3]
        assert state.measured.clients.tolist() == clients
        view = state.measured.view
        assert view.rounds.tolist() == [[t] * 3]
        assert_view(view, "pair", 1, 1, clients, t)


def test_of_a_scheme_that_says_nothing_the_spread_is_unknown_but_in_rounds_that_are_bare():
    """There a copy is W, which everybody can tell."""
    seen = Seen.empty(jnp.asarray([4]), BASE, (("stem", "kernel"),), 2)
    one = jax.tree.map(lambda w: w[None], BASE)
    for t, protected in ((1, False), (2, True)):
        seen = seen.plus(
            jnp.array([True]), jnp.int32(t), one, one, {}, jnp.bool_(protected)
        )  # fmt: skip
    spread = {path: leaf[:, 0].tolist() for path, leaf in flat(seen.view.spread).items()}
    unknown = spread.pop(("stem", "kernel"))
    assert unknown[0] == 0
    assert np.isnan(unknown[1])
    assert all(known == [0, 0] for known in spread.values())
    told = {("stem", "kernel"): jnp.array([0.7])}
    seen = seen.plus(jnp.array([True]), jnp.int32(3), one, one, told, jnp.bool_(True))
    assert flat(seen.view.spread)["stem", "kernel"][1, 0] == jnp.float32(0.7)
    assert seen.view.rounds.tolist() == [[2], [3]]


def skipping() -> Any:
    """Round 1 is bare; later ones hold no cap, and hand nothing out."""
    rule = calibrate.Additive(cap=1e-3, max_tries=1)
    return schemes.SkipInfeasible(schemes.Warmup(schemes.Noised(calibrator=rule)))


@pytest.mark.parametrize(
    "made",
    [Thieves(singles=2, coalitions=""), Thieves(until=2, kept_copies=2, singles=2, coalitions="")],
    ids=["newest round", "until"],
)
def test_a_round_that_hands_out_nothing_shows_nothing(made):
    """And who had seen something has still seen it: copies stay with those who received them."""
    experiment = fed.experiment(scheme=skipping()).resolved().replace(local=Moved())
    step = jax.jit(lambda state: simulate.measured_step(KEY, state, DATA, experiment, made))
    first, _ = step(begun(experiment, made))
    second, _ = step(first)
    assert second.round == 2
    fed.assert_same(second.base, first.base)  # nothing was shipped
    before, after = first.measured, second.measured
    assert np.any(np.asarray(before.rounds) == 1) or made.until
    names = ("clients", "times", "copies", "returned", "rounds", "spread")
    for name in names:
        fed.assert_same(getattr(after, name), getattr(before, name))
    if made.until is None:
        assert in_turn(1)[:2] == after.clients.tolist() != in_turn(2)[:2]


def test_memory_is_that_of_the_followed_and_not_of_the_cohort():
    def size(m: int, **fields: Any) -> int:
        made = Thieves(**{**dict(singles=2, coalitions="2+3", until=9, kept_copies=5), **fields})
        experiment = fed.experiment(clients_per_round=m).resolved()
        state = jax.eval_shape(lambda: simulate.begin(KEY, experiment, DATA, made))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.measured))

    model = 4 * sum(leaf.size for leaf in jax.tree.leaves(BASE))
    assert size(4) == size(8)
    assert size(4) == pytest.approx(2 * 3 * 5 * model, rel=0.05)
    assert size(4, kept_copies=1, until=None) < size(4) / 4
    assert size(4, coalitions="4") > 1.3 * size(4)


# No secret.


def protecting(cls: type) -> Any:
    rule = calibrate.Unverified(strength=0.5)
    if cls is schemes.SkipInfeasible:  # refuses a rule that vouches for no round
        rule = calibrate.Fixed(cap=0.99, strength=5.0)
    small = changed(cls(), schemes.FewWeights, entries=5)
    return changed(small, schemes.Calibrated, calibrator=rule)


@part
class Spy(measure.Measure):
    """What `conclude` is told, and what a measure of thieves has kept."""

    abstract: ClassVar[bool] = True
    told: Any = static(None, "where it is kept")

    def conclude(self, key, experiment, data, owner, carry):
        self.told((experiment, carry))
        return {}


def bits(tree: Any) -> list[bytes]:
    return [np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(fed.plain(tree))]


OURS = [*filter(fed.ours, implementations(schemes.Scheme))]


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_no_secret_of_any_scheme_is_in_a_view_or_told_to_thieves(cls):
    """Draws, keys of draws and of what is sticky, and the noise itself, all as their bits."""
    experiment = fed.TINY.replace(scheme=protecting(cls), local=Moved())
    try:
        experiment.scheme.fit(experiment.functions, fed.IMAGE, experiment.cohort)
    except ValueError:
        experiment = experiment.replace(model=fed.TinyCNN())
    experiment = experiment.resolved()
    scheme, t = experiment.scheme, 2 if issubclass(cls, schemes.Delayed) else 1  # protected
    made = Thieves(until=t, kept_copies=2, singles=4, coalitions="")
    states = [begun(experiment, made)]
    for _ in range(t):
        states.append(simulate.measured_step(KEY, states[-1], DATA, experiment, made)[0])
    before, after = states[-2:]

    # What was handed out, by the scheme itself.
    key, judge = keys.of_round(KEY, t), experiment.judge(DATA)
    drawn = members_of(key, experiment, DATA)
    issue, _ = scheme.issue(
        key, jnp.int32(t), before.base, before.owner, drawn, judge, before.scheme
    )
    assert bool(issue.protected) == (cls is not schemes.Bare)
    assert issue.shipped
    noise = []
    for slot, client in enumerate(members(t)[0]):
        place = schemes.Slot(jnp.int32(slot), drawn.groups[slot], drawn.clients[slot])
        copy, at = scheme.copy(before.base, issue, place), in_turn(t).index(client)
        shown = jax.tree.map(lambda leaf, at=at: leaf[-1, at], after.measured.view.copies)
        fed.assert_same(shown, copy, **fed.CLOSE)
        noise.append(jax.tree.map(jnp.subtract, copy, before.base))

    public = np.asarray(drawn.clients).tobytes()  # who takes part is no secret
    hidden: set[bytes] = set()
    for leaf in jax.tree.leaves(fed.plain((issue.secret, before.scheme, after.scheme, noise))):
        rows = [leaf, *leaf] if leaf.ndim > 1 else [leaf]
        hidden |= {np.ascontiguousarray(row).tobytes() for row in rows if len(np.unique(row)) > 1}
    hidden -= {public}
    assert bool(hidden) == (cls is not schemes.Bare)

    told: list[Any] = []
    simulate.conclude(KEY, after, DATA, experiment, Spy(told=told.append))
    [(untold, carry)] = told
    assert carry is after.measured
    assert type(untold.scheme) is schemes.Bare
    shown = bits((untold, carry, carry.view))
    assert len(shown) > 10
    for one in hidden:
        assert not any(one in other for other in shown)
    kinds = [leaf.dtype for leaf in jax.tree.leaves((untold, carry)) if hasattr(leaf, "dtype")]
    assert not any(jnp.issubdtype(kind, jax.dtypes.prng_key) for kind in kinds)


@pytest.mark.parametrize("scheme", [schemes.OwnClasses(), schemes.Withheld()])
def test_what_is_seen_says_whether_copies_are_whole(scheme):
    """Also inside of a wrapper: a coalition takes what one copy does not hold from another."""
    experiment = fed.TINY.replace(model=fed.TinyCNN(), scheme=schemes.Warmup(scheme))
    seen = begun(experiment.resolved(), Thieves(until=2, coalitions="2")).measured
    assert seen.partial == isinstance(scheme, schemes.OwnClasses)


def test_the_bits_of_a_secret_would_be_found():
    """The search above finds what is there: a row of an array, and a key."""
    row = np.arange(3, dtype=np.float32)
    assert row.tobytes() in bits({"a": jnp.asarray([[9, 9, 9], row])})[0]
    assert np.asarray(jax.random.key_data(KEY)).tobytes() in bits(keys.root(0))[0]


# Instances of views.

TIMES = np.array([[0, 2, 0, 1], [2, 3, 4, 3], [6, 6, 6, 5]])  # rounds of four followed clients


def view_of(times: np.ndarray) -> View:
    nothing = jax.tree.map(lambda _: jnp.zeros(times.shape), BASE)
    return View(nothing, nothing, jnp.asarray(times > 0), jnp.asarray(times), nothing)


def picked(*at: tuple[int, int]) -> list[list[bool]]:
    found = np.zeros(TIMES.shape, bool)
    for place in at:
        found[place] = True
    return found.tolist()


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        (Instance("V1", 1, 0), picked((2, 0))),
        (Instance("V1", 1, 3), picked((2, 3))),  # of round 5
        (Instance("V2", 1, 0), picked((1, 0), (2, 0))),
        (Instance("V2", 1, 1), picked((0, 1), (1, 1), (2, 1))),
        (Instance("V3", 2, 0), picked((2, 0), (2, 1))),
        (Instance("V3", 4, 0), picked((2, 0), (2, 1), (2, 2))),  # the fourth was not there
        (Instance("V4", 2, 0), picked((1, 0), (2, 0), *((j, 1) for j in range(3)))),
        (Instance("V5", 3, 0), picked((1, 0), (2, 0), *((j, 1) for j in range(3)), (1, 2), (2, 2))),
        (Instance("V4", 4, 0), (TIMES > 0).tolist()),
        (Instance("V5", 4, 0), (TIMES > 0).tolist()),
    ],
    ids=str,
)
def test_an_instance_holds_what_its_view_says(part, wanted):
    seen = view_of(TIMES)
    assert theft.present(seen, part).tolist() == wanted
    assert jax.jit(lambda view: theft.present(view, part))(seen).tolist() == wanted


def test_nothing_is_present_of_who_was_never_there():
    seen = view_of(np.array([[0, 0], [0, 3]]))
    for view in ("V1", "V2"):
        assert not np.any(theft.present(seen, Instance(view, 1, 0)))
    assert theft.present(seen, Instance("V3", 2, 0)).tolist() == [[False, False], [False, True]]


def test_instances_are_the_ladder():
    assert theft.instances(2, (2, 4), 3) == [
        *(("V1", 1, 0), ("V1", 1, 1), ("V2", 1, 0), ("V2", 1, 1)),
        *(("V3", 2, 0), ("V3", 4, 0), ("V4", 2, 0), ("V4", 4, 0), ("V5", 2, 0), ("V5", 4, 0)),
    ]
    # Of one round alone V2 would be V1, and V4 would be V3.
    assert theft.instances(1, (2,), 1) == [("V1", 1, 0), ("V3", 2, 0), ("V5", 2, 0)]
    assert theft.instances(1, (), 4) == [("V1", 1, 0), ("V2", 1, 0)]
