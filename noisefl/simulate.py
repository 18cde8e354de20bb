"""Many rounds as one compiled program, with their measurements inside."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import lax

from noisefl import evaluate, keys, noise, split, strategy
from noisefl.config import Config, Hyper, as_arrays, refuse
from noisefl.data import FederatedData
from noisefl.rounds import Round, RoundInfo, RoundState


@struct.dataclass
class Metrics:
    """What is recorded of one round; in a chunk every field has a leading axis [R].

    Accuracies are shares of the whole split. The shared copies are those distributed in the round,
    before training (with `shipped` false: those that would have been, had the cap held); owner and
    base are those after it.
    """

    round: jax.Array  # int32
    protected: jax.Array  # bool: past warm-up, so that the cap applied
    owner_accuracy: jax.Array  # float32: G on test
    base_accuracy: jax.Array  # float32: W on test
    plus_accuracy: jax.Array  # float32: W + ξ on test
    minus_accuracy: jax.Array  # float32: W − ξ on test
    owner_validation_accuracy: jax.Array  # float32
    plus_validation_accuracy: jax.Array  # float32
    minus_validation_accuracy: jax.Array  # float32
    strength: jax.Array  # float32: σ, or r with noise_scale="relative"
    relative_strength: jax.Array  # float32: RMS of ξ over RMS of the noised parameters
    calibration_tries: jax.Array  # int32
    calibration_evaluations: jax.Array  # int32: models evaluated
    calibration_samples: jax.Array  # int32: forward passes of single images
    training_samples: jax.Array  # int32: images trained on, each local epoch counted
    feasible: jax.Array  # bool: the calibrator held its aim
    shipped: jax.Array  # bool: models were distributed
    local_accuracy_mean: jax.Array  # float32: clients' models after local training, on test
    local_accuracy_max: jax.Array  # float32
    finite: jax.Array  # bool: no NaN or infinity in owner or base


Simulation = Callable[
    [jax.Array, RoundState, FederatedData, Hyper, jax.Array], tuple[RoundState, Metrics]
]


def _measure(
    model: nn.Module,
    config: Config,
    base: Any,
    state: RoundState,
    info: RoundInfo,
    data: FederatedData,
) -> Metrics:
    calibration = info.calibration
    xi = noise.scaled(base, calibration.draw, calibration.strength, config.noise_scale)
    test = data.test_images, data.test_labels
    validation = data.validation_images, data.validation_labels
    batch = strategy.eval_batch(config)
    cut = split.at(model, tuple(calibration.draw), config.image_shape)

    def accuracy(params: Any, images_and_labels: tuple[jax.Array, jax.Array]) -> jax.Array:
        return evaluate.accuracy(model.apply, params, *images_and_labels, batch)

    def shared(images_and_labels: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        def both() -> tuple[jax.Array, ...]:
            copies = [noise.apply(base, xi, sign) for sign in (1, -1)]
            accuracy_of = split.accuracy_of(model, cut, base, *images_and_labels, batch)
            return tuple(accuracy_of(copy) for copy in copies)

        return lax.cond(
            calibration.strength > 0, both, lambda: (accuracy(base, images_and_labels),) * 2
        )

    plus, minus = shared(test)
    if config.accuracy_on == "validation":  # the calibrator has often measured it already
        plus_validation, minus_validation = lax.cond(
            jnp.isnan(calibration.plus_accuracy + calibration.minus_accuracy),
            lambda: shared(validation),
            lambda: (calibration.plus_accuracy, calibration.minus_accuracy),
        )
    else:
        plus_validation, minus_validation = shared(validation)
    base_accuracy = accuracy(state.base, test)
    return Metrics(
        round=state.round,
        protected=info.protected,
        owner_accuracy=lax.cond(  # in warm-up G = W
            info.protected, lambda: accuracy(state.owner, test), lambda: base_accuracy
        ),
        base_accuracy=base_accuracy,
        plus_accuracy=plus,
        minus_accuracy=minus,
        owner_validation_accuracy=accuracy(state.owner, validation),
        plus_validation_accuracy=plus_validation,
        minus_validation_accuracy=minus_validation,
        strength=calibration.strength,
        relative_strength=info.relative_strength,
        calibration_tries=calibration.tries,
        calibration_evaluations=calibration.evaluations,
        calibration_samples=calibration.samples,
        training_samples=info.training_samples,
        feasible=calibration.feasible,
        shipped=info.shipped,
        local_accuracy_mean=jnp.mean(info.local_accuracy),
        local_accuracy_max=jnp.max(info.local_accuracy),
        finite=info.finite,
    )


def chunk_of_rounds(
    round_: Round, model: nn.Module, config: Config, rounds_per_chunk: int
) -> Simulation:
    """`make_simulation` before jit: a pure function, for jit, vmap and `shard_map` of one's own."""
    if rounds_per_chunk < 1:
        raise refuse("rounds_per_chunk", rounds_per_chunk, "must be at least 1")

    def simulation(key, state, data, hyper, last_round):
        def run(state: RoundState) -> tuple[RoundState, Metrics]:
            new, info = round_.step(keys.stream(key, "round", state.round + 1), state, data, hyper)
            return new, _measure(model, config, state.base, new, info, data)

        empty = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run, state)[1]
        )

        def body(state: RoundState, _: None) -> tuple[RoundState, Metrics]:
            return lax.cond(state.round < last_round, run, lambda state: (state, empty), state)

        return lax.scan(body, state, length=rounds_per_chunk)

    return simulation


def make_simulation(
    round_: Round, model: nn.Module, config: Config, rounds_per_chunk: int
) -> Simulation:
    """Compiles `rounds_per_chunk` rounds into one jitted program.

    Args:
      round_: of `make_round(model, config)`.
      model: the same model.
      config: the same config.
      rounds_per_chunk: R, rounds between two looks of the host.

    Returns:
      A jitted function (key, state, data, hyper, last_round int32 []) → (state, Metrics [R]). Round
      t uses the key stream ("round", t) of `key`. Rounds past `last_round` are not run; their rows
      are zero. The state is donated: it must not be used again.

    Raises:
      ValueError: `rounds_per_chunk` below 1.
    """
    return jax.jit(chunk_of_rounds(round_, model, config, rounds_per_chunk), donate_argnums=1)


def chunks(
    simulation: Simulation,
    key: jax.Array,
    state: RoundState,
    data: FederatedData,
    hyper: Hyper,
    rounds: int,
) -> Iterator[tuple[RoundState, list[dict[str, Any]]]]:
    """Goes on from `state` to round `rounds`, a chunk at a time.

    Args:
      simulation: of `make_simulation`, or its compiled form.
      key: of all rounds of the run; the same key goes on to the same result.
      state: donated.
      data: the federation.
      hyper: traced numbers.
      rounds: last round, counted from 1.

    Yields:
      (state, rows): the state after the chunk, valid until the generator advances, and a dict of
      plain Python values for each round in it.
    """
    done = int(state.round)
    while done < rounds:
        state, metrics = simulation(key, state, data, as_arrays(hyper), jnp.int32(rounds))
        finished = int(state.round)
        yield state, rows(metrics)[: finished - done]
        done = finished


def rows(metrics: Metrics) -> list[dict[str, Any]]:
    """One dict a round; floats are the shortest decimals that name the float32, so 0.6 is 0.6."""
    columns = jax.tree.map(np.asarray, metrics).__dict__
    return [
        {name: _plain(column[index]) for name, column in columns.items()}
        for index in range(len(columns["round"]))
    ]


def _plain(value: Any) -> bool | int | float:
    return float(str(value)) if value.dtype == np.float32 else value.item()
