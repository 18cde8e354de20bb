"""How good the owner, the base and the copies are."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import evaluate, split
from noisefl.data import Federation
from noisefl.experiment import Experiment
from noisefl.measure.base import Numbers, Params, Regular
from noisefl.parts import part
from noisefl.round import RoundInfo, State, received

Split = tuple[jax.Array, jax.Array]  # images uint8 [N, H, W, Ch], labels int32 [N]


@part
class Accuracies(Regular):
    """Of G and W after the round and of the distributed copies before training, on test and
    validation: shares of the whole split. Where nothing shipped, the copies are those that would
    have been, had the cap held.

    `every` is of the accuracies on validation, except those that a calibrator has measured. What a
    round hands out bare was measured after the round before, and is remembered.
    """

    def init(self, key: jax.Array, experiment: Experiment, data: Federation, state: State) -> Any:
        """float32 [] twice: of W on test and on validation; NaN if not known."""
        apply, how = experiment.functions.apply, experiment.strategy
        return tuple(
            evaluate.accuracy(apply, state.base, *images, how.eval_batch or 1, how.clients_axis)
            for images in _splits(data)
        )

    def update(
        self, experiment: Experiment, before: State, after: State, info: RoundInfo,
        observed: Any, data: Federation, carry: Any,
    ) -> tuple[Numbers, Any]:  # fmt: skip
        test, validation = _splits(data)
        model, how = experiment.functions, experiment.strategy
        batch, axis = how.eval_batch or 1, how.clients_axis
        scheme, issue = experiment.scheme, info.issue
        slots = scheme.slots(experiment.cohort)
        places = jnp.asarray(list(slots.values()), jnp.int32)
        cut = split.at(model, scheme.touched(model, data.image_shape), data.image_shape)
        due, nan = self.due(after.round), jnp.float32(jnp.nan)

        def accuracy(params: Params, images: Split) -> jax.Array:
            return evaluate.accuracy(model.apply, params, *images, batch, axis)

        def sometimes(measured: Any) -> jax.Array:
            like = jax.eval_shape(measured)
            return lax.cond(due, measured, lambda: jnp.full(like.shape, nan))

        def copies(images: Split, of_base: jax.Array) -> jax.Array:
            """float32 [V]; of bare ones the first is looked at, if at all."""
            noised = issue.protected & (issue.strength > 0)

            def looked_at() -> jax.Array:
                of = split.accuracy_of(model, cut, before.base, *images, batch, axis)

                def one(number: jax.Array, found: jax.Array) -> jax.Array:
                    copy = received(experiment, before, info, places[number])
                    return found.at[number].set(of(copy))

                distinct = jnp.where(noised, len(slots), 1)
                found = lax.fori_loop(0, distinct, one, jnp.zeros(len(slots), jnp.float32))
                return jnp.where(noised, found, found[0])

            known = jnp.full(len(slots), of_base)
            return lax.cond(noised | jnp.isnan(of_base), looked_at, lambda: known)

        base_on_test, base_on_validation = carry
        on_test = copies(test, base_on_test)
        if experiment.accuracy_on == "validation" and issue.accuracy.shape == on_test.shape:
            on_validation = lax.cond(  # the calibrator has often measured it already
                jnp.any(jnp.isnan(issue.accuracy)),
                lambda: sometimes(lambda: copies(validation, base_on_validation)),
                lambda: issue.accuracy,
            )
        else:
            on_validation = sometimes(lambda: copies(validation, base_on_validation))
        base_accuracy = accuracy(after.base, test)
        owner_on_validation = sometimes(lambda: accuracy(after.owner, validation))
        named = {}
        for place, name in enumerate(slots if len(slots) <= 2 else []):
            named[f"{name}_accuracy"] = on_test[place]
            named[f"{name}_validation_accuracy"] = on_validation[place]
        return {
            "owner_accuracy": lax.cond(  # in warm-up G = W
                issue.protected, lambda: accuracy(after.owner, test), lambda: base_accuracy
            ),
            "base_accuracy": base_accuracy,
            "shared_accuracy": jnp.max(on_test),
            "owner_validation_accuracy": owner_on_validation,
            "shared_validation_accuracy": jnp.max(on_validation),
            **named,
        }, (base_accuracy, jnp.where(issue.protected, nan, owner_on_validation))


def _splits(data: Federation) -> tuple[Split, Split]:
    """Test and validation."""
    test = data.test_images, data.test_labels
    return test, (data.validation_images, data.validation_labels)
