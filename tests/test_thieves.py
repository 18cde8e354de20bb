"""Every thief of `noisefl.attacks`; those that combine copies: closed cases, and against NumPy."""

import math
from typing import Any

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from thief_cases import (
    ALL,
    CLASSES,
    EPS,
    HEAD,
    KEY,
    LINEN,
    OWN,
    W,
    logits,
    moved,
    noise,
    one,
    right,
    short,
    spread,
    steal,
    view,
)

from noisefl import attacks, keys
from noisefl.attacks import View, average, coefficients, denoise

# What every thief owes.


def several() -> View:
    """Two rounds of three members, one of them absent once, another never there; with answers."""
    there = jnp.asarray([[True, False, False], [True, True, False]])
    both = [moved(noise(seed), np.ones((2, 3))) for seed in (1, 2)]
    mixed = jax.tree.map(lambda a, b: a + 0.5 * b * jnp.arange(3).reshape(3, *[1] * (a.ndim - 2)),
                         *both)  # fmt: skip
    rng = np.random.default_rng(4)
    questions = jnp.asarray(fed.images(rng.integers(0, 4, 24), rng))
    answers = jax.nn.softmax(jnp.float32(logits(W, questions)))
    known = spread(np.full((2, 3), 1.5))
    return view(mixed, present=there, spread=known, questions=questions, answers=answers)


def garbage(view: View, value: float) -> View:
    """Other values where a member was not there."""

    def other(leaf: Any) -> Any:
        there = view.present.reshape(*view.present.shape, *[1] * (leaf.ndim - 2))
        return jnp.where(there, leaf, jnp.asarray(value).astype(leaf.dtype))

    names = ("copies", "returned", "spread")
    changes = {name: jax.tree.map(other, getattr(view, name)) for name in names}
    return fed.replaced(
        view, **changes, rounds=other(view.rounds) if value == value else view.rounds
    )


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_thief(cls):
    thief, seen, known = short(cls), several(), LINEN if cls is attacks.Ridge else HEAD
    thief.fit(known.functions, fed.IMAGE)
    stolen = steal(thief, KEY, seen, OWN, known)
    assert jax.tree.map(jnp.shape, stolen) == jax.tree.map(jnp.shape, W)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stolen))
    # Out of jit, and side by side with another thief who sees something else: the same.
    fed.assert_same(stolen, thief.steal(KEY, seen, OWN, known), **fed.CLOSE)
    other_seen = fed.replaced(seen, copies=jax.tree.map(lambda leaf: 1.1 * leaf, seen.copies))
    others = thief.candidates()[0], keys.root(9), other_seen
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), (thief, KEY, seen), others)
    together = jax.jit(jax.vmap(lambda t, k, v: t.steal(k, v, OWN, known)))(*both)
    fed.assert_same(fed.lane(together, 0), stolen, **fed.CLOSE)
    fed.assert_same(fed.lane(together, 1), steal(*others, OWN, known), **fed.CLOSE)
    # Who was not there has told nothing.
    for value in (1e6, math.nan):
        fed.assert_same(steal(thief, KEY, garbage(seen, value), OWN, known), stolen)
    # A broken copy: of several, it is as if it were not there.
    broken = jax.tree.map(lambda leaf: leaf.at[1, 0].set(jnp.nan), seen.copies)
    found = steal(thief, KEY, fed.replaced(seen, copies=broken), OWN, known)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, W)
    if "V1" not in cls.views:
        without = fed.replaced(seen, present=seen.present.at[1, 0].set(False))
        fed.assert_same(found, steal(thief, KEY, without, OWN, known))
    nothing = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), seen.copies)
    steal(thief, KEY, fed.replaced(seen, copies=nothing), OWN, known)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_candidates_are_itself_and_other_numbers(cls):
    thief = cls()
    tried = thief.candidates()
    assert 1 <= len(tried) <= 7
    assert {jax.tree.structure(each) for each in tried} == {jax.tree.structure(thief)}
    numbers = [tuple(np.asarray(leaf).item() for leaf in jax.tree.leaves(each)) for each in tried]
    assert tuple(np.asarray(leaf).item() for leaf in jax.tree.leaves(thief)) in numbers
    assert len(set(numbers)) == len(numbers)
    assert set(cls.views) <= set(attacks.VIEWS)


# Averages.

WEIGHTS = jax.jit(average.weights)


def plain_weights(copies, present, rounds, sigma, recency, by_noise):
    """Weights [J, A] by loops: copies [J, A, P] in float64, σ [J, A], NaN unknown."""
    there = [
        at for at in np.ndindex(present.shape) if present[at] and np.isfinite(copies[at]).all()
    ]
    newest = max(rounds[at] for at in there)
    variance = {at: sigma[at] ** 2 for at in there}
    known = [v for v in variance.values() if not np.isnan(v)]
    found = np.zeros(present.shape)
    for t in {rounds[at] for at in there}:
        mine = [at for at in there if rounds[at] == t]

        def apart(a, b):
            return np.linalg.norm(copies[a] - copies[b])

        pairs = [(apart(a, b), a, b) for a in mine for b in mine]
        _, first, second = max(pairs, key=lambda pair: pair[0])
        groups = [], []
        for at in mine:
            groups[int(apart(at, second) < apart(at, first))].append(at)
        within = max(apart(a, b) for group in groups for a in group for b in group)
        between = min([apart(a, b) for a in groups[0] for b in groups[1]], default=np.inf)
        for group in groups:
            for at in group:
                share = 1 / len(group) if within < between / 2 else 1
                v = np.mean(known) if np.isnan(variance[at]) else variance[at]
                found[at] = share * recency ** (newest - t) * v**-by_noise
    return found / found.sum()


def flat(copies: Any) -> np.ndarray:
    """Touched parameters of `HEAD` [J, A, P]."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(copies["head"])]
    return np.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], -1)


@pytest.mark.parametrize(("recency", "by_noise"), [(1.0, 0.0), (0.8, 0.0), (0.9, 1.0)])
def test_weights_are_those_of_the_plain_loops(recency, by_noise):
    rng = np.random.default_rng(11)
    split = 0
    for case in range(12):
        signs = rng.choice([-1.0, 1.0], (3, 5))
        # Groups that differ by nothing, by a little, and by as much as there is between them.
        blur = [0.0, 0.2, 1.5][case % 3]
        copies = moved(noise(case), signs)
        copies["head"] = jax.tree.map(
            lambda leaf, b=blur: leaf + b * jnp.float32(rng.normal(size=leaf.shape)), copies["head"]
        )
        copies["head"]["bias"] = copies["head"]["bias"].at[2, 1, 0].set(np.nan)
        copies["stem"]["kernel"] = jnp.float32(rng.normal(size=(3, 5, 3, 3, 1, 3)))
        present = rng.random((3, 5)) < 0.8
        present[0, 0] = True
        rounds = np.sort(rng.integers(1, 5, (3, 5)), axis=0).astype(np.int32)
        sigma = rng.uniform(0.5, 2, (3, 5)).astype(np.float32)
        sigma[1, :2] = np.nan
        seen = view(
            copies, present=jnp.asarray(present), rounds=jnp.asarray(rounds),
            spread=jax.tree.map(lambda t, s=sigma: jnp.where(t, s, 0), HEAD.touched),
        )  # fmt: skip
        wanted = plain_weights(flat(copies), present, rounds, sigma, recency, by_noise)
        found = WEIGHTS(seen, HEAD.touched, recency, by_noise)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-7)
        split += len(np.unique(np.round(wanted[wanted > 0], 6))) > 1
        averaged = steal(attacks.Average(recency, by_noise), KEY, seen, OWN, HEAD)
        kernel = np.where((wanted > 0)[..., None, None], copies["head"]["kernel"], 0)
        wanted = np.tensordot(wanted, kernel, 2)
        np.testing.assert_allclose(averaged["head"]["kernel"], wanted, rtol=1e-4, atol=1e-4)
    assert split > 2


def test_weights_fall_back_where_nothing_is_known_or_nothing_is_noised():
    equal = np.full((2, 2), 0.25)
    copies = moved(noise(1), [[1, 2], [3, 4]])
    for sigma in (np.full((2, 2), np.nan), np.zeros((2, 2))):
        found = WEIGHTS(view(copies, spread=spread(sigma)), HEAD.touched, 1.0, 1.0)
        np.testing.assert_allclose(found, equal, rtol=1e-6)
    # A round without noise outweighs all others.
    sigma = [[0.0, 1.0], [1.0, 1.0]]
    found = WEIGHTS(view(copies, spread=spread(sigma)), HEAD.touched, 1.0, 1.0)
    assert found[0, 0] > 0.999


@pytest.mark.parametrize("signs", [[1, -1], [1, 1, -1, 1, -1], [-1, 1, 1, 1, 1]])
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_the_pairs_average_is_the_model(signs, size):
    xi = noise(3, size=size)
    stolen = steal(attacks.Average(), KEY, view(moved(xi, [signs])), OWN, HEAD)

    def near(found, w, x):
        assert np.all(np.abs(found - w) <= 4 * EPS * (np.abs(w) + np.abs(x)))

    jax.tree.map(near, stolen, W, xi)


def test_average_then_tune_is_fine_tuning_of_the_average():
    seen, thief = several(), short(attacks.AverageThenTune)
    middle = steal(attacks.Average(), KEY, seen, OWN, HEAD)
    tuned = steal(short(attacks.FineTune), KEY, one(middle), OWN, HEAD)
    fed.assert_same(steal(thief, KEY, seen, OWN, HEAD), tuned, **fed.CLOSE)


# Coefficients.

ALPHA = jax.jit(attacks.Coefficients.coefficients)
COMBINED = jax.jit(coefficients.combined)
NO = math.nan  # was not there


def fitted(xi: Any, by: Any, base: Any = W) -> tuple[View, np.ndarray, Any]:
    """Two rounds of three members who were there in some: the view, α and W(α)."""
    there = jnp.isfinite(jnp.asarray(by))
    seen = view(moved(xi, by, base), present=there)
    alpha = ALPHA(attacks.Coefficients(), KEY, seen, OWN, HEAD)
    return seen, np.asarray(alpha), COMBINED(alpha, seen, HEAD)


@pytest.mark.parametrize(
    "by",
    [
        [[1, -1, 1], [1, 1, -1]],  # the pair, 4 against 2: ±1/2 in sum
        [[1, NO, NO], [2, NO, NO]],  # a draw at two strengths: (2, −1)
        [[NO, 3, NO], [NO, 2.5, NO]],  # one scalar that changes: (−5, 6)
    ],
)
def test_coefficients_take_out_what_copies_share(by):
    seen, alpha, stolen = fitted(noise(3, size=2.0), by)
    # Σ α (W + s ξ) is (Σ α) (W + left ξ).
    left = np.nansum(alpha * by) / alpha.sum()
    assert abs(left) < 0.05, alpha
    assert right(stolen) > 0.97
    [copy, *_] = np.argwhere(seen.present)
    assert right(jax.tree.map(lambda leaf: leaf[*copy], seen.copies)) < 0.6


def test_coefficients_find_a_scale():
    """Copies −1 · W and −0.5 · W of the head."""
    base = {"stem": W["stem"], "head": jax.tree.map(jnp.zeros_like, W["head"])}
    _, alpha, stolen = fitted({**noise(0), "head": W["head"]}, [[-1, NO, NO], [-0.5, NO, NO]], base)
    assert alpha[0, 0] + 0.5 * alpha[1, 0] < -0.5
    assert right(stolen) > 0.97


def test_absent_copies_have_no_coefficient():
    alpha = ALPHA(short(attacks.Coefficients), KEY, several(), OWN, HEAD)
    np.testing.assert_array_equal(alpha != 0, several().present)


# Singular values.

SHRUNK = jax.jit(denoise.shrunk)


def test_shrinking_finds_a_matrix_of_low_rank():
    rng = np.random.default_rng(3)
    wide = rng.normal(size=(2, 50)) * [[6.0], [3.0]]
    low = rng.normal(size=(120, 2)) @ wide / 7
    for matrix in (low, low.T):
        noised = matrix + 0.4 * rng.normal(size=matrix.shape)

        def error(sigma, noised=noised, matrix=matrix):
            return np.linalg.norm(SHRUNK(jnp.float32(noised), jnp.float32(sigma)) - matrix)

        left = np.linalg.norm(noised - matrix)
        np.testing.assert_allclose(error(0.0), left, rtol=1e-4)  # no noise: nothing is shrunk
        assert error(0.4) < 0.4 * left
        assert error(0.4) < min(error(0.2), error(0.8), error(0.1))
        # The rank is found, but for what chance puts just above the edge, and no other weights of
        # the same directions do much better.
        found = np.asarray(SHRUNK(jnp.float32(noised), jnp.float32(0.4)))
        values = np.linalg.svd(found, compute_uv=False)
        assert np.all(values[2:] < 0.05 * values[1]), values[:5]
        left, _, right = np.linalg.svd(noised)
        best = sum(
            (left[:, k] @ matrix @ right[k]) * np.outer(left[:, k], right[k]) for k in range(2)
        )
        assert error(0.4) < 1.05 * np.linalg.norm(best - matrix)


def test_denoise_takes_what_the_average_has_left():
    """Four copies of noise σ of a head of rank one: the mean has σ / 2 left."""
    rng = np.random.default_rng(4)
    kernel = jnp.float32(np.outer(rng.normal(size=48), rng.normal(size=4)))
    base = {"stem": W["stem"], "head": {"kernel": kernel, "bias": W["head"]["bias"]}}
    draws = [noise(seed, size=0.8) for seed in range(4)]
    xi = jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(2, 2, *leaves[0].shape), *draws)
    seen = view(moved(xi, np.ones((2, 2)), base), spread=spread(np.full((2, 2), 0.8)))
    averaged = steal(attacks.Average(), KEY, seen, OWN, HEAD)
    stolen = steal(attacks.Denoise(), KEY, seen, OWN, HEAD)
    fed.assert_same(stolen["stem"], averaged["stem"])
    np.testing.assert_allclose(
        stolen["head"]["kernel"], SHRUNK(averaged["head"]["kernel"], jnp.float32(0.4)),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    errors = [
        np.linalg.norm(model["head"]["kernel"] - kernel)
        for model in (stolen, averaged, fed.lane(fed.lane(seen.copies, 0), 0))
    ]
    assert errors[0] < 0.7 * errors[1] < 0.5 * errors[2]
    # Of unknown noise, half the kernel's RMS; untouched kernels stay, σ or no σ.
    known = fed.replaced(seen, spread=spread(np.full((2, 2), np.nan)))
    level = 0.5 * jnp.sqrt(jnp.mean(averaged["head"]["kernel"] ** 2))
    unknown = steal(attacks.Denoise(), KEY, known, OWN, HEAD)["head"]["kernel"]
    wanted = SHRUNK(averaged["head"]["kernel"], level)
    np.testing.assert_allclose(unknown, wanted, rtol=1e-4, atol=1e-5)


# Contrasts.


def walked(rounds: int) -> list[Any]:
    """W of several rounds, each a step further."""
    return [jax.tree.map(lambda w, s=s: w + 0.3 * s, noise(50 + s, ALL)) for s in range(rounds)]


def stacked(models: list[list[Any]]) -> Any:
    """[J, A, ...] of models by round and member."""
    rows = [jax.tree.map(lambda *each: jnp.stack(each), *row) for row in models]
    return jax.tree.map(lambda *each: jnp.stack(each), *rows)


def test_a_contrast_sheds_what_is_in_all_of_a_members_copies():
    """Sticky noise a hundred times as large as W, to rounding: W_3 − W_0 is left of the oldest and
    the others, or (W_2 + W_3 − W_0 − W_1) / 2 of halves; a round in which W was bare is added."""
    ws, sticky = walked(4), [noise(seed, size=100.0) for seed in (7, 8)]
    copies = [[jax.tree.map(jnp.add, w, z) for z in sticky] for w in ws]
    known = spread(np.full((4, 2), 100.0))
    halves = steal(attacks.Contrast(old=0.5), KEY, view(stacked(copies), spread=known), OWN, HEAD)
    oldest = steal(attacks.Contrast(old=0.0), KEY, view(stacked(copies), spread=known), OWN, HEAD)
    heads = [np.stack([np.asarray(x) for x in jax.tree.leaves(w["head"])[:1]]) for w in ws]
    kernel = jax.tree.leaves(halves["head"])[0]
    wanted = (heads[2] + heads[3] - heads[0] - heads[1])[0] / 2
    np.testing.assert_allclose(kernel, wanted, atol=1e-4)
    wanted = ((heads[1] + heads[2] + heads[3]) / 3 - heads[0])[0]
    np.testing.assert_allclose(jax.tree.leaves(oldest["head"])[0], wanted, atol=1e-4)
    fed.assert_same(halves["stem"], ws[3]["stem"], rtol=1e-6, atol=1e-6)
    # The first member had W_0 bare, and so both have it.
    copies[0][0] = ws[0]
    bare = spread(np.asarray([[0.0, 100.0], *[[100.0, 100.0]] * 3]))
    stolen = steal(attacks.Contrast(old=0.0), KEY, view(stacked(copies), spread=bare), OWN, HEAD)
    each = ((heads[2] + heads[3]) / 2 - heads[1], (heads[1] + heads[2] + heads[3]) / 3 - heads[0])
    wanted = (heads[0] + (each[0] + each[1]) / 2)[0]
    np.testing.assert_allclose(jax.tree.leaves(stolen["head"])[0], wanted, atol=1e-4)


def test_without_two_rounds_there_is_no_contrast():
    """Then the newest copies count; a member of one round does not disturb those of several."""
    ws, sticky = walked(2), [noise(seed, size=100.0) for seed in (7, 8)]
    copies = stacked([[jax.tree.map(jnp.add, w, z) for z in sticky] for w in ws])
    known = spread(np.full((2, 2), 100.0))
    there = jnp.asarray([[False, False], [True, True]])
    stolen = steal(attacks.Contrast(), KEY, view(copies, spread=known, present=there), OWN, HEAD)
    wanted = jax.tree.map(lambda leaf: jnp.mean(leaf[1], axis=0), copies)
    fed.assert_same(stolen, wanted, rtol=1e-5, atol=1e-4)
    there = jnp.asarray([[True, False], [True, True]])
    stolen = steal(attacks.Contrast(), KEY, view(copies, spread=known, present=there), OWN, HEAD)
    moved_by = jax.tree.map(jnp.subtract, ws[1]["head"], ws[0]["head"])
    fed.assert_same(stolen["head"], moved_by, rtol=1e-4, atol=1e-4)
