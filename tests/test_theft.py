"""Theft: views made of the very rounds that were simulated, and what thieves come to in them.

The rounds are run again one by one by `noisefl.step`, whose observer tells what every client
received and returned; who takes part is drawn on the host; and views are put together from that by
hand, in NumPy. Models are judged by the reference's forward pass.
"""

import functools
import json
from typing import Any, ClassVar

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_nets as nets
import small_runs
from flax import struct
from flax.traverse_util import flatten_dict

import noisefl
from noisefl import attacks, calibrate, keys, local, measure, schemes, simulate, sweep, theft
from noisefl.attacks import View
from noisefl.local import Own
from noisefl.measure import Thieves
from noisefl.parts import Number, changed, implementations, number, part, static
from noisefl.theft import Instance, Row, Seen

KEY, ROUNDS, M = keys.root(0), 6, 4


@part
class Moved(local.Training):
    """Training that takes no time to compile, of the client's own key and data all the same."""

    def train(self, key, round, apply, params, own, gather):
        by = jax.random.uniform(key) + jnp.mean(own.labels[own.rows]) + round
        return jax.tree.map(lambda w: w * 1.01 + 0.01 * by, params)


DATA, COUNTS = fed.federation(), np.asarray(fed.COUNTS)
FUNCTIONS, BASE = fed.TINY.functions, fed.start().base
STILL = calibrate.Fixed(strength=2.0)
SCHEMES = {
    "pair": schemes.Warmup(schemes.Noised(calibrator=STILL)),
    "own noise": schemes.Warmup(
        schemes.own_noise(calibrator=calibrate.Unverified(strength=2.0), own="sticky", common=0.5)
    ),
}
TEST = np.asarray(DATA.test_images), np.asarray(DATA.test_labels)


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


def flat(params: Any) -> dict[Any, Any]:
    return flatten_dict(params)  # pyright: ignore[reportReturnType]


def spread(name: str, t: int, copy: Any) -> dict[Any, float]:
    """σ of copy − W by path: none in warm-up and on the layer without noise."""
    known = dict.fromkeys(flat(copy), 0.0)
    layer = flat(copy["stem"])
    if t > 1:
        squares = sum(np.sum(np.square(x, dtype=float)) for x in layer.values())
        rms = np.sqrt(squares / sum(x.size for x in layer.values()))
        sigma = 2.0 if name == "pair" else 2.0 * rms / np.sqrt(1 + 2.0**2)
        known |= {("stem", *path): sigma for path in layer}
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
    assert touched == {path: path[0] == "stem" for path in flat(BASE)}


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
    drawn = experiment.cohort.draw(key, DATA.counts)
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


# Data of thieves.


def mine(own: Own) -> list[int]:
    return np.asarray(own.rows)[: int(own.count)].tolist()


@pytest.mark.parametrize("there", [[True, True, True], [False, True, False], [True, False, True]])
def test_images_are_pooled(there):
    clients = [4, 1, 3]
    found = theft.pooled(DATA, jnp.asarray(clients), jnp.asarray(there))
    table = np.asarray(DATA.clients)
    wanted = [table[k, : COUNTS[k]] for k, yes in zip(clients, there, strict=True) if yes]
    assert mine(found) == np.concatenate(wanted).tolist()
    assert found.rows.shape == (3 * table.shape[1],)
    assert found.images is DATA.train_images
    assert found.labels is DATA.train_labels


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 100, 4000, 4100])
def test_held_out_images_are_a_quarter_at_random_and_no_others(count):
    rows = np.random.default_rng(count).permutation(5000)
    own = Own(jnp.zeros(()), jnp.zeros(()), jnp.asarray(rows), jnp.int32(count))
    splits = [
        [mine(half) for half in theft.divided(keys.root(seed), own)] for seed in (0, 0, 1)
    ]  # of a key always the same
    for training, held in splits:
        assert len(held) == min(-(-count // 4), 1000)
        assert len(training) == max(count - len(held), 1)
        assert len(set(training)) == len(training)
        assert set(training) | set(held) == set(rows[:count].tolist())
        if count > 1:
            assert not set(training) & set(held)
    assert splits[0] == splits[1]
    if count > 9:
        assert set(splits[2][1]) != set(splits[0][1])
        assert splits[0][1] != [k for k in rows.tolist() if k in splits[0][1]]


def test_every_image_is_as_likely_held_out_as_any_other():
    """Sixteen images of which four are held out, 2,000 times: 500 each, and a χ² of 15 degrees
    (and less spread than of independent draws) is above 44.3 once in 10,000."""
    own = Own(jnp.zeros(()), jnp.zeros(()), jnp.arange(20), jnp.int32(16))

    @jax.jit
    @jax.vmap
    def held(number):
        other = theft.divided(keys.stream(KEY, "split", number), own)[1]
        return jnp.where(jnp.arange(other.rows.shape[0]) < other.count, other.rows, 99)

    found = np.bincount(np.asarray(held(jnp.arange(2000))).ravel(), minlength=100)
    assert found[:16].sum() == 8000
    assert ((found[:16] - 500) ** 2 / 500).sum() < 44.3


def linear(params: Any, images: jax.Array) -> jax.Array:
    """Logits x · w: the images are [N, 1, 1, 1]."""
    return images.reshape(-1, 1) * 255 * params["w"] + params["b"]


def test_of_as_many_right_ones_the_smaller_loss_is_better():
    images, labels = jnp.ones((9, 1, 1, 1), jnp.uint8), jnp.asarray([0] * 6 + [1] * 3)
    own = Own(images, labels, jnp.asarray([0, 1, 2, 6, 7, 8, 8]), jnp.int32(4))  # 0, 0, 0 and 1

    def score(*w: float, bias: float = 0.0) -> float:
        params = {"w": jnp.asarray(w), "b": jnp.asarray([bias, 0.0])}
        return float(theft.score(linear, params, own, 3))

    def of(right: int, w: Any) -> float:
        logits = np.tile(np.asarray(w, float), (4, 1))
        loss, _ = nets.cross_entropy(logits, np.array([0, 0, 0, 1]))
        return right + 0.5 / (1 + loss)

    for w, right in (((1.0, 0.0), 3), ((2.0, 0.0), 3), ((0.0, 9.0), 1), ((0.0, 0.1), 1)):
        assert score(*w) == pytest.approx(of(right, w), rel=1e-5)
    assert score(1.0, 0.0) > score(9.0, 0.0) > score(0.0, 0.1) > score(0.0, 9.0) > 1
    assert score(1e4, 0.0) > score(0.0, 0.01)  # no loss weighs as much as an image
    assert score(np.nan, 0.0) == score(np.inf, 0.0) == -1
    assert score(0.0, 1.0, bias=np.inf) == -1


# What thieves come to.


@part
class Shortened(attacks.Scratch):
    """One step instead of many: a loop takes long to compile."""

    abstract: ClassVar[bool] = True

    @property
    def title(self) -> str:
        return "scratch"

    def descend(self, key, start, objective, count, trained=None):
        slope = jax.grad(objective)(start, jax.random.randint(key, (4,), 0, count))
        return jax.tree.map(lambda w, g: w - self.rate * g, start, slope)


@struct.dataclass
class Told:
    """Of one call of `steal`."""

    who: str = struct.field(pytree_node=False)
    factor: Any
    count: Any
    own: Own
    view: View


@part
class Scaled(attacks.Attack):
    """The newest copy with its head times a factor; tells what it is shown."""

    abstract: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("V1",)
    factor: Number = number(0.5, "of the head")
    into: Any = static(None, "where it tells")

    def candidates(self) -> list[attacks.Attack]:
        return [self.replace(factor=factor) for factor in (-1.0, 0.5, np.float32(3e38))]

    def steal(self, key, view, own, public):
        if self.into is not None:
            jax.debug.callback(self.into, Told(self.title, self.factor, own.count, own, view))
        copy = attacks.newest(view, view.copies)
        return {**copy, "head": jax.tree.map(lambda w: 10 * self.factor * w, copy["head"])}


@part
class Asking(Scaled):
    """Asks the owner about its own images."""

    abstract: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("V5",)

    def candidates(self) -> list[attacks.Attack]:
        return [self, self.replace(factor=0.25)]

    def questions(self, key, own, public):
        return own.images[own.rows[:3]]


@part
class Counting(Scaled):
    """Tells what a coalition has in one round."""

    abstract: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("V1", "V3")


def seen_by(clients: list[int], times: Any, protected: bool = True, seed: int = 0) -> Seen:
    """What they have seen, made up: noise on the stem, more of it in later rounds."""
    times = np.asarray(times)
    rng = np.random.default_rng(seed)

    def copy(path: Any, w: Any) -> Any:
        noisy = rng.normal(0, 1.0, (*times.shape, *w.shape))
        return w + jnp.float32(noisy * ("stem" in str(path)))

    copies = jax.tree_util.tree_map_with_path(copy, BASE)
    paths = flat(BASE)
    return Seen(
        clients=jnp.asarray(clients),
        times=jnp.asarray((times > 0).sum(0)),
        copies=copies,
        returned=jax.tree.map(lambda leaf: leaf + 0.01, copies),
        rounds=jnp.asarray(times),
        spread={path: jnp.full(times.shape, 0.5 * (path[0] == "stem")) for path in paths},
        touched={path: jnp.bool_(path[0] == "stem") for path in paths},
        protected=jnp.bool_(protected),
    )


CLIENTS, SEEN_TIMES = [3, 6, 1], [[2, 5, 0], [6, 6, 6]]
SEEN, BARE = (seen_by(CLIENTS, SEEN_TIMES, protected) for protected in (True, False))
OWNER = jax.tree.map(lambda w: w + 0.6 * jnp.cos(9 * jnp.arange(w.size)).reshape(w.shape), BASE)
UNTOLD = fed.TINY.resolved().replace(scheme=schemes.Bare())
FEW = (attacks.BareCopy(), Shortened(), Scaled())


@pytest.fixture(autouse=True)
def few_steps_of_the_server(monkeypatch):
    assert attacks.Scratch().steps < theft.SERVER_STEPS
    monkeypatch.setattr(theft, "Scratch", Shortened)


def program(attempts: Any, singles: int, coalitions: Any, controls: str, images: int = 0) -> Any:
    def stolen(owner: Any, data: Any, seen: Seen) -> dict[Row, dict[str, Any]]:
        key = keys.root(8)
        return theft.stolen(
            key, UNTOLD, data, owner, seen, attempts, singles, coalitions, controls, images
        )  # fmt: skip

    return stolen


@functools.cache
def compiled(controls: str) -> Any:
    return jax.jit(program(FEW, 2, (2, 3), controls))


def stolen(
    seen: Seen = SEEN, owner: Any = OWNER, data: Any = DATA, controls: str = "fedavg"
) -> dict[Row, dict[str, Any]]:
    """What `FEW` make of the views of two single thieves and of coalitions of two and three."""
    return fed.plain(compiled(controls)(owner, data, seen))


def accuracy(params: Any, images: Any = TEST[0], labels: Any = TEST[1]) -> float:
    return nets.accuracy(fed.NET, nets.as_float64(params), images, labels)


def agreement(one: Any, other: Any) -> float:
    says = [nets.forward(fed.NET, nets.as_float64(p), TEST[0])[0].argmax(1) for p in (one, other)]
    return float((says[0] == says[1]).mean())


def newest(which: int, head: float = 1.0) -> Any:
    """The newest copy of a single thief, its head times a factor."""
    copy = jax.tree.map(lambda leaf: leaf[1, which], SEEN.copies)
    return {**copy, "head": jax.tree.map(lambda w: head * w, copy["head"])}


ROWS = {
    *(Row("owner", "V0", 0, 0), Row("server_alone", "V0", 0, 0)),
    *(Row(who, "V1", 1, n) for who in ("bare_copy", "scratch", "scaled") for n in (0, 1)),
    *(Row("scratch", "V3", 2, 0), Row("scratch", "V3", 3, 0)),
}


def test_rows_say_of_what_they_are():
    found, n = stolen(), COUNTS[CLIENTS]
    assert set(found) == ROWS
    told = {(row.thief, row.members, row.which): [int(columns[one]) for one in
            ("round", "copies", "images")] for row, columns in found.items()}  # fmt: skip
    assert told == {
        **{(who, 1, one): [6, 1, n[one]] for who in ("bare_copy", "scratch", "scaled")
           for one in (0, 1)},
        ("scratch", 2, 0): [6, 2, n[0] + n[1]],
        ("scratch", 3, 0): [6, 3, n.sum()],
        ("owner", 0, 0): [0, 0, 0],
        ("server_alone", 0, 0): [0, 0, fed.VALIDATION],
    }  # fmt: skip
    shares, whole = ("accuracy", "accuracy_best", "fidelity"), ("round", "copies", "images")
    for columns in found.values():
        kinds = {**dict.fromkeys(shares, "float32"), **dict.fromkeys(whole, "int32")}
        assert {name: column.dtype for name, column in columns.items()} == {**kinds, "tried": bool}
        if columns["tried"]:
            assert 0 <= columns["accuracy"] <= columns["accuracy_best"] <= 1


def test_the_owner_and_the_bare_copy_are_as_good_as_the_reference_says():
    found, told = stolen(), set()
    owner = found[Row("owner", "V0", 0, 0)]
    assert owner["accuracy"] == owner["accuracy_best"] == pytest.approx(accuracy(OWNER), abs=1e-6)
    assert owner["fidelity"] == 1
    for which in (0, 1):
        row = found[Row("bare_copy", "V1", 1, which)]
        assert row["accuracy"] == pytest.approx(accuracy(newest(which)), abs=1e-6)
        assert row["accuracy_best"] == row["accuracy"]
        assert row["fidelity"] == pytest.approx(agreement(newest(which), OWNER), abs=1e-6)
        told |= {float(row["accuracy"]), float(row["fidelity"])}
    assert len(told | {float(owner["accuracy"])}) > 3  # else nothing is told apart


@pytest.mark.parametrize("images", [11, 999])
def test_the_first_test_images_count(images):
    first = TEST[0][:images], TEST[1][:images]
    one = jax.jit(program((attacks.BareCopy(),), 1, (), "never", images))
    found = fed.plain(one(OWNER, DATA, SEEN))
    row, owner = found[Row("bare_copy", "V1", 1, 0)], found[Row("owner", "V0", 0, 0)]
    assert row["accuracy"] == pytest.approx(accuracy(newest(0), *first), abs=1e-6)
    assert owner["accuracy"] == pytest.approx(accuracy(OWNER, *first), abs=1e-6)


def test_out_of_jit_it_is_the_same():
    eager = fed.plain(program((FEW[0], FEW[2]), 1, (2,), "never")(OWNER, DATA, SEEN))
    assert set(eager) == {*(row for row in ROWS if row.thief in ("bare_copy", "scaled", "owner")
                            and row.which == 0)}  # fmt: skip
    for row, columns in stolen().items():
        if row in eager:
            fed.assert_same(eager[row], columns)


def test_a_model_that_is_not_finite_has_no_accuracy():
    broken = jax.tree.map(lambda leaf: leaf.at[1, 0].set(jnp.nan), SEEN.copies)
    found = stolen(fed.replaced(SEEN, copies=broken))
    for who in ("bare_copy", "scaled"):
        nothing = found[Row(who, "V1", 1, 0)]
        assert np.isnan(nothing["accuracy"])
        assert np.isnan(nothing["fidelity"])
        fed.assert_same(found[Row(who, "V1", 1, 1)], stolen()[Row(who, "V1", 1, 1)])


def test_nor_is_there_a_bound_on_a_model_that_is_not_finite():
    broken = jax.tree.map(lambda leaf: leaf.at[1, 0].set(jnp.nan), SEEN.copies)
    found = stolen(fed.replaced(SEEN, copies=broken))
    for who in ("scaled", "bare_copy"):
        assert np.isnan(found[Row(who, "V1", 1, 0)]["accuracy_best"]), who


def test_the_thief_chooses_on_images_of_its_own_that_it_holds_out():
    """The best candidate on test, if its labels are right; of labels that say the opposite the
    worst, and the bound stands beside it. A candidate that is not finite is never chosen."""
    of = {factor: accuracy(newest(0, factor)) for factor in (-1.0, 0.5)}
    assert of[0.5] > of[-1.0] + 0.2
    row = stolen()[Row("scaled", "V1", 1, 0)]
    assert row["accuracy"] == row["accuracy_best"] == pytest.approx(of[0.5], abs=1e-6)
    assert row["fidelity"] == pytest.approx(agreement(newest(0, 0.5), OWNER), abs=1e-6)
    opposite = nets.as_float64(newest(0, -1.0))
    says = nets.forward(fed.NET, opposite, np.asarray(DATA.train_images))[0].argmax(1)
    images = fed.replaced(DATA.images, train_labels=jnp.int32(says))
    row = stolen(data=fed.replaced(DATA, images=images))[Row("scaled", "V1", 1, 0)]
    assert row["accuracy"] == pytest.approx(of[-1.0], abs=1e-6)
    assert row["accuracy_best"] == pytest.approx(of[0.5], abs=1e-6)


def test_what_a_thief_is_shown(monkeypatch):
    """Candidates see three quarters of its images, the chosen one all of them. Who asks is answered
    by the owner, and nobody else; a coalition pools its images."""
    told, judges, score = list[Told](), list[Own](), theft.score

    def scored(apply, model, own, batch):
        jax.debug.callback(judges.append, own)
        return score(apply, model, own, batch)

    monkeypatch.setattr(theft, "score", scored)
    attempts = Scaled(into=told.append), Asking(into=told.append), Counting(into=told.append)
    jax.jit(program(attempts, 1, (2, 3), "never"))(OWNER, DATA, SEEN)
    jax.effects_barrier()
    n = COUNTS[CLIENTS]
    kept = {size: size - -(-size // 4) for size in (n[0], n[:2].sum(), n.sum())}

    def counts(who: str) -> list[int]:
        return sorted(int(one.count) for one in told if one.who == who)

    assert counts("scaled") == [*[kept[n[0]]] * 3, n[0]]
    pools = n[:2].sum(), n.sum()
    assert counts("asking") == sorted(x for size in pools for x in (*[kept[size]] * 2, size))
    pools = n[0], *pools
    assert counts("counting") == sorted(x for size in pools for x in (*[kept[size]] * 3, size))
    [last] = [one for one in told if one.who == "scaled" and one.count == n[0]]
    assert last.factor == 0.5
    # Of candidates none is judged by an image that it has trained on, and each by all others.
    whole = {*(frozenset(mine(one.own)) for one in told if one.count not in kept.values())}
    splits = {frozenset(mine(one.own)) for one in told if one.count in kept.values()}
    assert len(judges) == 3 + 2 * 2 + 3 * 3
    for held in (frozenset(mine(own)) for own in judges):
        assert any(held | split in whole and not held & split for split in splits)
    shown = {who: set() for who in ("scaled", "asking", "counting")}
    for one in told:
        present = np.asarray(one.view.present)
        shown[one.who].add((present.sum(), present.tobytes()))
        if one.who != "asking":
            assert (one.view.questions, one.view.answers) == (None, None)
            continue
        own = theft.pooled(DATA, SEEN.clients, jnp.any(one.view.present, axis=0))
        asked = np.asarray(one.view.questions)
        assert asked.shape == (3, *fed.IMAGE)
        every = [np.asarray(DATA.train_images)[row].tobytes() for row in mine(own)]
        assert all(image.tobytes() in every for image in asked)
        logits = nets.forward(fed.NET, nets.as_float64(OWNER), asked)[0]
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.testing.assert_allclose(np.asarray(one.view.answers), shares, rtol=1e-4, atol=1e-6)

    def masks(*rows: list[list[int]]) -> set[Any]:
        return {(mask.sum(), mask.tobytes()) for mask in (np.array(row, bool) for row in rows)}

    nobody, one_of, two_of = [0, 0, 0], [1, 0, 0], [1, 1, 0]
    assert shown == {
        "scaled": masks([nobody, one_of]),
        "asking": masks([two_of, two_of], [two_of, [1, 1, 1]]),  # the third was there once
        "counting": masks([nobody, one_of], [nobody, two_of], [nobody, [1, 1, 1]]),
    }


def test_controls_do_not_look_at_copies_or_at_the_owner():
    names = ("copies", "returned", "spread")
    other = {n: jax.tree.map(lambda leaf: 0 * leaf + 0.1, getattr(BARE, n)) for n in names}
    owner = jax.tree.map(lambda w: -w, OWNER)
    before, after = stolen(BARE), stolen(fed.replaced(BARE, **other), owner)
    for row, columns in before.items():
        if columns["tried"]:
            names = {*columns} - {"fidelity"}  # to another owner
            same = all(np.array_equal(columns[n], after[row][n]) for n in names)
            assert same == (row.thief in ("scratch", "server_alone")), row


def test_controls_of_a_run_and_of_its_fedavg_are_the_same():
    """The same key and the same clients: what is subtracted has no noise of its own."""
    of_run, of_fedavg = stolen(controls="always"), stolen(BARE)
    for row in (row for row in ROWS if row.thief in ("scratch", "server_alone")):
        for name in ("accuracy", "accuracy_best"):
            assert of_run[row][name] == of_fedavg[row][name]


@pytest.mark.parametrize("controls", theft.CONTROLS)
@pytest.mark.parametrize("seen", [SEEN, BARE], ids=["protected", "fedavg"])
def test_controls_are_tried_where_they_are_wanted(controls, seen):
    """In FedAvg's run nothing is tried beside them but the bare copy."""
    tried = {"owner": True, "bare_copy": True, "scaled": seen is SEEN}
    if controls == "never":
        attempts = attacks.BareCopy(), Shortened()
        found = fed.plain(jax.jit(program(attempts, 1, (), "never"))(OWNER, DATA, seen))
        assert {row.thief for row in found} == {"owner", "bare_copy"}
    else:
        found = stolen(seen, controls=controls)
        wanted = controls == "always" or seen is BARE
        tried |= dict.fromkeys(("scratch", "server_alone"), wanted)
        assert set(found) == ROWS
    for row, columns in found.items():
        assert columns["tried"] == tried[row.thief], row
        for name in ("accuracy", "accuracy_best", "fidelity"):
            assert np.isnan(columns[name]) == (not tried[row.thief])


# Through a run.


def test_coalitions_larger_than_a_round_are_left_out_and_one_is_not_larger_than_it():
    made = Thieves(attacks="bare_copy+scratch+average", singles=9, coalitions=" 5+4+ 2", until=2,
                   kept_copies=2)  # fmt: skip
    assert (made.sizes, made.followers) == ((2, 4, 5), 9)
    state = jax.eval_shape(lambda: simulate.begin(KEY, fed.TINY, DATA, made))
    found = jax.eval_shape(lambda s: simulate.conclude(KEY, s, DATA, fed.TINY, made), state)
    of = {view: sorted({(r.members, r.which) for r in found if r.view == view}) for view in
          ("V1", "V2", "V3", "V4")}  # fmt: skip
    assert of == {
        "V1": [(1, n) for n in range(M)],
        "V2": [(1, n) for n in range(M)],
        "V3": [(2, 0), (4, 0)],
        "V4": [(2, 0), (4, 0)],
    }


@pytest.mark.parametrize("text", ["1", "2+x", "2+-3", "2.5", "²", "9999999999"])
def test_coalitions_are_whole_numbers(text):
    with pytest.raises(ValueError, match=r"^coalitions=.*must be whole numbers of at least 2"):
        Thieves(coalitions=text)


def titles(made: Thieves, model: Any) -> list[str]:
    return [attack.title for attack in made.able(noisefl.models.functions(model), fed.IMAGE)]


def test_an_attack_that_cannot_attack_the_model_is_left_out_unless_it_is_named():
    pair, module = (fed.initial, fed.forward), fed.TinyCNN()
    for attempts in ("few", "all"):
        without = titles(Thieves(attacks=attempts), pair)
        assert [*titles(Thieves(attacks=attempts), module)] == [
            one.title for one in Thieves(attacks=attempts).tried
        ]
        assert set(titles(Thieves(attacks=attempts), module)) - set(without) == {"ridge"}
    assert titles(Thieves(), module) == [*measure.FEW]
    named = (Thieves(attacks="ridge+bare_copy"),
             Thieves(attacks="bare_copy", more_attacks=(attacks.Ridge(),)),
             Thieves(attacks="few", more_attacks=(Renamed(),)))  # fmt: skip
    for made in named:
        with pytest.raises(ValueError, match=r"^model="):
            simulate.begin(KEY, fed.TINY, DATA, made)
        assert "ridge" in " ".join(titles(made, module))


@part
class Renamed(attacks.Ridge):
    """Ridge by another name."""

    abstract: ClassVar[bool] = True


def test_thieves_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match=r"^attacks=.*did you mean scratch\?"):
        Thieves(attacks="bare_copy+scratsch")
    with pytest.raises(ValueError, match=r"must have different titles"):
        Thieves(more_attacks=(attacks.FineTune(steps=3),))
    with pytest.raises(ValueError, match=r"^kept_copies=2: needs `until`"):
        simulate.begin(KEY, fed.TINY, DATA, Thieves(kept_copies=2))
    with pytest.raises(ValueError, match=r"at most one measure may follow clients"):
        measure.Standard(thieves=Thieves(), more=(Thieves(),))


# Lanes, and single runs.


@part
class Light(measure.Standard):
    """Without what looks at models in every round."""

    abstract: ClassVar[bool] = True

    @property
    def parts(self) -> tuple[measure.Measure, ...]:
        return (measure.Protocol(), *([self.thieves] if self.thieves else []))


SILENT = Light()
KEPT = Light(thieves=Thieves(attacks="bare_copy", more_attacks=FEW[1:2], until=3, kept_copies=2))
RUN = fed.experiment(scheme=SCHEMES["pair"]).replace(local=Moved())


@pytest.fixture(scope="module")
def single():
    """single(fedavg, measure) → the state after three rounds, its rows, and the last words."""
    chunks = functools.cache(simulate.chunk_of_rounds)

    @functools.cache
    def last(made: Any) -> Any:
        return jax.jit(lambda key, s, one: simulate.conclude(key, s, DATA, one, made))

    @functools.cache
    def of(fedavg: bool, made: Any) -> tuple[Any, list[Any], Any]:
        one, key = noisefl.fedavg(RUN) if fedavg else RUN, keys.root(2)
        runs = simulate.run(key, one, DATA, rounds=3, measure=made, rounds_per_chunk=3)
        [(state, rows)] = [(jax.tree.map(jnp.asarray, state), rows) for state, rows in runs]
        return state, rows, fed.plain(last(made)(key, state, one)) if made.concludes else {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "chunk_of_rounds", chunks)
        yield of


@part
class Saying(measure.Measure):
    """Speaks in the end."""

    abstract: ClassVar[bool] = True
    words: Any = static("", "that it says")

    @property
    def concludes(self) -> bool:
        return bool(self.words)

    def conclude(self, key, experiment, data, owner, carry):
        return {self.words: {"carry": carry, "key": key}}


@pytest.mark.parametrize("words", [("a", "b"), ("", "b"), ("a", ""), ("", "")])
def test_all_parts_of_a_measure_have_the_last_word(words):
    whole = measure.Standard(more=tuple(Saying(word) for word in words))
    assert whole.concludes == any(words)
    carries = tuple(range(len(whole.parts)))
    found = whole.conclude(KEY, UNTOLD, DATA, OWNER, carries)
    places = {one.words: n for n, one in enumerate(whole.parts) if isinstance(one, Saying)}
    assert {word: said["carry"] for word, said in found.items()} == places
    assert all(said["key"] is KEY for said in found.values())


def test_measuring_thieves_changes_nothing_of_the_run(single):
    (ours, rows, said), (alone, others, _) = (single(False, one) for one in (KEPT, SILENT))
    assert simulate.conclude(KEY, alone, DATA, RUN, SILENT) == {}
    assert repr(rows) == repr(others)
    fed.assert_same(*(fed.replaced(state, measured=()) for state in (ours, alone)))
    fed.assert_same(ours.measured[:-1], alone.measured)
    assert (bool(said), KEPT.concludes, SILENT.concludes) == (True, True, False)


def test_lanes_say_what_single_runs_say(single):
    """A protected run and its FedAvg side by side."""
    lanes, roots = [RUN, noisefl.fedavg(RUN)], jnp.stack([keys.root(2)] * 2)
    found = sweep.run(lanes, roots, [DATA] * 2, rounds=3, measure=KEPT, rounds_per_chunk=3)
    for lane, fedavg in enumerate((False, True)):
        state, _, said = single(fedavg, KEPT)
        seen, wanted = fed.lane(found.states.measured[-1], lane), state.measured[-1]
        fed.assert_same(seen, wanted, **fed.CLOSE)
        assert set(found.conclusions) == set(said)
        assert {row.view for row in said} == {"V0", "V1", "V3"}
        for row, columns in said.items():
            ours = {name: column[lane] for name, column in found.conclusions[row].items()}
            fed.assert_same(ours, columns)
            of_fedavg = row.thief in ("scratch", "server_alone")
            if row.thief not in ("owner", "bare_copy"):
                assert columns["tried"] == (of_fedavg == fedavg)


def test_one_program_has_the_last_word_of_all_schemes_and_numbers_of_lanes():
    """It is told neither."""
    before = sweep._last_words_of_one._cache_size()
    kept = Light(thieves=Thieves(attacks="bare_copy", until=1))
    for scheme in (*SCHEMES.values(), schemes.Withheld()):
        some = [RUN.replace(scheme=scheme)] * (3 if scheme is SCHEMES["pair"] else 1)
        roots = jnp.stack([keys.root(seed) for seed, _ in enumerate(some)])
        said = sweep.run(some, roots, [DATA] * len(some), rounds=1, measure=kept).conclusions
        assert {columns["accuracy"].shape for columns in said.values()} == {(len(some),)}
    assert sweep._last_words_of_one._cache_size() == before + 1


def test_lanes_go_device_by_device():
    """Six lanes on two devices: each had its first, then its second, then its third."""
    found = [{"row": {"lane": np.array([place, 3 + place])}} for place in range(3)]
    assert sweep.in_order(found)["row"]["lane"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_run_that_grows_has_the_thieves_of_its_last_round(tmp_path_factory, tmp_path, capsys):
    """More --rounds for a run that is done: as if they had been asked for at once, or refused."""
    tiny = [one for one in small_runs.flags(tmp_path_factory) if not one.startswith("--rounds")]
    args = [
        *tiny,
        "--thieves=thieves",
        "--attacks=bare_copy+average",
        "--kept_copies=3",
        "--checkpoint_every=1",
    ]
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    with pytest.MonkeyPatch.context() as patch:
        small_runs.remember_programs(patch)
        assert small_runs.main(*args, "--rounds=5", f"--out={whole}") == 0
        assert small_runs.main(*args, "--rounds=2", f"--out={grown}") == 0
        capsys.readouterr()
        code = small_runs.main(*args, "--rounds=5", f"--out={grown}")
    if code:
        assert code == 2
        assert "until=5: " in small_runs.one_line(capsys)
    else:
        found = (folder / "thieves.jsonl" for folder in (grown, whole))
        ours, wanted = ([json.loads(x) for x in file.read_text().splitlines()] for file in found)
        assert [row["round"] for row in ours] == [row["round"] for row in wanted]
        assert ours == wanted
