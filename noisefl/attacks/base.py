"""The contract of an attack: what a thief has, and what it makes of it.

The thief knows everything but the server's secrets (Kerckhoffs) and follows the protocol. What it
has is a *view*, of the ladder of PROTECTION.md, "Threat model":

    V1  one client, one round          V4  a coalition's rounds, all of them
    V2  one client, all its rounds     V5  V4 and the owner's answers to questions
    V3  a coalition of one round
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from noisefl.local import Own, Training
from noisefl.models import Functions
from noisefl.parts import Part, name_of, part

Params = Any
VIEWS = ("V1", "V2", "V3", "V4", "V5")


@struct.dataclass
class View:
    """What A members of a coalition have seen in J rounds. It is built without the round's issue,
    so that no secret of the scheme can be in it.

    Where a member was not there, its entries are finite and mean nothing.
    """

    copies: Params  # [J, A, ...]: the models that they received
    returned: Params  # [J, A, ...]: what they have of the models that they gave back
    present: jax.Array  # bool [J, A]: who took part
    rounds: jax.Array  # int32 [J, A]: in which round t; rows are in order of time for each member
    spread: Params  # float32 [J, A] of each parameter: the standard deviation of copy − W that is
    #                 public (strength and scale of the noise are no secret); 0 where copies are W,
    #                 NaN where nothing is known
    questions: jax.Array | None = None  # V5: uint8 [Q, H, W, Ch], of `Attack.questions`
    answers: jax.Array | None = None  # V5: float32 [Q, C], the owner's probabilities


@struct.dataclass
class Public:
    """What everybody knows. An attack on one scheme takes what it must know of it as its fields."""

    touched: Params  # bool [] of each parameter: copies may differ from W in it
    local: Training  # how clients train
    functions: Functions = struct.field(pytree_node=False)  # the model
    image_shape: tuple[int, int, int] = struct.field(pytree_node=False)
    batch: int = struct.field(pytree_node=False)  # images of a forward pass, for speed alone


@part
class Attack(Part):
    """Base: a part with `steal`, pure, so that it maps over thieves, numbers and seeds.

    Attributes:
      views: views in which it is tried. What it makes of a smaller view counts for the larger ones
        that hold it as well, so that an attack on one copy names V1 alone.
      control: it reads no copy at all.
      restates: it trains, so that running statistics are to be estimated on its own images after.
    """

    abstract: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("V1",)
    control: ClassVar[bool] = False
    restates: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """What its figures are called."""
        return name_of(type(self))

    def fit(self, model: Functions, image_shape: tuple[int, int, int]) -> None:
        """Raises ValueError about a model that it cannot attack."""

    def candidates(self) -> "list[Attack]":
        """The same attack with other numbers [], itself among them: the thief takes the one that
        does best on data of its own that it holds out."""
        return [self]

    def questions(self, key: jax.Array, own: Own, public: Public) -> jax.Array | None:
        """V5: images uint8 [Q, H, W, Ch] that it has the owner classify."""
        return None

    def steal(self, key: jax.Array, view: View, own: Own, public: Public) -> Params:
        """The thief's model.

        Args:
          key: its randomness.
          view: what it has seen; at least one copy is present, and in V1 one alone.
          own: the data of its members, pooled: the first `count` of `rows` are valid.
          public: what everybody knows.
        """
        raise NotImplementedError


def newest(view: View, leaves: Params) -> Params:
    """Of leaves [J, A, ...] the entry of the newest round of the first member that is present."""
    rounds = jnp.where(view.present, view.rounds, -1)
    place = jnp.argmax(rounds.T.reshape(-1))  # members first, so that the first of equals is taken
    member, row = jnp.divmod(place, view.present.shape[0])
    return jax.tree.map(lambda leaf: leaf[row, member], leaves)
