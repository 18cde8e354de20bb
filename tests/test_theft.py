"""What thieves come to in the views that they have, judged by the reference's forward pass."""

import functools
from typing import Any, ClassVar

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_nets as nets
from small_thieves import (
    BASE,
    COUNTS,
    DATA,
    FEW,
    KEY,
    OWNER,
    UNTOLD,
    Scaled,
    Shortened,
    Told,
    few_steps_of_the_server,  # noqa: F401  # a fixture
    flat,
)

from noisefl import attacks, keys, theft
from noisefl.local import Own
from noisefl.parts import part
from noisefl.theft import Row, Seen

TEST = np.asarray(DATA.test_images), np.asarray(DATA.test_labels)
pytestmark = pytest.mark.usefixtures("few_steps_of_the_server")

# Data of thieves.


def mine(own: Own) -> list[int]:
    return np.asarray(own.rows)[: int(own.count)].tolist()


@pytest.mark.parametrize("there", [[True, True, True], [False, True, False], [True, False, True]])
def test_images_are_pooled(there):
    clients = [4, 1, 3]
    found = theft.pooled(DATA, jnp.asarray(clients), jnp.asarray(there))
    table = np.asarray(DATA.clients)
    wanted = [table[k, : COUNTS[k]] for k, yes in zip(clients, there, strict=True) if yes]
    assert mine(found) == np.concatenate(wanted).tolist()
    assert found.rows.shape == (3 * table.shape[1],)
    assert found.images is DATA.train_images
    assert found.labels is DATA.train_labels


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 100, 4000, 4100])
def test_held_out_images_are_a_quarter_at_random_and_no_others(count):
    rows = np.random.default_rng(count).permutation(5000)
    own = Own(jnp.zeros(()), jnp.zeros(()), jnp.asarray(rows), jnp.int32(count))
    splits = [
        [mine(half) for half in theft.divided(keys.root(seed), own)] for seed in (0, 0, 1)
    ]  # of a key always the same
    for training, held in splits:
        assert len(held) == min(-(-count // 4), 1000)
        assert len(training) == max(count - len(held), 1)
        assert len(set(training)) == len(training)
        assert set(training) | set(held) == set(rows[:count].tolist())
        if count > 1:
            assert not set(training) & set(held)
    assert splits[0] == splits[1]
    if count > 9:
        assert set(splits[2][1]) != set(splits[0][1])
        assert splits[0][1] != [k for k in rows.tolist() if k in splits[0][1]]


def test_every_image_is_as_likely_held_out_as_any_other():
    """Sixteen images of which four are held out, 2,000 times: 500 each, and a χ² of 15 degrees
    (and less spread than of independent draws) is above 44.3 once in 10,000."""
    own = Own(jnp.zeros(()), jnp.zeros(()), jnp.arange(20), jnp.int32(16))

    @jax.jit
    @jax.vmap
    def held(number):
        other = theft.divided(keys.stream(KEY, "split", number), own)[1]
        return jnp.where(jnp.arange(other.rows.shape[0]) < other.count, other.rows, 99)

    found = np.bincount(np.asarray(held(jnp.arange(2000))).ravel(), minlength=100)
    assert found[:16].sum() == 8000
    assert ((found[:16] - 500) ** 2 / 500).sum() < 44.3


def linear(params: Any, images: jax.Array) -> jax.Array:
    """Logits x · w: the images are [N, 1, 1, 1]."""
    return images.reshape(-1, 1) * 255 * params["w"] + params["b"]


def test_of_as_many_right_ones_the_smaller_loss_is_better():
    images, labels = jnp.ones((9, 1, 1, 1), jnp.uint8), jnp.asarray([0] * 6 + [1] * 3)
    own = Own(images, labels, jnp.asarray([0, 1, 2, 6, 7, 8, 8]), jnp.int32(4))  # 0, 0, 0 and 1

    def score(*w: float, bias: float = 0.0) -> float:
        params = {"w": jnp.asarray(w), "b": jnp.asarray([bias, 0.0])}
        return float(theft.score(linear, params, own, 3))

    def of(right: int, w: Any) -> float:
        logits = np.tile(np.asarray(w, float), (4, 1))
        loss, _ = nets.cross_entropy(logits, np.array([0, 0, 0, 1]))
        return right + 0.5 / (1 + loss)

    for w, right in (((1.0, 0.0), 3), ((2.0, 0.0), 3), ((0.0, 9.0), 1), ((0.0, 0.1), 1)):
        assert score(*w) == pytest.approx(of(right, w), rel=1e-5)
    assert score(1.0, 0.0) > score(9.0, 0.0) > score(0.0, 0.1) > score(0.0, 9.0) > 1
    assert score(1e4, 0.0) > score(0.0, 0.01)  # no loss weighs as much as an image
    assert score(np.nan, 0.0) == score(np.inf, 0.0) == -1
    assert score(0.0, 1.0, bias=np.inf) == -1


def test_what_a_copy_does_not_hold_is_the_mean_of_those_that_do():
    """Of two members in two rounds, one of them there but once; 9 stands in the absent copy."""
    copies = jnp.asarray([[[1.0, 0.0, 0.0], [9.0, 9.0, 9.0]], [[3.0, 0.0, 0.0], [0.0, 5.0, 0.0]]])
    there = jnp.asarray([[True, False], [True, True]])
    view = attacks.View({"w": copies}, {"w": copies}, there, jnp.ones((2, 2), int), {"w": there})
    own = theft.completed(view, there, True)
    wanted = [[[1, 5, 0], [9, 9, 9]], [[3, 5, 0], [2, 5, 0]]]
    np.testing.assert_array_equal(own.copies["w"], np.array(wanted, np.float32))
    first = jnp.asarray([[True, False], [False, False]])
    alone = theft.completed(view, first, True)
    np.testing.assert_array_equal(alone.copies["w"][0, 0], copies[0, 0])
    np.testing.assert_array_equal(alone.present, first)
    whole = theft.completed(view, there, False)
    np.testing.assert_array_equal(whole.copies["w"], copies)


# What thieves come to.


@part
class Asking(Scaled):
    """Asks the owner about its own images."""

    abstract: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("V5",)

    def candidates(self) -> list[attacks.Attack]:
        return [self, self.replace(factor=0.25)]

    def questions(self, key, own, public):
        return own.images[own.rows[:3]]


@part
class Counting(Scaled):
    """Tells what a coalition has in one round."""

    abstract: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("V1", "V3")


def seen_by(clients: list[int], times: Any, protected: bool = True, seed: int = 0) -> Seen:
    """What they have seen, made up: noise on the stem, more of it in later rounds."""
    times = np.asarray(times)
    rng = np.random.default_rng(seed)

    def copy(path: Any, w: Any) -> Any:
        noisy = rng.normal(0, 1.0, (*times.shape, *w.shape))
        return w + jnp.float32(noisy * ("stem" in str(path)))

    copies = jax.tree_util.tree_map_with_path(copy, BASE)
    paths = flat(BASE)
    return Seen(
        clients=jnp.asarray(clients),
        times=jnp.asarray((times > 0).sum(0)),
        copies=copies,
        returned=jax.tree.map(lambda leaf: leaf + 0.01, copies),
        rounds=jnp.asarray(times),
        spread={path: jnp.full(times.shape, 0.5 * (path[0] == "stem")) for path in paths},
        touched={path: jnp.bool_(path[0] == "stem") for path in paths},
        protected=jnp.bool_(protected),
    )


CLIENTS, SEEN_TIMES = [3, 6, 1], [[2, 5, 0], [6, 6, 6]]
SEEN, BARE = (seen_by(CLIENTS, SEEN_TIMES, protected) for protected in (True, False))


def program(attempts: Any, singles: int, coalitions: Any, controls: str, images: int = 0) -> Any:
    def stolen(owner: Any, data: Any, seen: Seen) -> dict[Row, dict[str, Any]]:
        key = keys.root(8)
        return theft.stolen(
            key, UNTOLD, data, owner, seen, attempts, singles, coalitions, controls, images
        )  # fmt: skip

    return stolen


@functools.cache
def compiled(controls: str) -> Any:
    return jax.jit(program(FEW, 2, (2, 3), controls))


def stolen(
    seen: Seen = SEEN, owner: Any = OWNER, data: Any = DATA, controls: str = "fedavg"
) -> dict[Row, dict[str, Any]]:
    """What `FEW` make of the views of two single thieves and of coalitions of two and three."""
    return fed.plain(compiled(controls)(owner, data, seen))


def accuracy(params: Any, images: Any = TEST[0], labels: Any = TEST[1]) -> float:
    return nets.accuracy(fed.NET, nets.as_float64(params), images, labels)


def agreement(one: Any, other: Any) -> float:
    says = [nets.forward(fed.NET, nets.as_float64(p), TEST[0])[0].argmax(1) for p in (one, other)]
    return float((says[0] == says[1]).mean())


def newest(which: int, head: float = 1.0) -> Any:
    """The newest copy of a single thief, its head times a factor."""
    copy = jax.tree.map(lambda leaf: leaf[1, which], SEEN.copies)
    return {**copy, "head": jax.tree.map(lambda w: head * w, copy["head"])}


ROWS = {
    *(Row("owner", "V0", 0, 0), Row("server_alone", "V0", 0, 0)),
    *(Row(who, "V1", 1, n) for who in ("bare_copy", "scratch", "scaled") for n in (0, 1)),
    *(Row("scratch", "V3", 2, 0), Row("scratch", "V3", 3, 0)),
}


def test_rows_say_of_what_they_are():
    found, n = stolen(), COUNTS[CLIENTS]
    assert set(found) == ROWS
    told = {(row.thief, row.members, row.which): [int(columns[one]) for one in
            ("round", "copies", "images")] for row, columns in found.items()}  # fmt: skip
    assert told == {
        **{(who, 1, one): [6, 1, n[one]] for who in ("bare_copy", "scratch", "scaled")
           for one in (0, 1)},
        ("scratch", 2, 0): [6, 2, n[0] + n[1]],
        ("scratch", 3, 0): [6, 3, n.sum()],
        ("owner", 0, 0): [0, 0, 0],
        ("server_alone", 0, 0): [0, 0, fed.VALIDATION],
    }  # fmt: skip
    shares, whole = ("accuracy", "accuracy_best", "fidelity"), ("round", "copies", "images")
    for columns in found.values():
        kinds = {**dict.fromkeys(shares, "float32"), **dict.fromkeys(whole, "int32")}
        assert {name: column.dtype for name, column in columns.items()} == {**kinds, "tried": bool}
        if columns["tried"]:
            assert 0 <= columns["accuracy"] <= columns["accuracy_best"] <= 1


def test_the_owner_and_the_bare_copy_are_as_good_as_the_reference_says():
    found, told = stolen(), set()
    owner = found[Row("owner", "V0", 0, 0)]
    assert owner["accuracy"] == owner["accuracy_best"] == pytest.approx(accuracy(OWNER), abs=1e-6)
    assert owner["fidelity"] == 1
    for which in (0, 1):
        row = found[Row("bare_copy", "V1", 1, which)]
        assert row["accuracy"] == pytest.approx(accuracy(newest(which)), abs=1e-6)
        assert row["accuracy_best"] == row["accuracy"]
        assert row["fidelity"] == pytest.approx(agreement(newest(which), OWNER), abs=1e-6)
        told |= {float(row["accuracy"]), float(row["fidelity"])}
    assert len(told | {float(owner["accuracy"])}) > 3  # else nothing is told apart


@pytest.mark.parametrize("images", [11, 999])
def test_the_first_test_images_count(images):
    first = TEST[0][:images], TEST[1][:images]
    one = jax.jit(program((attacks.BareCopy(),), 1, (), "never", images))
    found = fed.plain(one(OWNER, DATA, SEEN))
    row, owner = found[Row("bare_copy", "V1", 1, 0)], found[Row("owner", "V0", 0, 0)]
    assert row["accuracy"] == pytest.approx(accuracy(newest(0), *first), abs=1e-6)
    assert owner["accuracy"] == pytest.approx(accuracy(OWNER, *first), abs=1e-6)


def test_out_of_jit_it_is_the_same():
    eager = fed.plain(program((FEW[0], FEW[2]), 1, (2,), "never")(OWNER, DATA, SEEN))
    assert set(eager) == {*(row for row in ROWS if row.thief in ("bare_copy", "scaled", "owner")
                            and row.which == 0)}  # fmt: skip
    for row, columns in stolen().items():
        if row in eager:
            fed.assert_same(eager[row], columns)


def test_a_model_that_is_not_finite_has_no_accuracy():
    broken = jax.tree.map(lambda leaf: leaf.at[1, 0].set(jnp.nan), SEEN.copies)
    found = stolen(fed.replaced(SEEN, copies=broken))
    for who in ("bare_copy", "scaled"):
        nothing = found[Row(who, "V1", 1, 0)]
        assert np.isnan(nothing["accuracy"])
        assert np.isnan(nothing["fidelity"])
        fed.assert_same(found[Row(who, "V1", 1, 1)], stolen()[Row(who, "V1", 1, 1)])


def test_nor_is_there_a_bound_on_a_model_that_is_not_finite():
    broken = jax.tree.map(lambda leaf: leaf.at[1, 0].set(jnp.nan), SEEN.copies)
    found = stolen(fed.replaced(SEEN, copies=broken))
    for who in ("scaled", "bare_copy"):
        assert np.isnan(found[Row(who, "V1", 1, 0)]["accuracy_best"]), who


def test_the_thief_chooses_on_images_of_its_own_that_it_holds_out():
    """The best candidate on test, if its labels are right; of labels that say the opposite the
    worst, and the bound stands beside it. A candidate that is not finite is never chosen."""
    of = {factor: accuracy(newest(0, factor)) for factor in (-1.0, 0.5)}
    assert of[0.5] > of[-1.0] + 0.2
    row = stolen()[Row("scaled", "V1", 1, 0)]
    assert row["accuracy"] == row["accuracy_best"] == pytest.approx(of[0.5], abs=1e-6)
    assert row["fidelity"] == pytest.approx(agreement(newest(0, 0.5), OWNER), abs=1e-6)
    opposite = nets.as_float64(newest(0, -1.0))
    says = nets.forward(fed.NET, opposite, np.asarray(DATA.train_images))[0].argmax(1)
    images = fed.replaced(DATA.images, train_labels=jnp.int32(says))
    row = stolen(data=fed.replaced(DATA, images=images))[Row("scaled", "V1", 1, 0)]
    assert row["accuracy"] == pytest.approx(of[-1.0], abs=1e-6)
    assert row["accuracy_best"] == pytest.approx(of[0.5], abs=1e-6)


def test_what_a_thief_is_shown(monkeypatch):
    """Candidates see three quarters of its images, the chosen one all of them. Who asks is answered
    by the owner, and nobody else; a coalition pools its images."""
    told, judges, score = list[Told](), list[Own](), theft.score

    def scored(apply, model, own, batch):
        jax.debug.callback(judges.append, own)
        return score(apply, model, own, batch)

    monkeypatch.setattr(theft, "score", scored)
    attempts = Scaled(into=told.append), Asking(into=told.append), Counting(into=told.append)
    jax.jit(program(attempts, 1, (2, 3), "never"))(OWNER, DATA, SEEN)
    jax.effects_barrier()
    n = COUNTS[CLIENTS]
    kept = {size: size - -(-size // 4) for size in (n[0], n[:2].sum(), n.sum())}

    def counts(who: str) -> list[int]:
        return sorted(int(one.count) for one in told if one.who == who)

    assert counts("scaled") == [*[kept[n[0]]] * 3, n[0]]
    pools = n[:2].sum(), n.sum()
    assert counts("asking") == sorted(x for size in pools for x in (*[kept[size]] * 2, size))
    pools = n[0], *pools
    assert counts("counting") == sorted(x for size in pools for x in (*[kept[size]] * 3, size))
    [last] = [one for one in told if one.who == "scaled" and one.count == n[0]]
    assert last.factor == 0.5
    # Of candidates none is judged by an image that it has trained on, and each by all others.
    whole = {*(frozenset(mine(one.own)) for one in told if one.count not in kept.values())}
    splits = {frozenset(mine(one.own)) for one in told if one.count in kept.values()}
    assert len(judges) == 3 + 2 * 2 + 3 * 3
    for held in (frozenset(mine(own)) for own in judges):
        assert any(held | split in whole and not held & split for split in splits)
    shown = {who: set() for who in ("scaled", "asking", "counting")}
    for one in told:
        present = np.asarray(one.view.present)
        shown[one.who].add((present.sum(), present.tobytes()))
        if one.who != "asking":
            assert (one.view.questions, one.view.answers) == (None, None)
            continue
        own = theft.pooled(DATA, SEEN.clients, jnp.any(one.view.present, axis=0))
        asked = np.asarray(one.view.questions)
        assert asked.shape == (3, *fed.IMAGE)
        every = [np.asarray(DATA.train_images)[row].tobytes() for row in mine(own)]
        assert all(image.tobytes() in every for image in asked)
        logits = nets.forward(fed.NET, nets.as_float64(OWNER), asked)[0]
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.testing.assert_allclose(np.asarray(one.view.answers), shares, rtol=1e-4, atol=1e-6)

    def masks(*rows: list[list[int]]) -> set[Any]:
        return {(mask.sum(), mask.tobytes()) for mask in (np.array(row, bool) for row in rows)}

    nobody, one_of, two_of = [0, 0, 0], [1, 0, 0], [1, 1, 0]
    assert shown == {
        "scaled": masks([nobody, one_of]),
        "asking": masks([two_of, two_of], [two_of, [1, 1, 1]]),  # the third was there once
        "counting": masks([nobody, one_of], [nobody, two_of], [nobody, [1, 1, 1]]),
    }


def test_thieves_are_shown_copies_that_others_complete():
    """Client 6 lacks the head, which client 3 holds: in their coalition it has 3's, alone none."""
    seen = seen_by([3, 6], [[2, 2]])
    lacking = [seen.copies["head"][name].at[:, 1].set(0) for name in ("bias", "kernel")]
    head = dict(zip(("bias", "kernel"), lacking, strict=True))
    seen = fed.replaced(seen, copies={**seen.copies, "head": head}, partial=True)
    told = list[Told]()
    jax.jit(program((Lasting(into=told.append),), 2, (2,), "never"))(OWNER, DATA, seen)
    jax.effects_barrier()
    kinds = set()
    for one in told:
        kernel, there = np.asarray(one.view.copies["head"]["kernel"]), np.asarray(one.view.present)
        members = tuple(np.flatnonzero(there[0]))
        if 1 in members:
            kinds.add(members)
            wanted = kernel[0, 0] if members == (0, 1) else np.zeros_like(kernel[0, 0])
            np.testing.assert_array_equal(kernel[0, 1], wanted)
    assert kinds == {(1,), (0, 1)}


@part
class Lasting(Scaled):
    """Tells what it sees of one round and of all."""

    abstract: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("V1", "V2", "V3", "V4")


def test_what_is_the_same_in_two_views_is_tried_once():
    """Client 3 was there twice, 6 and 1 once, and 3 and 6 last together."""
    seen = seen_by([3, 6, 1], [[2, 0, 0], [6, 6, 6]])
    told = list[Told]()
    attempts = (Lasting(into=told.append),)
    found = fed.plain(jax.jit(program(attempts, 2, (2,), "never"))(OWNER, DATA, seen))
    jax.effects_barrier()
    rows = {(row.view, row.members, row.which): columns for row, columns in found.items()}
    assert len(rows) == 7  # with the owner's
    assert len(told) == 4 * 5  # three candidates and the chosen one: of V1 and V2 of 3, one of 6, …
    columns = ("accuracy", "accuracy_best", "fidelity", "copies", "images", "round")
    once, all_rounds = rows["V1", 1, 1], rows["V2", 1, 1]
    assert [once[c] for c in columns] == [all_rounds[c] for c in columns]
    assert (rows["V1", 1, 0]["copies"], rows["V2", 1, 0]["copies"]) == (1, 2)
    shown = {np.asarray(one.view.present).tobytes() for one in told}
    assert len(shown) == 5


def test_controls_do_not_look_at_copies_or_at_the_owner():
    names = ("copies", "returned", "spread")
    other = {n: jax.tree.map(lambda leaf: 0 * leaf + 0.1, getattr(BARE, n)) for n in names}
    owner = jax.tree.map(lambda w: -w, OWNER)
    before, after = stolen(BARE), stolen(fed.replaced(BARE, **other), owner)
    for row, columns in before.items():
        if columns["tried"]:
            names = {*columns} - {"fidelity"}  # to another owner
            same = all(np.array_equal(columns[n], after[row][n]) for n in names)
            assert same == (row.thief in ("scratch", "server_alone")), row


def test_controls_of_a_run_and_of_its_fedavg_are_the_same():
    """The same key and the same clients: what is subtracted has no noise of its own."""
    of_run, of_fedavg = stolen(controls="always"), stolen(BARE)
    for row in (row for row in ROWS if row.thief in ("scratch", "server_alone")):
        for name in ("accuracy", "accuracy_best"):
            assert of_run[row][name] == of_fedavg[row][name]


@pytest.mark.parametrize("controls", theft.CONTROLS)
@pytest.mark.parametrize("seen", [SEEN, BARE], ids=["protected", "fedavg"])
def test_controls_are_tried_where_they_are_wanted(controls, seen):
    """In FedAvg's run nothing is tried beside them but the bare copy."""
    tried = {"owner": True, "bare_copy": True, "scaled": seen is SEEN}
    if controls == "never":
        attempts = attacks.BareCopy(), Shortened()
        found = fed.plain(jax.jit(program(attempts, 1, (), "never"))(OWNER, DATA, seen))
        assert {row.thief for row in found} == {"owner", "bare_copy"}
    else:
        found = stolen(seen, controls=controls)
        wanted = controls == "always" or seen is BARE
        tried |= dict.fromkeys(("scratch", "server_alone"), wanted)
        assert set(found) == ROWS
    for row, columns in found.items():
        assert columns["tried"] == tried[row.thief], row
        for name in ("accuracy", "accuracy_best", "fidelity"):
            assert np.isnan(columns[name]) == (not tried[row.thief])
