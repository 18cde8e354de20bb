"""The strongest in sequence: average, then fine-tune (PROTECTION.md, "Thieves")."""

from typing import ClassVar

import jax

from noisefl.attacks.average import mean, weights
from noisefl.attacks.base import Params, Public, View
from noisefl.attacks.training import Training, labelled
from noisefl.local import Own
from noisefl.parts import part


@part
class AverageThenTune(Training):
    """All layers, from the mean of all copies on, each group of a round weighing as much."""

    views: ClassVar[tuple[str, ...]] = ("V2", "V3", "V4")

    def steal(self, key: jax.Array, view: View, own: Own, public: Public) -> Params:
        start = mean(view.copies, weights(view, public.touched))
        return self.descend(key, start, labelled(own, public), own.count)
