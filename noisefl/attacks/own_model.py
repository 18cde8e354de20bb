"""The least that a client can do: keep what it trained."""

from typing import Any

import jax

from noisefl.attacks.base import Attack, View
from noisefl.experiment import Experiment
from noisefl.local import Own
from noisefl.parts import part


@part
class OwnModel(Attack):
    """The client's own model after local training, of the last round of the view."""

    @property
    def title(self) -> str:
        return "local"

    def steal(self, key: jax.Array, view: View, own: Own, public: Experiment) -> Any:
        return jax.tree.map(lambda leaf: leaf[-1, 0], view.returned)
