"""What the drivers record."""

from typing import Any

import jax

from noisefl.attacks import OwnModel
from noisefl.cohort import Members
from noisefl.data import Federation
from noisefl.errors import refuse
from noisefl.experiment import Experiment
from noisefl.local import Own
from noisefl.measure.accuracies import Accuracies
from noisefl.measure.averaged import Averaged
from noisefl.measure.base import Conclusion, Following, Measure, Numbers, Params, Regular
from noisefl.measure.protocol import Protocol
from noisefl.measure.thief import Thief
from noisefl.parts import child, children, part, size
from noisefl.round import RoundInfo, State


@part
class Standard(Regular):
    """What the drivers record: protocol, accuracies, and the clients' own models."""

    local_test_size: int = size(
        1000, "test images for clients' own models; 0: all", unit="images", low=0
    )
    averaged: int = size(
        1, "c, the mean of whose copies is measured; 1: none", unit="clients",
    )  # fmt: skip
    thieves: Following | None = child(None, "what thieves make of it in the end", none="nothing")
    more: tuple[Measure, ...] = children((), "measures of your own beside them")

    @property
    def parts(self) -> tuple[Measure, ...]:
        """The measures it is made of."""
        local = Thief(attack=OwnModel(), test_images=self.local_test_size, every=self.every)
        last: tuple[Measure, ...] = () if self.thieves is None else (self.thieves,)
        if self.averaged > 1:
            last = (Averaged(members=self.averaged, every=self.every), *last)
        return Protocol(), Accuracies(every=self.every), local, *self.more, *last

    @property
    def _follows(self) -> tuple[int, Measure]:
        """The measure that follows clients, and its place; that of a view is one at most."""
        found = [(n, one) for n, one in enumerate(self.parts) if one.followers]
        return found[0] if found else (0, self.parts[0])

    def check(self) -> None:
        if sum(one.followers > 0 for one in self.parts) > 1:
            raise refuse("more", len(self.more), "at most one measure may follow clients")

    def init(self, key: jax.Array, experiment: Experiment, data: Federation, state: State) -> Any:
        return tuple(one.init(key, experiment, data, state) for one in self.parts)

    @property
    def followers(self) -> int:
        return self._follows[1].followers

    def places(self, members: Members, carry: Any) -> jax.Array:
        number, one = self._follows
        return one.places(members, carry[number])

    def observe(
        self, experiment: Experiment, data: Federation, round: jax.Array, key: jax.Array,
        copy: Params, returned: Params, own: Own,
    ) -> Any:  # fmt: skip
        return tuple(
            one.observe(experiment, data, round, key, copy, returned, own) for one in self.parts
        )

    def update(
        self, experiment: Experiment, before: State, after: State, info: RoundInfo,
        observed: Any, data: Federation, carry: Any,
    ) -> tuple[Numbers, Any]:  # fmt: skip
        numbers, carries = {}, []
        for one, seen, own in zip(self.parts, observed, carry, strict=True):
            found, new = one.update(experiment, before, after, info, seen, data, own)
            numbers |= found
            carries.append(new)
        return numbers, tuple(carries)

    @property
    def concludes(self) -> bool:
        return any(one.concludes for one in self.parts)

    def conclude(
        self, key: jax.Array, experiment: Experiment, data: Federation, owner: Params, carry: Any
    ) -> Conclusion:
        found: Conclusion = {}
        for one, own in zip(self.parts, carry, strict=True):
            found |= one.conclude(key, experiment, data, owner, own)
        return found
