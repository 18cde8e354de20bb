"""Theft: the views of thieves, made of rounds that were simulated, and what they come to.

A view holds models that clients received and what they have of those they gave back, and nothing of
the round's issue: no function here is given one (PROTECTION.md, "Threat model").
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from noisefl import attacks, evaluate, keys, running
from noisefl.attacks import Attack, Public, Scratch, View
from noisefl.data import Federation
from noisefl.experiment import Experiment
from noisefl.local import Own

Params = Any
Path = tuple[str, ...]

HELD_OUT = 0.25  # share of its images on which a thief compares its candidates
MOST_HELD_OUT = 1000  # images of them
SERVER_STEPS = 1000  # of the server alone: 10 passes over 5,000 images
CONTROLS = ("fedavg", "always", "never")


class Row(NamedTuple):
    """Of what a figure is."""

    thief: str  # title of the attack, or "server_alone"
    view: str  # of `attacks.VIEWS`; "V0" of the server alone, which sees none
    members: int  # of the coalition
    which: int  # of several single thieves


@struct.dataclass
class Seen:
    """What A followed clients have seen so far: the newest J rounds of each, in a ring."""

    clients: jax.Array  # int32 [A]: who they are; −1 before it is known
    times: jax.Array  # int32 [A]: rounds in which each took part
    copies: Params  # [J, A, ...]
    returned: Params  # [J, A, ...]
    rounds: jax.Array  # int32 [J, A]: t; 0 where nothing was seen yet
    spread: dict[Path, jax.Array]  # float32 [J, A] of each parameter, as of `attacks.View`
    touched: dict[Path, jax.Array]  # bool [] of each parameter, as of `attacks.Public`
    protected: jax.Array  # bool []: some round was
    # As `Scheme.partial`, which everybody knows.
    partial: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(
        cls, clients: jax.Array, base: Params, touched: Sequence[Path], rounds: int,
        partial: bool = False,
    ) -> "Seen":  # fmt: skip
        """Nothing yet.

        Args:
          clients: int32 [A].
          base: of which shapes are read.
          touched: of the scheme.
          rounds: J.
          partial: of the scheme.
        """
        shape = rounds, clients.shape[0]
        nothing = jax.tree.map(lambda w: jnp.zeros((*shape, *w.shape), w.dtype), base)
        paths: Any = flatten_dict(base)
        return cls(
            clients=clients,
            times=jnp.zeros_like(clients),
            copies=nothing,
            returned=jax.tree.map(jnp.copy, nothing),
            rounds=jnp.zeros(shape, jnp.int32),
            spread={path: jnp.zeros(shape) for path in paths},
            touched={path: jnp.bool_(path in touched) for path in paths},
            protected=jnp.bool_(False),
            partial=partial,
        )

    def plus(
        self, there: jax.Array, round: jax.Array, copies: Params, returned: Params,
        spread: dict[Path, jax.Array], protected: jax.Array,
    ) -> "Seen":  # fmt: skip
        """With another round.

        Args:
          there: bool [A]: who took part.
          round: int32 [], t.
          copies: [A, ...]; where somebody was not there they mean nothing.
          returned: [A, ...].
          spread: float32 [A] of those parameters of which it is known.
          protected: bool [], copies may differ from W.
        """
        length, followers = self.rounds.shape
        row, members = self.times % length, jnp.arange(followers)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            kept = jnp.where(there.reshape(-1, *[1] * (new.ndim - 1)), new, old[row, members])
            return old.at[row, members].set(kept)

        unknown = jnp.full(followers, jnp.nan)
        nothing = jnp.zeros(followers)
        news = {
            path: spread.get(path, jnp.where(touched & protected, unknown, nothing))
            for path, touched in self.touched.items()
        }
        return self.replace(  # pyright: ignore[reportAttributeAccessIssue]
            times=self.times + there,
            copies=jax.tree.map(put, self.copies, copies),
            returned=jax.tree.map(put, self.returned, returned),
            rounds=put(self.rounds, jnp.broadcast_to(round, followers)),
            spread={path: put(old, news[path]) for path, old in self.spread.items()},
            protected=self.protected | protected,
        )

    @property
    def view(self) -> View:
        """Of all of them, in order of time."""
        order = jnp.argsort(self.rounds, axis=0)  # what was never filled is round 0

        def sorted_(leaf: jax.Array) -> jax.Array:
            return leaf[order, jnp.arange(order.shape[1])]

        copies, returned, spread = jax.tree.map(
            sorted_, (self.copies, self.returned, unflatten_dict(self.spread))
        )
        rounds = sorted_(self.rounds)
        return View(copies, returned, rounds > 0, rounds, spread)


class Instance(NamedTuple):
    """One instance of a view: who of the followed sees what."""

    view: str  # of `attacks.VIEWS`
    members: int  # A of the coalition
    which: int  # of several of the same kind


def instances(singles: int, coalitions: Sequence[int], rounds: int) -> list[Instance]:
    """All views, smallest first. Of single thieves there are several; of each coalition one. Of one
    round alone V2 would be V1, and V4 be V3."""
    lonely, joint = (("V1", "V2"), ("V3", "V4", "V5")) if rounds > 1 else (("V1",), ("V3", "V5"))
    alone = [Instance(view, 1, which) for view in lonely for which in range(singles)]
    return alone + [Instance(view, c, 0) for view in joint for c in coalitions]


def present(view: View, part: Instance) -> jax.Array:
    """bool [J, A]: what is in that instance of a view, of the view of all."""
    followers = view.present.shape[1]
    first = part.which if part.members == 1 else 0
    members = (jnp.arange(followers) >= first) & (jnp.arange(followers) < first + part.members)
    mine = view.present & members
    if part.view in ("V1", "V3"):  # one round: the newest
        mine = mine & (view.rounds == jnp.max(jnp.where(mine, view.rounds, 0)))
    return mine


def in_turn(groups: jax.Array, number: int) -> jax.Array:
    """int32 [number]: slots of members of both groups in turn, group a first."""
    of_group = jnp.cumsum(groups == 1) * (groups == 1) + jnp.cumsum(groups == 0) * (groups == 0)
    return jnp.argsort(2 * of_group + groups)[:number]


def public(
    experiment: Experiment, image_shape: tuple[int, int, int], touched: Any = None
) -> Public:
    """What everybody knows.

    Args:
      experiment: resolved.
      image_shape: (H, W, Ch).
      touched: bool [] by path; default: of the experiment's scheme.
    """
    model = experiment.functions
    if touched is None:
        paths = experiment.scheme.touched(model, image_shape)
        shapes = model.shapes(image_shape)
        touched = {path: jnp.bool_(path in paths) for path in flatten_dict(shapes)}  # pyright: ignore
    return Public(
        touched=unflatten_dict(touched), local=experiment.local, functions=model,
        image_shape=image_shape, batch=experiment.strategy.eval_batch or 1,
    )  # fmt: skip


def completed(view: View, mask: jax.Array, partial: bool) -> View:
    """What bool [J, A] of a view leaves; a parameter that one of these copies does not hold is the
    mean of those that do, or 0.

    Args:
      view: of all.
      mask: which copies are there.
      partial: of the scheme: 0 says that it is not held.
    """
    if not partial:
        return view.replace(present=mask)  # pyright: ignore[reportAttributeAccessIssue]

    def one(leaf: jax.Array) -> jax.Array:
        held = leaf != 0
        there = held & mask.reshape(*mask.shape, *[1] * (leaf.ndim - 2))
        total = jnp.sum(jnp.where(there, leaf, 0), axis=(0, 1))
        return jnp.where(held, leaf, total / jnp.maximum(jnp.sum(there, axis=(0, 1)), 1))

    copies = jax.tree.map(one, view.copies)
    return view.replace(present=mask, copies=copies)  # pyright: ignore[reportAttributeAccessIssue]


def of_one(round: jax.Array, copy: Params, returned: Params) -> View:
    """The view of one client that took part in round t, int32 [], alone; nothing is known of the
    spread."""
    models = jax.tree.map(lambda leaf: leaf[None, None], (copy, returned))
    there = jnp.ones((1, 1), bool)
    unknown = jax.tree.map(lambda _: jnp.full((1, 1), jnp.nan), copy)
    copies, returned = models
    return View(copies, returned, there, jnp.broadcast_to(round, (1, 1)), unknown)


def pooled(data: Federation, clients: jax.Array, members: jax.Array) -> Own:
    """The images of several clients as those of one: valid in the first `count` rows.

    Args:
      data: the federation.
      clients: int32 [A].
      members: bool [A], those that pool.
    """
    rows, counts = data.clients[clients], jnp.where(members, data.counts[clients], 0)
    valid = jnp.arange(rows.shape[1]) < counts[:, None]
    order = jnp.argsort(~valid.reshape(-1), stable=True)
    rows = rows.reshape(-1)[order]
    return Own(data.train_images, data.train_labels, rows, jnp.sum(counts))


def divided(key: jax.Array, own: Own) -> tuple[Own, Own]:
    """Own images at random in those to train on and those to compare candidates on: at least one of
    each, the same one if there is but one."""
    size = own.rows.shape[0]
    lots = jnp.where(jnp.arange(size) < own.count, jax.random.uniform(key, (size,)), jnp.inf)
    rows = own.rows[jnp.argsort(lots)]
    held = jnp.int32(jnp.clip(jnp.ceil(HELD_OUT * own.count), 1, MOST_HELD_OUT))
    first = own.replace(rows=rows, count=jnp.maximum(own.count - held, 1))  # pyright: ignore
    others = jnp.roll(rows, -(own.count - held))[:MOST_HELD_OUT]
    return first, own.replace(rows=others, count=held)  # pyright: ignore


class Judged(NamedTuple):
    """A stolen model, judged. float32 []; NaN of a model that is not finite."""

    accuracy: jax.Array  # on test
    fidelity: jax.Array  # share of test images on which it says what the owner says


class Found(NamedTuple):
    """What a thief came to in one view. float32 []."""

    accuracy: jax.Array  # of the candidate that its own held-out images chose, trained on all
    accuracy_best: jax.Array  # the best on test of that and of all candidates: a bound
    fidelity: jax.Array  # of the chosen one


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """What a stolen model is compared with."""

    known: Public
    owner: Params  # G
    images: jax.Array  # uint8 [N, H, W, Ch], of test
    labels: jax.Array  # int32 [N]
    says: jax.Array  # int32 [N]: the owner's answers
    at_once: int  # candidates side by side

    @classmethod
    def of(
        cls, known: Public, owner: Params, data: Federation, test_images: int, at_once: int
    ) -> Any:
        """On the first test images; 0: all."""
        first = slice(0, test_images or None)
        images, labels = data.test_images[first], data.test_labels[first]
        says = _labels(known.functions.apply, owner, images, known.batch)
        return cls(known, owner, images, labels, says, at_once)

    def judged(self, model: Params) -> Judged:
        found = _labels(self.known.functions.apply, model, self.images, self.known.batch)
        nan = jnp.where(evaluate.is_finite(model), 0.0, jnp.nan)
        accuracy, fidelity = (evaluate.share(jnp.sum(found == other), found.shape[0])
                              for other in (self.labels, self.says))  # fmt: skip
        return Judged(nan + accuracy, nan + fidelity)

    def asked(self, attack: Attack, key: jax.Array, view: View, own: Own) -> View:
        """With the owner's answers to what the thief asks, if it asks."""
        questions = attack.questions(keys.stream(key, "questions"), own, self.known)
        if questions is None:
            return view
        apply, batch = self.known.functions.apply, self.known.batch
        answers = jax.nn.softmax(_logits(apply, self.owner, questions, batch))
        return view.replace(questions=questions, answers=answers)  # pyright: ignore

    def made(self, attack: Attack, key: jax.Array, view: View, own: Own) -> Params:
        """What it steals."""
        model, how = attack.steal(key, view, own, self.known), self.known.functions
        if not attack.restates:
            return model
        again = keys.stream(key, "statistics")
        return running.estimated(again, how, model, own.images, own.rows, own.count)

    def of_thief(self, attack: Attack, key: jax.Array, view: View, own: Own) -> Found:
        """What it comes to with the candidate that its own held-out images choose."""
        known, candidates = self.known, attack.candidates()
        own_key, chosen = keys.stream(key, "steal"), attack
        best = jnp.float32(jnp.nan)
        if len(candidates) > 1:
            training, held = divided(keys.stream(key, "held out"), own)
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *candidates)
            limited = self.asked(attack, key, view, training)

            def candidate(one: Attack) -> tuple[jax.Array, jax.Array]:
                model = self.made(one, own_key, limited, training)
                own_score = score(known.functions.apply, model, held, known.batch)
                return own_score, self.judged(model).accuracy

            at_once = min(self.at_once, len(candidates))
            scores, accuracies = lax.map(candidate, stacked, batch_size=at_once)
            best = jnp.nanmax(accuracies)
            chosen = jax.tree.map(lambda leaf: leaf[jnp.argmax(scores)], stacked)
        view = self.asked(attack, key, view, own)
        final = self.judged(self.made(chosen, own_key, view, own))
        return Found(final.accuracy, jnp.fmax(final.accuracy, best), final.fidelity)


def stolen(
    key: jax.Array, experiment: Experiment, data: Federation, owner: Params, seen: Seen,
    attempts: Sequence[Attack], singles: int, coalitions: Sequence[int], controls: str,
    test_images: int,
) -> dict[Row, dict[str, jax.Array]]:  # fmt: skip
    """What all thieves make of all views.

    Args:
      key: of the thieves.
      experiment: resolved; its scheme is not read.
      data: the federation.
      owner: G.
      seen: by the followed clients.
      attempts: what is tried.
      singles: single thieves.
      coalitions: members of each.
      controls: of `CONTROLS`: when scratch and the server alone are tried: in runs that protect
        nothing, which are what the others are compared with; in all; in none.
      test_images: the first of them count; 0: all.

    Returns:
      Of each row float32 [] of `Found`; int32 []: "round", the newest of the view, "copies" that
      are in it, and "images" that its members own; and bool []: "tried". The owner is a row too, on
      the same test images. In a run that protects nothing bare copies are all that is tried beside
      the controls.
    """
    known = public(experiment, data.image_shape, seen.touched)
    trial = Trial.of(known, owner, data, test_images, experiment.strategy.clients_at_once or 1)
    parts = instances(singles, coalitions, seen.view.rounds.shape[0])
    masks = jnp.stack([present(seen.view, part) for part in parts])
    due = {"fedavg": ~seen.protected, "always": jnp.bool_(True), "never": jnp.bool_(False)}
    none, right = jnp.int32(0), trial.judged(owner).accuracy
    found: dict[Row, dict[str, jax.Array]] = {
        Row("owner", "V0", 0, 0): {
            "accuracy": right, "accuracy_best": right, "fidelity": jnp.float32(1),
            "round": none, "copies": none, "images": none, "tried": jnp.bool_(True),
        }
    }  # fmt: skip

    def sometimes(due: jax.Array, found: Any) -> tuple[Any, jax.Array]:
        due = due & jnp.any(seen.view.present)  # lanes that only fill up have seen nothing
        like = jax.eval_shape(found)
        nothing = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan), like)
        return lax.cond(due, found, lambda: nothing), due

    for attack in attempts:
        mine = [n for n, part in enumerate(parts) if part.view in attack.views]
        if not mine or (attack.control and controls == "never"):
            continue
        when = due[controls] if attack.control else seen.protected
        if isinstance(attack, attacks.BareCopy):
            when = jnp.bool_(True)
        which = jnp.asarray(mine)
        rows, tried = sometimes(
            when,
            lambda attack=attack, which=which: _in_views(
                key, trial, attack, data, seen, which, masks[which]
            ),
        )
        for place, number in enumerate(mine):
            mask = masks[number]
            columns = {field: column[place] for field, column in rows._asdict().items()}
            columns |= {"round": jnp.max(jnp.where(mask, seen.view.rounds, 0))}
            columns |= {"copies": jnp.sum(mask, dtype=jnp.int32), "tried": tried}
            owned = jnp.where(jnp.any(mask, axis=0), data.counts[seen.clients], 0)
            found[Row(attack.title, *parts[number])] = {**columns, "images": jnp.sum(owned)}
    if controls != "never":
        size, server = data.validation_labels.shape[0], Scratch(steps=SERVER_STEPS)
        own = Own(
            data.validation_images, data.validation_labels,
            jnp.arange(size, dtype=jnp.int32), jnp.int32(size),
        )  # fmt: skip
        row, tried = sometimes(
            due[controls],
            lambda: trial.of_thief(server, keys.stream(key, "server"), seen.view, own),
        )
        other = {"round": none, "copies": none, "images": jnp.int32(size), "tried": tried}
        found[Row("server_alone", "V0", 0, 0)] = {**row._asdict(), **other}
    return found


def _in_views(
    key: jax.Array, trial: Trial, attack: Attack, data: Federation, seen: Seen, which: jax.Array,
    masks: jax.Array,
) -> Found:  # fmt: skip
    """[V], of the views that these masks bool [V, J, A] leave; int32 [V] says which they are. Of
    two views that are the same the first is tried, and the other comes to as much."""
    # By its name: which others are tried beside it changes nothing.
    own_key = keys.stream(key, "attack", zlib.crc32(attack.title.encode()))

    # Who took part once has the same copies in all its rounds as in its newest.
    first = jnp.argmax(jnp.all(masks[:, None] == masks, axis=(2, 3)), axis=1)

    def of(place: jax.Array) -> Found:
        mask = masks[place]
        view = completed(seen.view, mask, seen.partial)
        own = pooled(data, seen.clients, jnp.any(mask, axis=0))
        return trial.of_thief(attack, keys.stream(own_key, "instance", which[place]), view, own)

    def one(place: jax.Array, found: Found) -> Found:
        known = first[place]
        made = lax.cond(
            known == place, lambda: of(place), lambda: Found(*(column[known] for column in found))
        )
        return Found(*(c.at[place].set(new) for c, new in zip(found, made, strict=True)))

    nothing = Found(*(jnp.zeros(len(masks)) for _ in Found._fields))
    return lax.fori_loop(0, len(masks), one, nothing)


def score(apply: evaluate.Apply, model: Params, own: Own, batch: int) -> jax.Array:
    """How good a model is on own images, float32 []: right ones, and of as many right ones the
    smaller loss is better. −1 of a model that is not finite."""
    logits = _logits(apply, model, own.images[own.rows], batch)
    labels, valid = own.labels[own.rows], jnp.arange(own.rows.shape[0]) < own.count
    right = jnp.sum(valid & evaluate.correct(logits, labels))
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
    loss = jnp.sum(jnp.where(valid, losses, 0)) / jnp.maximum(own.count, 1)
    found = right + 0.5 / (1 + loss)
    return jnp.where(evaluate.is_finite(model) & jnp.isfinite(loss), found, -1)


def _logits(apply: evaluate.Apply, model: Params, images: jax.Array, batch: int) -> jax.Array:
    """[N, C] of images uint8 [N, H, W, Ch]."""
    return evaluate.in_batches(lambda some: apply(model, evaluate.scale(some)), (images,), batch)


def _labels(apply: evaluate.Apply, model: Params, images: jax.Array, batch: int) -> jax.Array:
    """int32 [N]: the largest logit of each image; −1 where one is NaN."""
    logits = _logits(apply, model, images, batch)
    return jnp.where(jnp.any(jnp.isnan(logits), axis=-1), -1, jnp.argmax(logits, axis=-1))
