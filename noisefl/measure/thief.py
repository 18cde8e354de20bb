"""What every client makes of its one copy, round by round."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import evaluate, keys, theft
from noisefl.attacks import Attack, OwnModel
from noisefl.data import Federation
from noisefl.experiment import Experiment
from noisefl.local import Own
from noisefl.measure.base import Numbers, Params, Regular
from noisefl.parts import child, part, size
from noisefl.round import RoundInfo, State


@part
class Thief(Regular):
    """What every client of a round makes of its one copy (view V1), on the first test images.

    Images lie in an order given by a hash of their content, so that the first ones are as good as a
    random sample.
    """

    attack: Attack = child(OwnModel, "what the thief does")
    test_images: int = size(1000, "test images for each thief; 0: all", unit="images", low=0)

    def observe(
        self, experiment: Experiment, data: Federation, round: jax.Array, key: jax.Array,
        copy: Params, returned: Params, own: Own,
    ) -> Any:  # fmt: skip
        view = theft.of_one(round, copy, returned)
        public = theft.public(experiment, data.image_shape)
        first = slice(0, self.test_images or None)
        how = experiment.strategy  # clients side by side share a forward pass
        batch = max((how.eval_batch or 1) // (how.clients_at_once or 1), 1)

        def measured() -> jax.Array:
            stolen = self.attack.steal(keys.stream(key, "thief"), view, own, public)
            return evaluate.accuracy(
                experiment.functions.apply, stolen, data.test_images[first],
                data.test_labels[first], batch,
            )  # fmt: skip

        return lax.cond(self.due(round), measured, lambda: jnp.float32(jnp.nan))

    def update(
        self, experiment: Experiment, before: State, after: State, info: RoundInfo,
        observed: Any, data: Federation, carry: Any,
    ) -> tuple[Numbers, Any]:  # fmt: skip
        seen = jnp.where(info.issue.shipped, observed, jnp.nan)
        title = self.attack.title
        return {
            f"{title}_accuracy_mean": jnp.mean(seen),
            f"{title}_accuracy_max": jnp.max(seen),
        }, carry
