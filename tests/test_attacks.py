"""The contract of attacks, and that a thief's view holds no secret of the round.

What each thief of the package does is in `test_thieves` and `test_thieves_alone`, and how views are
made in `test_theft`.
"""

import inspect
from typing import Any, ClassVar

import example_parts as examples
import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from noisefl import attacks, evaluate, keys, measure, models, noise, theft
from noisefl.attacks import Attack, Public, View
from noisefl.local import Own
from noisefl.parts import implementations, part, static

CLASSES = [*filter(fed.ours, implementations(Attack)), examples.Patient, examples.Coalition]
DATA, EXPERIMENT = fed.federation(), fed.TINY.resolved()
BASE = fed.start().base
ROUNDS, MEMBERS = 3, 2


def own(k: int = 0) -> Own:
    return Own(DATA.train_images, DATA.train_labels, DATA.clients[k], DATA.counts[k])


def public(cls: type = Attack) -> Public:
    """The first layer carries noise; the model is a linen module for who needs one."""
    known = theft.public(EXPERIMENT, fed.IMAGE)
    if cls is attacks.Ridge:
        return fed.replaced(known, functions=models.functions(fed.TinyCNN()))
    return known


def view(rounds: int = ROUNDS, members: int = MEMBERS, questions: bool = False) -> View:
    """Made up: row j of member a is of round t = 2 j + a + 1; copies add a / 100 in the head and
    some noise in the stem, and what came back 0.02 t."""
    t = 2 * np.arange(rounds)[:, None] + np.arange(members) + 1
    rng = np.random.default_rng(3)

    def seen(path: Any, w: Any, scale: float) -> Any:
        wide = jnp.float32(t).reshape(rounds, members, *[1] * w.ndim)
        if scale:
            return w + scale * wide
        if "stem" in str(path):
            return w + jnp.float32(rng.normal(0, 0.1, (rounds, members, *w.shape)))
        return w + 0.01 * jnp.ones_like(wide) * jnp.arange(members).reshape(members, *[1] * w.ndim)

    copies, returned = (
        jax.tree_util.tree_map_with_path(lambda p, w, s=s: seen(p, w, s), BASE) for s in (0, 0.02)
    )
    there = jnp.ones((rounds, members), bool)
    known = jax.tree.map(lambda touched: 0.1 * touched * there, public().touched)
    found = View(copies, returned, there, jnp.int32(t), known)
    if not questions:
        return found
    asked = jnp.asarray(fed.images(np.arange(24) % fed.CLASSES, rng))
    answers = jax.nn.softmax(fed.forward(BASE, evaluate.scale(asked)))
    return fed.replaced(found, questions=asked, answers=answers)


def small(cls: type) -> Any:
    few = {"steps": 5, "batch_size": 8, "asked": 24}
    return cls(**{name: few[name] for name in few if name in cls.__dataclass_fields__})


@jax.jit
def steal(thief, key, view, own, public):
    return thief.steal(key, view, own, public)


def differ(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_an_attack_makes_a_model_of_a_view(cls):
    thief, known = small(cls), public(cls)
    thief.fit(known.functions, fed.IMAGE)
    given = keys.root(1), view(questions="V5" in cls.views), own(), known
    stolen = steal(thief, *given)
    if not fed.ours(cls):  # the package's are compared out of jit in `test_thieves`
        fed.assert_same(stolen, thief.steal(*given), **fed.CLOSE)
    assert jax.tree.structure(stolen) == jax.tree.structure(BASE)
    assert jax.tree.map(jnp.shape, stolen) == jax.tree.map(jnp.shape, BASE)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stolen))
    fed.assert_same(steal(thief, *given), stolen)  # the key is all that is random
    assert thief.title
    assert set(cls.views) <= set(attacks.VIEWS)
    # What it makes of its view is all that it knows: another view is another model, unless it is a
    # control, which looks at none.
    names = ("copies", "returned")
    twice = {n: jax.tree.map(lambda leaf: 2 * leaf, getattr(given[1], n)) for n in names}
    other = steal(thief, given[0], fed.replaced(given[1], **twice), *given[2:])
    assert differ(other, stolen) == (not cls.control)


def test_there_is_a_thief_for_every_view_and_a_control():
    seen = {view for cls in CLASSES for view in cls.views}
    assert seen == set(attacks.VIEWS)
    assert [cls.__name__ for cls in CLASSES if cls.control] == ["Scratch"]
    titles = [small(cls).title for cls in CLASSES if fed.ours(cls)]
    assert len(set(titles)) == len(titles)


def test_the_clients_own_model_is_what_it_returned_last():
    """Rows are in order of time for each member; the last one may be of another."""
    seen = view()
    there = np.ones((ROUNDS, MEMBERS), bool)
    for absent, (j, a) in [([], (2, 1)), ([5], (2, 0)), ([4], (1, 1)), ([1, 2, 3], (0, 0))]:
        there.flat[absent] = False
        mine = fed.replaced(seen, present=jnp.asarray(there))
        for attack, leaves in ((attacks.OwnModel, seen.returned), (attacks.BareCopy, seen.copies)):
            stolen = attack().steal(keys.root(0), mine, own(), public())
            fed.assert_same(stolen, jax.tree.map(lambda leaf, j=j, a=a: leaf[j, a], leaves))


def test_of_two_who_were_there_the_first_members_copy_is_the_newest():
    seen = view()
    same = fed.replaced(seen, rounds=jnp.broadcast_to(seen.rounds[:, :1], seen.rounds.shape))
    stolen = attacks.BareCopy().steal(keys.root(0), same, own(), public())
    fed.assert_same(stolen, jax.tree.map(lambda leaf: leaf[2, 0], seen.copies))


VIEWS: list[View] = []


@part
class Recording(attacks.Attack):
    """Keeps what it sees; its model is the copy."""

    abstract: ClassVar[bool] = True
    into: Any = static(VIEWS.append, "where")

    def steal(self, key, view, own, public):
        jax.debug.callback(self.into, view)
        assert set(public.__dataclass_fields__) == KNOWN
        return jax.tree.map(lambda leaf: leaf[-1, 0], view.copies)


KNOWN = {"touched", "local", "functions", "image_shape", "batch"}


def test_no_secret_of_the_round_is_in_a_view():
    """A view is built without the issue, and of a protected round holds neither ξ nor its draw."""
    fields = {"copies", "returned", "present", "rounds", "spread", "questions", "answers"}
    assert set(View.__dataclass_fields__) == fields
    assert set(Public.__dataclass_fields__) == KNOWN
    for cls in filter(fed.ours, implementations(measure.Measure)):
        for told in (cls.observe, cls.conclude):
            assert not {"issue", "info", "state"} & set(inspect.signature(told).parameters)
    for made in vars(theft).values():
        if inspect.isfunction(made):
            assert not {"issue", "info", "secret"} & set(inspect.signature(made).parameters)
    experiment = fed.experiment(warmup_rounds=0, strength=2.0)
    before = fed.start(experiment)
    _, info = fed.step(fed.KEY, before, DATA, experiment)
    secret, thief = info.issue.secret, measure.Thief(attack=Recording(), test_images=0)
    xi = noise.Where().scaled(before.base, secret.draw.common[0], secret.strength)
    hidden = [np.asarray(leaf) for leaf in (*secret.draw.common[0].values(), *xi.values())]

    @jax.jit
    def observe(copy, returned):
        return thief.observe(EXPERIMENT, DATA, jnp.int32(1), fed.KEY, copy, returned, own())

    VIEWS.clear()
    for slot in range(4):
        copy, returned = fed.lane(info.observed, slot)
        found = observe(copy, returned)
        jax.effects_barrier()
        test = DATA.test_images, DATA.test_labels
        assert found == evaluate.accuracy(fed.forward, copy, *test, fed.TEST)
        seen = VIEWS[slot]
        assert (seen.questions, seen.answers) == (None, None)
        assert (seen.present.tolist(), seen.rounds.tolist()) == ([[True]], [[1]])
        assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(seen.spread))
        fed.assert_same(jax.tree.map(lambda leaf: leaf[0, 0], seen.copies), copy)
        fed.assert_same(jax.tree.map(lambda leaf: leaf[0, 0], seen.returned), returned)
        for leaf in map(np.asarray, jax.tree.leaves(seen)):
            assert leaf.shape[:2] == (1, 1)
            assert not any(np.array_equal(leaf[0, 0], one) for one in hidden)


def test_what_everybody_knows():
    known = public()
    assert jax.tree.map(bool, known.touched) == {
        "stem": {"kernel": True, "bias": True}, "head": {"kernel": False, "bias": False},
    }  # fmt: skip
    bare = theft.public(fed.experiment(scheme=fed.schemes.Bare()).resolved(), fed.IMAGE)
    assert not any(map(bool, jax.tree.leaves(bare.touched)))
    assert known.image_shape == fed.IMAGE
    fed.assert_same(known.local, EXPERIMENT.local)
