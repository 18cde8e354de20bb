"""One round of Noise-based Federated Averaging, a pure function.

ALGORITHM.md, "One round", line by line. FedAvg is the same round with the noise off: a warm-up
that never ends (`config.fedavg`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import lax

from noisefl import aggregate, calibrate, client, cohort, evaluate, keys, noise, split, strategy
from noisefl.calibrate import Calibration, Calibrator
from noisefl.config import Config, Hyper, refuse
from noisefl.data import FederatedData
from noisefl.probing import judging_split, make_probe

Params = Any


@struct.dataclass
class RoundState:
    """What one round hands to the next."""

    round: jax.Array  # int32 []: rounds completed
    owner: Params  # G, delivered to the requester; no client ever sees it
    base: Params  # W, that both copies of the next round start from
    owner_accuracy: (
        jax.Array
    )  # float32 []: G's on the judging split; −1 until an option asks for it
    warmed: jax.Array  # bool []: that accuracy has once exceeded the cap
    carry: Any  # the calibrator's


@struct.dataclass
class RoundInfo:
    """What happened in a round, M clients and s server-side clients."""

    clients: jax.Array  # int32 [M]: indices into the population, group a first
    signs: jax.Array  # float32 [M]: +1 received W + ξ, −1 received W − ξ
    server_counts: jax.Array  # float32 [s]: samples that the server-side clients counted for
    protected: jax.Array  # bool []: the round was past warm-up, so that the cap applied
    shipped: jax.Array  # bool []: models were distributed (Config.on_infeasible)
    calibration: Calibration
    relative_strength: jax.Array  # float32 []: RMS of ξ over RMS of the noised parameters
    training_samples: jax.Array  # int32 []: images that clients trained on, each epoch counted
    local_accuracy: jax.Array  # float32 [M]: the clients' own models after training, on test
    finite: jax.Array  # bool []: no parameter of the new owner or base is NaN or infinite


class Round(NamedTuple):
    """`init(key) → state` and `step(key, state, data, hyper) → (state, info)`, both pure.

    `step` consumes its key; it composes with jit, scan, and vmap over keys, states and hypers.
    """

    init: Callable[[jax.Array], RoundState]
    step: Callable[[jax.Array, RoundState, FederatedData, Hyper], tuple[RoundState, RoundInfo]]


def make_round(
    model: nn.Module,
    config: Config,
    *,
    optimizer: client.Optimizer | None = None,
    calibrator: Calibrator | None = None,
    clients_axis: str | None = None,
) -> Round:
    """Builds the round of a model and a config.

    Args:
      model: maps images [B, H, W, Ch] in [0, 1] to logits [B, C].
      config: static options.
      optimizer: of local training, (hyper, round) → optax transformation; default `client.sgd`.
      calibrator: default what `config.calibrator` names.
      clients_axis: a mapped axis over which the clients of a round are split, e.g. of a
        `shard_map`; all else in the round is then the same at each of its positions.

    Returns:
      Round(init, step).

    Raises:
      ValueError: `config.noise_layers` matches no parameter of the model; from `step`, data whose
        population or image shape is not the config's.
    """
    paths = noise.target(model, config)
    optimizer = optimizer or client.sgd(config)
    calibrator = calibrator or calibrate.from_config(config)
    signs = jnp.asarray(np.repeat([1.0, -1.0], config.groups), jnp.float32)
    apply = model.apply
    cut = split.at(model, paths, config.image_shape)
    batch = strategy.eval_batch(config)
    judged = config.keep_best or config.warmup == "until_cap"

    def judge(owner: Params, data: FederatedData) -> jax.Array:
        return evaluate.accuracy(apply, owner, *judging_split(data, config), batch)

    def init(key: jax.Array) -> RoundState:
        params = model.init(key, jnp.zeros((1, *config.image_shape)))["params"]
        return RoundState(
            round=jnp.int32(0),
            owner=params,
            base=jax.tree.map(jnp.copy, params),  # its own buffers: the state may be donated
            owner_accuracy=jnp.float32(-1),
            warmed=jnp.bool_(False),
            carry=calibrator.init(),
        )

    def step(
        key: jax.Array, state: RoundState, data: FederatedData, hyper: Hyper
    ) -> tuple[RoundState, RoundInfo]:
        _check(data, config)
        base, t = state.base, state.round + 1
        warming = t <= hyper.warmup_rounds
        if config.warmup == "until_cap":
            warming |= ~state.warmed

        # a_t, b_t, s_t
        order = jax.random.permutation(keys.stream(key, "groups"), config.num_clients)
        clients = order[: config.cohort].astype(jnp.int32)
        counts = data.counts[clients]
        borrowed = aggregate.borrowed_counts(keys.stream(key, "server"), data.counts, config)

        # σ and ξ
        def without() -> tuple[Calibration, Any]:
            shapes = jax.eval_shape(
                lambda key: noise.draw(key, base, paths, config.noise_distribution), key
            )
            return calibrate.no_noise(shapes), state.carry

        def calibrated() -> tuple[Calibration, Any]:
            probe = make_probe(model, cut, base, paths, data, config)
            stream = keys.stream(key, "calibration")
            return calibrator.calibrate(stream, base, probe, hyper, state.carry)

        calibration, carry = lax.cond(warming, without, calibrated)
        xi = noise.scaled(base, calibration.draw, calibration.strength, config.noise_scale)

        # w_k ← ClientUpdate(k, W ± ξ)
        def train(k: jax.Array, sign: jax.Array) -> tuple[Params, jax.Array]:
            start = noise.apply(base, xi, sign)
            client_key = keys.stream(key, "client", k)
            positions, valid = client.batches(
                client_key, data.counts[k], data.clients.shape[1], config
            )
            samples = data.clients[k][positions]
            images, labels = data.train_images, data.train_labels
            rule = optimizer(hyper, t)
            trained = client.update(
                apply, rule, start, images, labels, samples, valid, strategy.gather(config)
            )
            tested = slice(0, config.local_test_size or None)
            local_accuracy = evaluate.accuracy(
                apply,
                trained,
                data.test_images[tested],
                data.test_labels[tested],
                batch,
            )
            if config.cancellation == "subtract":
                trained = noise.remove(trained, start, base)
            return trained, local_accuracy

        weights = aggregate.shares(counts)
        if config.cancellation == "reweight":
            weights = jnp.where(warming, weights, aggregate.halves(weights, signs))
        average, local_accuracy = cohort.weighted_sum(
            train, (clients, signs), weights, strategy.clients_at_once(config), clients_axis
        )

        # G and W
        candidate = aggregate.include_server_clients(
            average, state.owner, jnp.sum(counts).astype(jnp.float32), jnp.sum(borrowed)
        )
        owner = _select(warming, average, candidate)
        accuracy = state.owner_accuracy
        if judged:
            accuracy = judge(owner, data)
        if config.keep_best:
            best = lax.cond(
                state.owner_accuracy < 0,
                lambda: judge(state.owner, data),
                lambda: state.owner_accuracy,
            )
            kept = ~warming & ~(accuracy >= best)
            owner, accuracy = _select(kept, (state.owner, best), (owner, accuracy))
        new_base = owner if config.next_base == "owner" else average

        shipped = calibration.feasible | (config.on_infeasible == "ship")
        accuracy = jnp.where(shipped, accuracy, state.owner_accuracy)
        new = RoundState(
            round=t,
            owner=_select(shipped, owner, state.owner),
            base=_select(shipped, new_base, base),
            owner_accuracy=accuracy,
            warmed=state.warmed | (accuracy > hyper.cap),
            carry=carry,
        )
        info = RoundInfo(
            clients=clients,
            signs=signs,
            server_counts=borrowed,
            protected=~warming,
            shipped=shipped,
            calibration=calibration,
            relative_strength=noise.relative_strength(
                base, paths, config.noise_scale, calibration.strength
            ),
            training_samples=jnp.where(shipped, jnp.sum(counts) * config.local_epochs, 0),
            local_accuracy=jnp.where(shipped, local_accuracy, jnp.nan),
            finite=evaluate.is_finite((new.owner, new.base)),
        )
        return new, info

    return Round(init, step)


def _select(condition: jax.Array, yes: Params, no: Params) -> Params:
    return jax.tree.map(lambda y, n: jnp.where(condition, y, n), yes, no)


def _check(data: FederatedData, config: Config) -> None:
    if data.counts.shape[0] != config.num_clients:
        raise refuse(
            "num_clients", config.num_clients, f"the data have {data.counts.shape[0]} clients"
        )
    if data.train_images.shape[1:] != tuple(config.image_shape):
        raise refuse(
            "image_shape", config.image_shape, f"the data's is {data.train_images.shape[1:]}"
        )
