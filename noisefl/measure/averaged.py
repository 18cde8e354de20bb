"""How good the plain mean is of what the members of a coalition received in one round."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import evaluate, theft
from noisefl.data import Federation
from noisefl.experiment import Experiment
from noisefl.measure.base import Numbers, Regular
from noisefl.parts import part, size
from noisefl.round import RoundInfo, State, received


@part
class Averaged(Regular):
    """The largest accuracy on test of the mean of the copies of c clients, over ⌊M / c⌋ coalitions
    that share no member and take them from both groups in turn (PROTECTION.md, "Two-way noise").

    It stands beside the cap on a coalition (`schemes.Noised`), which is on what is judged in its
    place.
    """

    members: int = size(2, "c, of a coalition; of all M where there are fewer", unit="clients")

    def update(
        self, experiment: Experiment, before: State, after: State, info: RoundInfo,
        observed: Any, data: Federation, carry: Any,
    ) -> tuple[Numbers, Any]:  # fmt: skip
        groups, c = info.members.groups, min(self.members, info.members.groups.shape[0])
        number = groups.shape[0] // c
        coalitions = theft.in_turn(groups, number * c).reshape(number, c)
        how = experiment.strategy

        def one(slots: jax.Array) -> jax.Array:
            def plus(place: jax.Array, total: Any) -> Any:
                copy = received(experiment, before, info, slots[place])
                return jax.tree.map(jnp.add, total, copy)

            total = lax.fori_loop(0, c, plus, jax.tree.map(jnp.zeros_like, before.base))
            return evaluate.accuracy(
                experiment.functions.apply, jax.tree.map(lambda leaf: leaf / c, total),
                data.test_images, data.test_labels, how.eval_batch or 1, how.clients_axis,
            )  # fmt: skip

        largest = lax.cond(
            self.due(after.round) & info.issue.shipped,
            lambda: jnp.max(lax.map(one, coalitions)),
            lambda: jnp.float32(jnp.nan),
        )
        return {"averaged_accuracy_max": largest}, carry
