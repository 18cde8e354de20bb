"""Theft: the views of thieves, made of rounds that were simulated, and what they come to.

A view holds models that clients received and what they have of those they gave back, and nothing of
the round's issue: no function here is given one (PROTECTION.md, "Threat model").
"""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from noisefl import attacks, evaluate, keys
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

    @classmethod
    def empty(
        cls, clients: jax.Array, base: Params, touched: Sequence[Path], rounds: int
    ) -> "Seen":
        """Nothing yet.

        Args:
          clients: int32 [A].
          base: of which shapes are read.
          touched: of the scheme.
          rounds: J.
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
        shapes = jax.eval_shape(lambda key: model.init(key, image_shape), jax.random.key(0))
        touched = {path: jnp.bool_(path in paths) for path in flatten_dict(shapes)}  # pyright: ignore
    return Public(
        touched=unflatten_dict(touched), local=experiment.local, functions=model,
        image_shape=image_shape, batch=experiment.strategy.eval_batch or 1,
    )  # fmt: skip


def of_one(round: jax.Array, copy: Params, returned: Params) -> View:
    """The view of one client that took part in round t alone; nothing is known of the spread."""
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
    how, known = experiment.strategy, public(experiment, data.image_shape, seen.touched)
    apply, everything = known.functions.apply, seen.view
    first = slice(0, test_images or None)
    images, labels = data.test_images[first], data.test_labels[first]
    says = _labels(apply, owner, images, known.batch)

    def same(one: jax.Array, other: jax.Array) -> jax.Array:
        return evaluate.share(jnp.sum(one == other), labels.shape[0])

    def judged(model: Params) -> Judged:
        found = _labels(apply, model, images, known.batch)
        nan = jnp.where(evaluate.is_finite(model), 0.0, jnp.nan)
        return Judged(nan + same(found, labels), nan + same(found, says))

    def tries(attack: Attack, key: jax.Array, view: View, own: Own) -> Found:
        def asked(view: View, own: Own) -> View:
            """With the owner's answers to what the thief asks, if it asks."""
            questions = attack.questions(keys.stream(key, "questions"), own, known)
            if questions is None:
                return view
            answers = jax.nn.softmax(_logits(apply, owner, questions, known.batch))
            return view.replace(questions=questions, answers=answers)  # pyright: ignore

        candidates = attack.candidates()
        own_key, chosen = keys.stream(key, "steal"), attack
        best = jnp.float32(jnp.nan)
        if len(candidates) > 1:
            training, held = divided(keys.stream(key, "held out"), own)
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *candidates)
            limited = asked(view, training)

            def candidate(one: Attack) -> tuple[jax.Array, jax.Array]:
                model = one.steal(own_key, limited, training, known)
                return score(apply, model, held, known.batch), judged(model).accuracy

            at_once = min(how.clients_at_once or 1, len(candidates))
            scores, accuracies = lax.map(candidate, stacked, batch_size=at_once)
            best = jnp.nanmax(accuracies)
            chosen = jax.tree.map(lambda leaf: leaf[jnp.argmax(scores)], stacked)
        final = judged(chosen.steal(own_key, asked(view, own), own, known))
        return Found(final.accuracy, jnp.fmax(final.accuracy, best), final.fidelity)

    def sometimes(due: jax.Array, found: Any) -> tuple[Any, jax.Array]:
        due = due & jnp.any(everything.present)  # lanes that only fill up have seen nothing
        like = jax.eval_shape(found)
        nothing = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan), like)
        return lax.cond(due, found, lambda: nothing), due

    parts = instances(singles, coalitions, everything.rounds.shape[0])
    due = {"fedavg": ~seen.protected, "always": jnp.bool_(True), "never": jnp.bool_(False)}
    masks = jnp.stack([present(everything, part) for part in parts])
    none, right = jnp.int32(0), judged(owner).accuracy
    found: dict[Row, dict[str, jax.Array]] = {
        Row("owner", "V0", 0, 0): {
            "accuracy": right, "accuracy_best": right, "fidelity": jnp.float32(1),
            "round": none, "copies": none, "images": none, "tried": jnp.bool_(True),
        }
    }  # fmt: skip
    for attack in attempts:
        if attack.control and controls == "never":
            continue
        mine = [n for n, part in enumerate(parts) if part.view in attack.views]
        if not mine:
            continue
        # By its name: which others are tried beside it changes nothing.
        own_key = keys.stream(key, "attack", zlib.crc32(attack.title.encode()))

        def instance(x: Any, attack: Attack = attack, own_key: jax.Array = own_key) -> Any:
            number, mask = x
            view = everything.replace(present=mask)  # pyright: ignore[reportAttributeAccessIssue]
            own = pooled(data, seen.clients, jnp.any(mask, axis=0))
            return tries(attack, keys.stream(own_key, "instance", number), view, own)

        which = jnp.asarray(mine)
        when = due[controls] if attack.control else seen.protected
        if isinstance(attack, attacks.BareCopy):
            when = jnp.bool_(True)
        rows, tried_now = sometimes(
            when, lambda instance=instance, which=which: lax.map(instance, (which, masks[which]))
        )
        for place, number in enumerate(mine):
            part, newest = parts[number], jnp.where(masks[number], everything.rounds, 0)
            columns = {field: column[place] for field, column in rows._asdict().items()}
            columns |= {"round": jnp.max(newest), "copies": jnp.sum(masks[number], dtype=jnp.int32)}
            owned = jnp.where(jnp.any(masks[number], axis=0), data.counts[seen.clients], 0)
            columns |= {"tried": tried_now, "images": jnp.sum(owned)}
            found[Row(attack.title, *part)] = columns
    if controls != "never":
        size = data.validation_labels.shape[0]
        own = Own(
            data.validation_images, data.validation_labels,
            jnp.arange(size, dtype=jnp.int32), jnp.int32(size),
        )  # fmt: skip
        server = Scratch(steps=SERVER_STEPS)
        row, tried_now = sometimes(
            due[controls], lambda: tries(server, keys.stream(key, "server"), everything, own)
        )
        other = {"round": none, "copies": none, "images": jnp.int32(size), "tried": tried_now}
        found[Row("server_alone", "V0", 0, 0)] = {**row._asdict(), **other}
    return found


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
