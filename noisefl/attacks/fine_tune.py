"""Fine-tuning: the copy trained on, all of it (PROTECTION.md, "Thieves")."""

import jax

from noisefl.attacks.base import Params, Public, View, newest
from noisefl.attacks.training import Training, labelled
from noisefl.local import Own
from noisefl.parts import part


@part
class FineTune(Training):
    """All layers, from the newest copy."""

    def steal(self, key: jax.Array, view: View, own: Own, public: Public) -> Params:
        return self.descend(key, newest(view, view.copies), labelled(own, public), own.count)
