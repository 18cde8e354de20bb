"""The contract of attacks, and that a thief's view holds no secret of the round."""

import inspect
from typing import Any, ClassVar

import example_parts as examples
import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from noisefl import attacks, evaluate, keys, measure, noise
from noisefl.attacks import View
from noisefl.local import Own
from noisefl.parts import implementations, part, static

CLASSES = [*filter(fed.ours, implementations(attacks.Attack))]
CLASSES += [examples.FineTune, examples.Coalition]
DATA, EXPERIMENT = fed.federation(), fed.TINY.resolved()


def own(k: int = 0) -> Own:
    return Own(DATA.train_images, DATA.train_labels, DATA.clients[k], DATA.counts[k])


def view(rounds: int = 2, members: int = 2) -> View:
    """Copies and what came back, made up: round j and member a add 10 j + a to W."""
    base = fed.start().base

    def seen(scale: float) -> Any:
        ja = 10 * np.arange(rounds)[:, None] + np.arange(members)
        return jax.tree.map(
            lambda w: w + scale * jnp.float32(ja).reshape(rounds, members, *[1] * w.ndim), base
        )

    return View(seen(0.01), seen(0.02), jnp.ones((rounds, members), bool))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_attack_makes_a_model_of_a_view(cls):
    thief = cls()

    def steal(key, view, own):
        return thief.steal(key, view, own, EXPERIMENT)

    given = (keys.root(1), view(), own())
    stolen = jax.jit(steal)(*given)
    fed.assert_same(stolen, steal(*given), **fed.CLOSE)
    base = fed.start().base
    assert jax.tree.map(jnp.shape, stolen) == jax.tree.map(jnp.shape, base)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stolen))
    assert thief.title
    # What it makes of its view is all that it knows: another view is another model.
    changed = jax.tree.map(lambda leaf: 2 * leaf, (given[1].copies, given[1].returned))
    other = steal(given[0], View(*changed, given[1].present), given[2])  # pyright: ignore
    assert not np.array_equal(other["stem"]["kernel"], stolen["stem"]["kernel"])


def test_the_clients_own_model_is_what_it_returned_last():
    seen = view(3, 1)
    stolen = attacks.OwnModel().steal(keys.root(0), seen, own(), EXPERIMENT)
    fed.assert_same(stolen, jax.tree.map(lambda leaf: leaf[2, 0], seen.returned))


VIEWS: list[View] = []


@part
class Recording(attacks.Attack):
    """Keeps what it sees; its model is the copy."""

    abstract: ClassVar[bool] = True
    into: Any = static(VIEWS.append, "where")

    def steal(self, key, view, own, public):
        jax.debug.callback(self.into, view)
        assert public is EXPERIMENT
        return jax.tree.map(lambda leaf: leaf[-1, 0], view.copies)


def test_no_secret_of_the_round_is_in_a_view():
    """A view is built without the issue, and of a protected round holds neither ξ nor its draw."""
    assert set(View.__dataclass_fields__) == {"copies", "returned", "present"}
    for cls in filter(fed.ours, implementations(measure.Measure)):
        assert not {"issue", "info"} & set(inspect.signature(cls.observe).parameters)
    experiment = fed.experiment(warmup_rounds=0, strength=2.0)
    before = fed.start(experiment)
    _, info = fed.step(fed.KEY, before, DATA, experiment)
    secret, thief = info.issue.secret, measure.Thief(attack=Recording(), test_images=0)
    xi = noise.Where().scaled(before.base, secret.draw, secret.strength)
    hidden = [np.asarray(leaf) for leaf in (*secret.draw.values(), *xi.values())]

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
        fed.assert_same(jax.tree.map(lambda leaf: leaf[0, 0], seen.copies), copy)
        fed.assert_same(jax.tree.map(lambda leaf: leaf[0, 0], seen.returned), returned)
        for leaf in map(np.asarray, jax.tree.leaves(seen)):
            assert leaf.shape[:2] == (1, 1)
            assert not any(np.array_equal(leaf[0, 0], one) for one in hidden)
