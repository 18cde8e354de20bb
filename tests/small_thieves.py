"""Small thieves, rounds and schemes for the tests of theft."""

from typing import Any, ClassVar

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from flax.traverse_util import flatten_dict

from noisefl import attacks, calibrate, keys, local, schemes, simulate, theft
from noisefl.attacks import View
from noisefl.local import Own
from noisefl.parts import Number, number, part, static

KEY = keys.root(0)


@part
class Moved(local.Training):
    """Training that takes no time to compile, of the client's own key and data all the same."""

    def train(self, key, round, model, params, own, gather, rate=None):
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


def flat(params: Any) -> dict[Any, Any]:
    return flatten_dict(params)  # pyright: ignore[reportReturnType]


@part
class Shortened(attacks.Scratch):
    """One step instead of many: a loop takes long to compile."""

    abstract: ClassVar[bool] = True

    @property
    def title(self) -> str:
        return "scratch"

    def descend(self, key, start, objective, count, trained=None):
        slope = jax.grad(objective)(start, jax.random.randint(key, (4,), 0, count), key)
        return jax.tree.map(lambda w, g: w - self.rate * g, start, slope)


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


@struct.dataclass
class Told:
    """Of one call of `steal`."""

    who: str = struct.field(pytree_node=False)
    factor: Any
    count: Any
    own: Own
    view: View


OWNER = jax.tree.map(lambda w: w + 0.6 * jnp.cos(9 * jnp.arange(w.size)).reshape(w.shape), BASE)
UNTOLD = simulate.untold(fed.TINY.resolved())
FEW = (attacks.BareCopy(), Shortened(), Scaled())


@pytest.fixture
def few_steps_of_the_server(monkeypatch):
    assert attacks.Scratch().steps < theft.SERVER_STEPS
    monkeypatch.setattr(theft, "Scratch", Shortened)
