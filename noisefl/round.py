"""One round of federated learning under a scheme, a pure function.

ALGORITHM.md, "One round", line by line; each part that a line names is its own file. FedAvg is the
same round with a warm-up that never ends (`experiment.fedavg`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from noisefl import evaluate, keys
from noisefl.cohort import Members, mapped
from noisefl.data import Federation
from noisefl.errors import refuse, whole
from noisefl.experiment import Experiment
from noisefl.local import Own
from noisefl.schemes import Issue, Slot

Params = Any
Observer = Callable[[jax.Array, Params, Params, Own], Any]


@struct.dataclass
class State:
    """What one round hands to the next."""

    round: jax.Array  # int32 []: rounds completed
    base: Params  # W, that the copies of the next round start from
    owner: Params  # G, delivered to the requester; no client ever sees it
    scheme: Any  # what the scheme remembers,
    server: Any  # the server's optimizer,
    held: Any  # the owner part,
    measured: Any = ()  # and a measure (`simulate`)


@struct.dataclass
class RoundInfo:
    """What happened in a round of M clients."""

    members: Members
    issue: Issue  # what was handed out, its secrets included: for the server and the simulation
    told: dict[str, jax.Array]  # by the owner part: "server_counts" float32 [s]
    observed: Any  # by `observe`, of each client [M, ...]
    followed: Any  # (copies, returned) [A, ...] of `follow`; 0 where a place stayed empty
    training_samples: jax.Array  # int32 []: images that clients trained on, each epoch counted
    finite: jax.Array  # bool []: no parameter of the new owner or base is NaN or infinite


def init(key: jax.Array, experiment: Experiment, data: Federation) -> State:
    """`initialise w;  W = G = w`.

    Args:
      key: the run's root, `keys.root(seed)`; the same that every `step` is given.
      experiment: of one run, numbers [].
      data: of which shapes are read.

    Raises:
      ValueError: parts that do not fit each other, the model or the data.
    """
    experiment = experiment.resolved()
    check_labels(experiment, data)
    experiment.scheme.fit(experiment.functions, data.image_shape, experiment.cohort)
    begin = keys.stream(key, "init")
    params = experiment.functions.init(begin, data.image_shape)
    return State(
        round=jnp.int32(0),
        base=params,
        owner=jax.tree.map(jnp.copy, params),  # its own buffers: the state may be donated
        scheme=experiment.scheme.init(keys.stream(begin, "scheme"), params),
        server=experiment.server.init(params),
        held=experiment.owner.init(params),
    )


def check_labels(experiment: Experiment, data: Federation) -> None:
    """Raises ValueError where the model does not take the images, or where a label has no logit;
    that is told outside of a program alone."""
    model = experiment.functions
    model.shapes(data.image_shape)
    every = data.train_labels, data.validation_labels, data.test_labels
    if any(isinstance(labels, Tracer) for labels in every):
        return
    classes, largest = model.classes(data.image_shape), max(int(np.asarray(x).max()) for x in every)
    if largest >= classes:
        allowed = f"has logits of {classes} classes, and there are labels up to {largest}"
        raise refuse("model", model.name, allowed)


def step(
    key: jax.Array,
    state: State,
    data: Federation,
    experiment: Experiment,
    observe: Observer | None = None,
    follow: Callable[[Members], jax.Array] | None = None,
    followers: int = 0,
) -> tuple[State, RoundInfo]:
    """Round t = state.round + 1; composes with jit, scan, and vmap over keys, states, experiments.

    Args:
      key: the run's root key, the same in every round: the round's own is derived from it and t.
      state: of `init`, or of the round before.
      data: the federation.
      experiment: the parts.
      observe: (key, copy, returned, own data) → pytree, called for each client where it trains;
        it sees what the client sees and changes nothing.
      follow: members → int32 [M]: the place 0 … A − 1 of those whose models are to be kept, A of
        the others.
      followers: A.

    Raises:
      ValueError: a population smaller than the cohort.
    """
    experiment = experiment.resolved()
    scheme, strategy = experiment.scheme, experiment.strategy
    model, judge = experiment.functions, experiment.judge(data)
    t = state.round + 1
    key = keys.of_round(key, t)

    members = members_of(key, experiment, data)  # a_t, b_t
    issue, remembered = scheme.issue(  # σ and ξ
        key, t, state.base, state.owner, members, judge, state.scheme
    )

    rate = scheme.rate(issue)
    asked = {} if rate is None else {"rate": rate}  # of your own `Training` only if need be

    def client(slot: Slot) -> tuple[Any, Any, Any]:  # w_k ← ClientUpdate(k, copy)
        own_key = keys.stream(key, "client", slot.client)
        k = slot.client
        own = Own(data.train_images, data.train_labels, data.clients[k], data.counts[k])

        def train(params: Params) -> Params:
            return experiment.local.train(own_key, t, model, params, own, strategy.gather, **asked)

        copy = scheme.copy(state.base, issue, slot)
        returned = scheme.work(train, copy, issue, slot, own, model)
        recovered = scheme.recover(returned, copy, state.base, issue, slot)
        seen = copy, scheme.kept(returned, copy, issue)
        told = observe(own_key, *seen, own) if observe else ()
        return recovered, told, seen if follow else ()

    weights = members.counts * issue.weights
    slots = Slot(jnp.arange(weights.shape[0]), members.groups, members.clients)
    places = follow(members) if follow else jnp.zeros_like(members.clients)
    averaged, observed, followed = mapped(
        client, (slots,), experiment.average, weights / jnp.sum(weights),
        strategy.clients_at_once or weights.shape[0], strategy.clients_axis, places, followers,
    )  # fmt: skip
    update, remembered = scheme.combine(averaged, state.base, issue, remembered)
    base, server = experiment.server.step(state.base, update, state.server)  # W
    base = experiment.running(key, base, state.base, update, judge)
    held = experiment.owner.update(  # G
        key, state.owner, base, members, data.counts, issue.protected, judge, state.held
    )

    new = State(t, held.base, held.owner, remembered, server, held.carry, state.measured)
    kept = state.replace(round=t, scheme=remembered)  # pyright: ignore[reportAttributeAccessIssue]
    new = jax.tree.map(lambda n, k: jnp.where(issue.shipped, n, k), new, kept)
    trained = jnp.sum(experiment.local.samples(members.counts), dtype=jnp.int32)
    return new, RoundInfo(
        members=members,
        issue=issue,
        told=held.told,
        observed=observed,
        followed=followed,
        training_samples=jnp.where(issue.shipped, trained, 0),
        finite=evaluate.is_finite((new.owner, new.base)),
    )


def members_of(key: jax.Array, experiment: Experiment, data: Federation) -> Members:
    """Who takes part in the round of this key, and what the scheme asks them for beforehand."""
    members = experiment.cohort.draw(key, data.counts)
    if not experiment.scheme.declares:
        return members
    classes = experiment.functions.classes(data.image_shape)
    own = data.classes_of(members.clients, classes)
    return members.replace(classes=own)  # pyright: ignore[reportAttributeAccessIssue]


def received(
    experiment: Experiment, before: State, info: RoundInfo, slot: int | jax.Array
) -> Params:
    """The model that the client in this slot of a round received.

    Args:
      experiment: of the round.
      before: the state that `step` was given.
      info: that it returned.
      slot: 0 … M − 1; `info.members.clients[slot]` says who that is.

    Raises:
      ValueError: no such slot.
    """
    members = info.members
    if not isinstance(slot, Tracer):  # JAX would take the last, or count from the end
        last = members.clients.shape[0] - 1
        slot = whole("slot", slot, 0, last, f"must be a whole number, 0 to {last}")
    place = Slot(jnp.int32(slot), members.groups[slot], members.clients[slot])
    return experiment.scheme.copy(before.base, info.issue, place)
