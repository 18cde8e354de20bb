"""The contract of schemes, on all that there are: the package's and `example_parts`'."""

import functools
from typing import Any

import example_parts as examples
import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import noisefl
from noisefl import calibrate, keys, schemes
from noisefl.local import Own
from noisefl.parts import changed, implementations
from noisefl.round import members_of
from noisefl.schemes import Slot

CLASSES = [*filter(fed.ours, implementations(schemes.Scheme))]
CLASSES += [examples.Stretched, examples.LeftIn, examples.Sparse, *examples.CORNERS]
each_scheme = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
CALIBRATED = [cls for cls in CLASSES if issubclass(cls, schemes.Calibrated)]
DRAW_NOTHING = schemes.Bare, schemes.Withheld, schemes.Statistics
M, PROTECTED, EARLY = 4, 5, 1
DATA = fed.federation(fed.EQUAL)


def made(cls: type, strength=2.0, **fields) -> schemes.Scheme:
    """With a calibrator that never looks twice, and small enough for the tiny model."""
    rule = fields.pop("rule", None) or calibrate.Fixed(strength=strength)
    small = changed(cls(**fields), schemes.FewWeights, entries=5)
    return changed(small, schemes.Calibrated, calibrator=rule)


@functools.cache
def setting(cls: type) -> noisefl.Experiment:
    """With a model that the scheme can serve: the pair of functions, which is traced in a third of
    the time, or the same as a linen module."""
    try:
        made(cls).fit(fed.TINY.functions, fed.IMAGE, fed.TINY.cohort)
    except ValueError:
        return fed.TINY.replace(model=fed.TinyCNN()).resolved()
    return fed.TINY.resolved()


def own(slot: Slot) -> Own:
    k = slot.client
    return Own(DATA.train_images, DATA.train_labels, DATA.clients[k], DATA.counts[k])


def contract(cls: type, key, round, base, strength=2.0):
    """(issue, every client's copy, update and mask of a copy that nobody trained)."""
    scheme = made(cls, strength)
    experiment = setting(cls).replace(scheme=scheme)
    judge, model = experiment.judge(DATA), experiment.functions
    members: Any = members_of(key, experiment, DATA)
    if scheme.declares:  # each lacks one
        absent = jax.nn.one_hot(members.clients % fed.CLASSES, fed.CLASSES, dtype=bool)
        members = members.replace(classes=jnp.int32(~absent))
    carry = scheme.init(keys.stream(key, "scheme"), base)
    issue, _ = scheme.issue(key, round, base, base, members, judge, carry)

    def client(slot):
        copy = scheme.copy(base, issue, slot)
        returned = scheme.work(lambda params: params, copy, issue, slot, own(slot), model)
        return copy, *scheme.recover(returned, copy, base, issue, slot)

    slots = Slot(jnp.arange(M), members.groups, members.clients)
    return issue, *jax.vmap(client)(slots)


@functools.cache
def lanes(cls: type):
    """`contract` of six lanes: a protected round, the same again, its first lane's base halved,
    another key, a round of the warm-up, a protected round at strength 0."""
    base = fed.start().base
    bases = jax.tree.map(lambda w: jnp.stack([w, w, w / 2, w, w, w]), base)
    ks = jnp.stack([keys.root(seed) for seed in (0, 0, 0, 1, 0, 0)])
    rounds = jnp.array([PROTECTED] * 4 + [EARLY, PROTECTED])
    program = jax.jit(jax.vmap(functools.partial(contract, cls)))
    return base, fed.plain(program(ks, rounds, bases, jnp.array([2.0] * 5 + [0.0])))


def innermost(cls: type) -> type:
    scheme = cls()
    return type(scheme.innermost if isinstance(scheme, schemes.Wrapper) else scheme)


def differ(one, other) -> bool:
    return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(one),
               jax.tree.leaves(other), strict=True))  # fmt: skip


@each_scheme
def test_one_lane_is_the_single_call_and_a_key_decides(cls):
    base, all_lanes = lanes(cls)
    single = fed.plain(contract(cls, keys.root(0), jnp.int32(PROTECTED), base))
    fed.assert_same(fed.lane(all_lanes, 0), single, **fed.CLOSE)
    fed.assert_same(fed.lane(all_lanes, 1), fed.lane(all_lanes, 0))
    issue, copies, _, _ = all_lanes
    draws = not issubclass(innermost(cls), DRAW_NOTHING)
    assert differ(fed.lane(copies, 0), fed.lane(copies, 3)) == draws
    assert differ(fed.lane(issue.secret, 0), fed.lane(issue.secret, 3)) == draws


@each_scheme
def test_where_it_does_not_protect_clients_get_w_bitwise(cls):
    base, (issue, copies, updates, masks) = lanes(cls)
    bare = cls is schemes.Bare
    assert issue.protected.tolist() == [not bare] * 4 + [
        not bare and not issubclass(cls, schemes.Delayed),
        not bare,
    ]
    if not issue.protected[4]:
        issue = fed.lane(issue, 4)
        fed.assert_same(fed.lane(copies, 4), jax.tree.map(lambda w: np.stack([w] * M), base))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(fed.lane(updates, 4)))
        assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(fed.lane(masks, 4)))
        assert (issue.shipped, issue.feasible) == (True, True)
        assert not np.any([issue.strength, issue.relative_strength, *jax.tree.leaves(issue.bill)])
        assert np.isnan(issue.accuracy).all()
        assert (issue.weights == 1).all()


@pytest.mark.parametrize("cls", CALIBRATED, ids=lambda cls: cls.__name__)
def test_at_strength_0_clients_get_w_bitwise(cls):
    """And so the round is FedAvg's, up to the masks: all of them hold everything."""
    base, (issue, copies, updates, masks) = lanes(cls)
    fed.assert_same(fed.lane(copies, 5), jax.tree.map(lambda w: np.stack([w] * M), base))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fed.lane(updates, 5)))
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(fed.lane(masks, 5)))
    assert issue.relative_strength[5] == 0 < issue.relative_strength[0]


@each_scheme
def test_the_update_of_an_untrained_copy_is_0_as_declared(cls):
    base, (issue, copies, updates, _) = lanes(cls)
    for number in (0, 2, 3):
        mine = fed.lane(updates, number)
        assert differ(
            fed.lane(copies, number), jax.tree.map(lambda w: np.stack([w] * M), base)
        ) == (bool(issue.protected[number]) or number == 2)
        if made(cls).untrained == "none":  # what comes back is no model
            assert jax.tree.structure(mine) != jax.tree.structure(base)
        if made(cls).untrained == "bitwise":
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(mine))
        if made(cls).untrained == "weighted":
            shares = issue.weights[number] / issue.weights[number].sum()
            for leaf in jax.tree.leaves(mine):
                mean = np.tensordot(shares, leaf, 1)
                assert np.abs(mean).max() <= 4e-7 * max(np.abs(leaf).max(), 1)
    if made(cls).untrained == "expected":  # over many draws, all entries together
        many = jax.jit(jax.vmap(lambda key: contract(cls, key, jnp.int32(PROTECTED), base)[2]))
        found = many(jax.vmap(jax.random.key)(jnp.arange(50)))
        entries = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])
        entries = entries[entries != 0]
        assert abs(entries.mean()) < 6 * entries.std() / np.sqrt(entries.size)


@each_scheme
def test_copies_differ_where_it_says_and_as_many_as_it_says(cls):
    scheme, (base, (issue, copies, _, masks)) = made(cls), lanes(cls)
    functions = setting(cls).functions
    scheme.fit(functions, fed.IMAGE, fed.TINY.cohort)
    mine, flat = flatten_dict(fed.lane(copies, 0)), flatten_dict(base)
    touched = scheme.touched(functions, fed.IMAGE)
    for path, leaf in mine.items():
        assert path in touched or (leaf == np.asarray(flat[path])).all()  # pyright: ignore
    slots = scheme.slots(fed.TINY.cohort)
    distinct = {np.concatenate([np.ravel(leaf[s]) for leaf in mine.values()]).tobytes()  # pyright: ignore
                for s in range(M)}  # fmt: skip
    assert len(slots) == issue.accuracy.shape[1]
    # Two of these may be the same by chance.
    few = getattr(scheme, "moves", "") == "discrete" or scheme.declares
    assert len(distinct) <= len(slots) if few else len(distinct) == len(slots)
    assert len(set(slots.values())) == len(slots)
    assert masks is None or all(set(np.unique(leaf)) <= {0, 1} for leaf in jax.tree.leaves(masks))


@each_scheme
def test_what_a_copy_does_not_hold_is_0_and_said_to_be_so(cls):
    """Of parameters that are not 0 themselves: the mask is told from the copy, if any is."""
    scheme, (_, (_, copies, _, masks)) = made(cls), lanes(cls)
    if fed.ours(cls):
        assert scheme.partial == (masks is not None)
    if scheme.partial:
        full = jax.tree.map(lambda w: jnp.where(w == 0, 1.0, w), fed.start().base)
        _, copies, _, masks = jax.jit(functools.partial(contract, cls))(
            keys.root(0), jnp.int32(PROTECTED), full
        )
        fed.assert_same(jax.tree.map(lambda leaf: jnp.float32(leaf != 0), copies), masks)
        assert not all(np.all(leaf) for leaf in jax.tree.leaves(masks))


@each_scheme
def test_secrets_are_nowhere_but_among_the_secrets(cls):
    _, (issue, _, _, _) = lanes(cls)
    issue = fed.lane(issue, 0)
    hidden = [leaf for leaf in jax.tree.leaves(issue.secret) if leaf.size > 1]
    shown = jax.tree.leaves(fed.replaced(issue, secret=()))
    assert not any(np.array_equal(one, other) for one in hidden for other in shown)
    assert bool(hidden) == (cls not in (schemes.Bare, schemes.Statistics))


@pytest.mark.parametrize("cls", CALIBRATED, ids=lambda cls: cls.__name__)
def test_a_feasible_round_holds_the_cap_on_the_judging_split(cls):
    """The copies that clients get are those that a calibrator with that guarantee has seen."""
    judge = setting(cls).judge(DATA)
    cap = 0.98 if cls is schemes.SubModel else 0.6  # one unit of three alone gets 0.973

    @jax.jit
    def accuracies(key):
        base = jax.tree.map(jnp.float32, fed.trained())
        scheme = made(cls, rule=fed.LOOP.replace(cap=cap, strength=1.0))
        members = fed.TINY.cohort.draw(key, DATA.counts)
        carry = scheme.init(keys.stream(key, "scheme"), base)
        issue, _ = scheme.issue(key, jnp.int32(1), base, base, members, judge, carry)
        slots = Slot(jnp.arange(M), members.groups, members.clients)
        copies = jax.vmap(lambda slot: scheme.copy(base, issue, slot))(slots)
        return issue, jax.vmap(judge.accuracy)(copies), judge.accuracy(base)

    issue, found, bare = accuracies(keys.root(2))
    assert bare > cap
    assert issue.feasible == (found <= jnp.float32(cap)).all()
    assert issue.feasible
    assert np.max(found) == np.max(issue.accuracy)
    assert issue.bill.samples > 0


@each_scheme
def test_it_says_what_it_is_and_what_a_client_has_in_the_end(cls):
    scheme, (base, _) = made(cls), lanes(cls)
    assert scheme.untrained in ("bitwise", "weighted", "expected", "none")
    assert scheme.promise
    if fed.ours(cls):
        assert scheme.source
    if isinstance(scheme, schemes.Calibrated):
        assert scheme.moves in calibrate.Calibrator.judges

    def client(key, base):
        issue, copies, *_ = contract(cls, key, jnp.int32(PROTECTED), base)
        slot = Slot(*(jnp.int32(0),) * 3)
        copy, model = fed.lane(copies, 0), setting(cls).functions
        returned = scheme.work(lambda params: params, copy, issue, slot, own(slot), model)
        known = scheme.spread(copy, issue.strength, model, fed.IMAGE)
        return scheme.kept(returned, copy, issue), scheme.bytes_sent(base, issue), known

    kept, sent, known = jax.eval_shape(client, keys.root(0), base)
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, base)
    assert (sent.shape, sent.dtype) == ((), jnp.float32)
    assert set(known) <= set(scheme.touched(setting(cls).functions, fed.IMAGE))
    assert all(leaf.shape == () for leaf in known.values())


# Through a whole round.


def test_a_coordinate_that_nobody_held_keeps_w():
    experiment = fed.TINY.replace(scheme=schemes.Warmup(examples.Sparse(share=0.2), 0))
    before = fed.start(experiment)
    after, info = fed.step(fed.KEY, before, DATA, experiment)
    scheme = experiment.scheme.inner
    slots = Slot(jnp.arange(M), info.members.groups, info.members.clients)
    held = jax.vmap(lambda slot: scheme.held(before.base, info.issue, slot))(slots)
    moved = 0
    for mask, old, new in zip(*map(jax.tree.leaves, (held, before.base, after.base)), strict=True):
        nobody = ~np.any(mask, axis=0)
        np.testing.assert_array_equal(np.asarray(new)[nobody], np.asarray(old)[nobody])
        assert nobody.any()
        moved += np.sum(np.asarray(new != old)[~nobody])
    assert moved


@pytest.mark.parametrize("clients", [1, 2])
def test_a_pair_needs_two_groups(clients):
    experiment = fed.experiment(clients_per_round=clients)
    if clients == 1:
        with pytest.raises(ValueError, match=r"^clients_per_round=1: .* at least 2$"):
            noisefl.init(fed.KEY, experiment, DATA)
    else:
        noisefl.init(fed.KEY, experiment, DATA)


def test_a_calibrator_that_cannot_judge_a_scheme_is_refused():
    class Discrete(schemes.Noised):
        moves: Any = "discrete"

    rule = next(c for c in implementations(calibrate.Calibrator) if "discrete" not in c.judges)
    with pytest.raises(ValueError, match=r"^calibrator='\w+': cannot judge discrete, whose copies"):
        Discrete(calibrator=rule())
