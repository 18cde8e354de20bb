"""The control: the same thief with no copy at all (PROTECTION.md, "Thieves")."""

from typing import ClassVar

import jax

from noisefl import keys
from noisefl.attacks.base import Params, Public, View
from noisefl.attacks.training import Training, labelled
from noisefl.local import Own
from noisefl.parts import Number, number, part, size


@part
class Scratch(Training):
    """A fresh model trained on own data; a coalition pools its data."""

    control: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("V1", "V3")

    rate: Number = number(0.1, "η, in the middle of those tried", low=0, inside="()")
    steps: int = size(400, "batches that it trains on", unit="batches")

    def steal(self, key: jax.Array, view: View, own: Own, public: Public) -> Params:
        fresh = public.functions.init(keys.stream(key, "fresh"), public.image_shape)
        return self.descend(keys.stream(key, "tune"), fresh, labelled(own, public), own.count)
