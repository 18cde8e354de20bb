"""The contract of an attack: what a thief has, and what it makes of it.

The thief knows everything but the server's secrets (Kerckhoffs) and follows the protocol.
"""

from typing import Any, ClassVar

import jax
from flax import struct

from noisefl.experiment import Experiment
from noisefl.local import Own
from noisefl.parts import Part, name_of, part

Params = Any


@struct.dataclass
class View:
    """What A members of a coalition have seen in J rounds. It is built without the round's issue,
    so that no secret of the scheme can be in it."""

    copies: Params  # [J, A, ...]: the models that they received
    returned: Params  # [J, A, ...]: the models that they gave back
    present: jax.Array  # bool [J, A]: who took part; elsewhere copies and returned mean nothing


@part
class Attack(Part):
    """Base: a part with `steal`, pure, so that it maps over thieves, rates and seeds."""

    abstract: ClassVar[bool] = True

    @property
    def title(self) -> str:
        """What its figures are called."""
        return name_of(type(self))

    def steal(self, key: jax.Array, view: View, own: Own, public: Experiment) -> Params:
        """The thief's model.

        Args:
          key: its randomness.
          view: what it has seen.
          own: the data of its first member.
          public: the experiment, of which everything is known; the scheme's secrets are not in it.
        """
        raise NotImplementedError
