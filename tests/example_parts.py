"""Parts as users write them, for the contracts: those of docs/extending.md, and what none of them
needs: a scheme with masks and a sticky key, noise that stays in, a thief with two copies."""

import dataclasses
import re
import types
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from noisefl import attacks, calibrate, keys, schemes
from noisefl.parts import Number, Part, number, part

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
FILES = {
    block.split("\n")[0].removeprefix("# "): block
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
}


def load(name: str) -> types.ModuleType:
    """A file of the page as a module of its own, whose parts `implementations` does not see."""
    found = types.ModuleType(name)
    exec(compile(FILES[name], name, "exec"), found.__dict__)
    for made in vars(found).values():
        if isinstance(made, type) and issubclass(made, Part) and made.__module__ == name:
            made.abstract = True  # pyright: ignore[reportAttributeAccessIssue]
    return found


Stretched = load("stretched.py").Stretched
OwnNoise = schemes.own_noise  # the package's, for tests that want any scheme of a copy a client
Median = load("median.py").Median
Signs = load("signs.py").Signs
Patient = load("patient.py").Patient
Distance = load("distance.py").Distance


def corner(name: str, **defaults: Any) -> type[schemes.Noised]:
    """`schemes.Noised` with other defaults, for a contract that makes a class without arguments."""
    specs = {field.name: field for field in dataclasses.fields(schemes.Noised)}
    body: dict[str, Any] = {"__doc__": f"{name} noise.", "__annotations__": {}, "abstract": True}
    for field, value in defaults.items():
        body[field] = dataclasses.field(default=value, metadata=specs[field].metadata)
        body["__annotations__"][field] = specs[field].type
    body["__annotations__"]["abstract"] = ClassVar[bool]
    return part(type(name, (schemes.Noised,), {**body, "__module__": __name__}))


TAKEN_OUT = {"signs": "same", "cancellation": "subtract"}
CORNERS = [
    corner("SameForAll", signs="same"),
    corner("TwoPairs", common_draws=2),
    corner("OwnFresh", own="fresh", common=0.0, **TAKEN_OUT),
    corner("OwnFreshLeftIn", own="fresh", common_draws=2),
    corner("OwnSticky", own="sticky", common=0.0, **TAKEN_OUT),
    corner("TwoWay", own="sticky", **TAKEN_OUT),
    corner("TwoWayAgainstTwo", own="sticky", coalition=2.0, coalition_rounds=3.0, **TAKEN_OUT),
]


@part
class LeftIn(Stretched):
    """Own factors for every client, left in: what they add has mean 0 over draws."""

    abstract: ClassVar[bool] = True
    untrained: ClassVar[str] = "expected"

    def recover(self, returned, copy, base, issue, slot):
        return jax.tree.map(jnp.subtract, returned, base), None


@part
class Sparse(schemes.Scheme):
    """Client k holds some coordinates of W, the same in all rounds, and 0 elsewhere."""

    abstract: ClassVar[bool] = True
    share: Number = number(0.4, "of the coordinates", low=0, high=1)

    def init(self, key, base):
        return key

    def issue(self, key, round, base, owner, members, judge, carry):
        size, zero, yes = members.counts.shape[0], jnp.float32(0), jnp.bool_(True)
        evidence, bill = jnp.full(size, jnp.nan), calibrate.Bill.empty()
        weights = jnp.ones(size)
        return schemes.Issue(carry, yes, yes, weights, zero, zero, yes, evidence, bill), carry

    def held(self, base, issue, slot):
        key = keys.stream(issue.secret, "held", slot.client)
        leaves, structure = jax.tree.flatten(base)
        each = zip(jax.random.split(key, len(leaves)), leaves, strict=True)
        masks = [jax.random.bernoulli(k, self.share, x.shape).astype(x.dtype) for k, x in each]
        return jax.tree.unflatten(structure, masks)

    def copy(self, base, issue, slot):
        return jax.tree.map(jnp.multiply, base, self.held(base, issue, slot))

    def recover(self, returned, copy, base, issue, slot):
        return jax.tree.map(jnp.subtract, returned, copy), self.held(base, issue, slot)


@part
class Coalition(attacks.Attack):
    """The mean of the coalition's copies of the last round."""

    abstract: ClassVar[bool] = True

    def steal(self, key, view, own, public):
        return jax.tree.map(lambda leaf: jnp.mean(leaf[-1], axis=0), view.copies)
