"""Measures: what is recorded of a round. They change nothing of the run."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import evaluate, keys, split
from noisefl.attacks import Attack, OwnModel, View
from noisefl.data import Federation
from noisefl.experiment import Experiment
from noisefl.local import Own
from noisefl.parts import Part, child, children, part, size
from noisefl.round import RoundInfo, State, received

Params = Any
Numbers = dict[str, jax.Array]
Split = tuple[jax.Array, jax.Array]  # images uint8 [N, H, W, Ch], labels int32 [N]


@part
class Measure(Part):
    """Base: a part with `update`; `init` if it remembers something, `observe` if it looks at
    clients.

    What it remembers is in the checkpoint of a run.
    """

    abstract: ClassVar[bool] = True

    every: int = size(
        1, "rounds between two measurements off the test curves; the 2nd round has one",
        unit="rounds",
    )  # fmt: skip

    def due(self, round: jax.Array) -> jax.Array:
        """bool []: it is measured in round t. What is not measured is NaN, and null in a file."""
        return round % self.every == 2 % self.every

    def init(self, experiment: Experiment, data: Federation, state: State) -> Any:
        """What it remembers before the first round, from the state of `round.init`."""
        return ()

    def observe(
        self, experiment: Experiment, data: Federation, round: jax.Array, key: jax.Array,
        copy: Params, returned: Params, own: Own,
    ) -> Any:  # fmt: skip
        """Of one client, where it trains in round t: `info.observed` is that of all, [M, ...]."""
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


@part
class Protocol(Measure):
    """What happened, without looking at any model."""

    def update(
        self, experiment: Experiment, before: State, after: State, info: RoundInfo,
        observed: Any, data: Federation, carry: Any,
    ) -> tuple[Numbers, Any]:  # fmt: skip
        issue = info.issue
        return {
            "round": after.round,  # int32
            "protected": issue.protected,  # bool: past warm-up, so that the cap applied
            "strength": issue.strength,  # float32: σ, or r where the scale is relative
            "relative_strength": issue.relative_strength,
            "calibration_tries": issue.bill.tries,  # int32
            "calibration_evaluations": issue.bill.evaluations,  # int32: models looked at
            "calibration_samples": issue.bill.samples,  # int32: forward passes of single images
            "training_samples": info.training_samples,  # int32: images, each local epoch counted
            "feasible": issue.feasible,  # bool: the calibrator held its aim
            "shipped": issue.shipped,  # bool: models were distributed
            "finite": info.finite,  # bool: no NaN or infinity in owner or base
        }, carry


@part
class Accuracies(Measure):
    """Of G and W after the round and of the distributed copies before training, on test and
    validation: shares of the whole split. Where nothing shipped, the copies are those that would
    have been, had the cap held.

    `every` is of the accuracies on validation, except those that a calibrator has measured. What a
    round hands out bare was measured after the round before, and is remembered.
    """

    def init(self, experiment: Experiment, data: Federation, state: State) -> Any:
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


@part
class Thief(Measure):
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
        seen = jax.tree.map(lambda leaf: leaf[None, None], (copy, returned))
        view = View(*seen, present=jnp.ones((1, 1), bool))
        first = slice(0, self.test_images or None)
        how = experiment.strategy  # clients side by side share a forward pass
        batch = max((how.eval_batch or 1) // (how.clients_at_once or 1), 1)

        def measured() -> jax.Array:
            stolen = self.attack.steal(keys.stream(key, "thief"), view, own, experiment)
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


@part
class Standard(Measure):
    """What the drivers record: protocol, accuracies, and the clients' own models."""

    local_test_size: int = size(
        1000, "test images for clients' own models; 0: all", unit="images", low=0
    )
    more: tuple[Measure, ...] = children((), "measures of your own beside them")

    @property
    def parts(self) -> tuple[Measure, ...]:
        """The measures it is made of."""
        thief = Thief(attack=OwnModel(), test_images=self.local_test_size, every=self.every)
        return Protocol(), Accuracies(every=self.every), thief, *self.more

    def init(self, experiment: Experiment, data: Federation, state: State) -> Any:
        return tuple(one.init(experiment, data, state) for one in self.parts)

    def observe(
        self, experiment: Experiment, data: Federation, round: jax.Array, key: jax.Array,
        copy: Params, returned: Params, own: Own,
    ) -> Any:  # fmt: skip
        return tuple(
            one.observe(experiment, data, round, key, copy, returned, own) for one in self.parts
        )

    def update(
        self, experiment: Experiment, before: State, after: State, info: RoundInfo,
        observed: Any, data: Federation, carry: Any,
    ) -> tuple[Numbers, Any]:  # fmt: skip
        numbers, carries = {}, []
        for one, seen, own in zip(self.parts, observed, carry, strict=True):
            found, new = one.update(experiment, before, after, info, seen, data, own)
            numbers |= found
            carries.append(new)
        return numbers, tuple(carries)
