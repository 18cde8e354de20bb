"""The copy as it was received (PROTECTION.md, "Thieves")."""

import jax

from noisefl.attacks.base import Attack, Params, Public, View, newest
from noisefl.local import Own
from noisefl.parts import part


@part
class BareCopy(Attack):
    """The newest copy, nothing done to it."""

    def steal(self, key: jax.Array, view: View, own: Own, public: Public) -> Params:
        return newest(view, view.copies)
