"""The least that a client can do: keep what it trained."""

import jax

from noisefl.attacks.base import Attack, Params, Public, View, newest
from noisefl.local import Own
from noisefl.parts import part


@part
class OwnModel(Attack):
    """The client's own model after local training, of the newest round."""

    @property
    def title(self) -> str:
        return "local"

    def steal(self, key: jax.Array, view: View, own: Own, public: Public) -> Params:
        return newest(view, view.returned)
