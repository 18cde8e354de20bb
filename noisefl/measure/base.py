"""The contract of a measure: what is recorded of a round. It changes nothing of the run."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from noisefl.cohort import Members
from noisefl.data import Federation
from noisefl.experiment import Experiment
from noisefl.local import Own
from noisefl.parts import Part, part, size
from noisefl.round import RoundInfo, State

Params = Any
Numbers = dict[str, jax.Array]
Conclusion = dict[Any, dict[str, jax.Array]]  # by row, a NamedTuple that says of what, and column


@part
class Measure(Part):
    """Base: a part with `update`; `init` if it remembers something, `observe` if it looks at
    clients, `places` if it keeps models of some, `conclude` if there is something to say at the
    end.

    What it remembers is in the checkpoint of a run.
    """

    abstract: ClassVar[bool] = True

    def init(
        self, key: jax.Array, experiment: Experiment, data: Federation, state: State
    ) -> Any:  # fmt: skip
        """What it remembers before the first round.

        Args:
          key: the run's root.
          experiment: of the run, resolved.
          data: the federation.
          state: of `round.init`.

        Raises:
          ValueError: it cannot measure that.
        """
        return ()

    @property
    def followers(self) -> int:
        """A, clients of a round whose copies and models it is shown: `info.followed`."""
        return 0

    def places(self, members: Members, carry: Any) -> jax.Array:
        """int32 [M]: the place 0 … A − 1 of a client that it follows, A of the others."""
        return jnp.zeros(members.clients.shape, jnp.int32)

    def observe(
        self, experiment: Experiment, data: Federation, round: jax.Array, key: jax.Array,
        copy: Params, returned: Params, own: Own,
    ) -> Any:  # fmt: skip
        """Of one client, where it trains in round t: `info.observed` is that of all, [M, ...].

        `returned` is what the client has of its model.
        """
        return ()

    def update(
        self, experiment: Experiment, before: State, after: State, info: RoundInfo,
        observed: Any, data: Federation, carry: Any,
    ) -> tuple[Numbers, Any]:  # fmt: skip
        """Numbers [] by name, and what it remembers.

        Args:
          experiment: of the run, resolved.
          before: the state before the round.
          after: the state after it.
          info: what happened.
          observed: of `observe`, [M, ...].
          data: the federation.
          carry: of `init`, or of the round before.
        """
        raise NotImplementedError

    @property
    def concludes(self) -> bool:
        """It has something to say after the last round."""
        return False

    def conclude(
        self, key: jax.Array, experiment: Experiment, data: Federation, owner: Params, carry: Any
    ) -> Conclusion:
        """After the last round: arrays [] by row and column.

        It is a program of its own. It is not told the scheme, so that one program does for all.

        Args:
          key: the run's root.
          experiment: of the run, resolved, its scheme replaced by `schemes.Bare`.
          data: the federation.
          owner: G.
          carry: of the last round.
        """
        return {}


@part
class Regular(Measure):
    """Base of measures that cost much and need not be taken in every round."""

    abstract: ClassVar[bool] = True

    every: int = size(
        1, "rounds between two measurements off the test curves; the 2nd round has one",
        unit="rounds",
    )  # fmt: skip

    def due(self, round: jax.Array) -> jax.Array:
        """bool []: it is measured in round t. What is not measured is NaN, and null in a file."""
        return round % self.every == 2 % self.every


@part
class Following(Measure):
    """Base of measures that follow clients."""

    abstract: ClassVar[bool] = True
