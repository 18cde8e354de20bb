"""Thieves of `noisefl.attacks`: each against closed cases, and against NumPy of the test's own."""

import math
from typing import Any

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_nets as nets

from noisefl import attacks, keys, models
from noisefl.attacks import Public, View, average, coefficients, denoise, ridge
from noisefl.local import Own
from noisefl.parts import implementations

CLASSES = [*filter(fed.ours, implementations(attacks.Attack))]
MODEL = models.functions((fed.initial, fed.forward))  # traced sooner than the module
MODULE = models.functions(fed.TinyCNN())
W = jax.tree.map(jnp.float32, fed.trained())
KEY = keys.root(5)
EPS = np.finfo(np.float32).eps


def touching(*layers: str) -> Public:
    """Copies may differ from W in those layers."""
    touched = {n: jax.tree.map(lambda _, n=n: jnp.bool_(n in layers), W[n]) for n in W}
    return Public(touched, fed.TINY.local, MODEL, fed.IMAGE, 16)


HEAD, ALL = touching("head"), touching("stem", "head")
LINEN = fed.replaced(HEAD, functions=MODULE)  # for the thief who looks into it


def logits(params: Any, images: Any) -> np.ndarray:
    return nets.forward(fed.NET, nets.as_float64(params), np.asarray(images))[0]


def own(count: int = 150, padding: int = 10) -> Own:
    """Images that the owner W labels; rows past `count` point at images of a wrong class."""
    rng = np.random.default_rng(6)
    images = fed.images(rng.integers(0, fed.CLASSES, count + 40), rng)
    labels = logits(W, images).argmax(1)
    labels[count:] = (labels[count:] + 1) % fed.CLASSES
    rows = np.concatenate([rng.permutation(count), count + np.arange(padding)])
    arrays = [jnp.asarray(x) for x in (images, np.int32(labels), np.int32(rows))]
    return Own(arrays[0], arrays[1], arrays[2], jnp.int32(count))


OWN = own()


def noise(seed: int, public: Public = HEAD, size: float = 1.0) -> Any:
    """ξ on touched parameters, 0 on the others."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda w, touched: jnp.float32(size * rng.normal(size=w.shape)) * touched,
        W, public.touched,
    )  # fmt: skip


def moved(xi: Any, by: Any, base: Any = W) -> Any:
    """base + by[j, a] · ξ, [J, A, ...]."""
    by = jnp.asarray(by, jnp.float32)
    return jax.tree.map(lambda w, x: w + by.reshape(*by.shape, *[1] * w.ndim) * x, base, xi)


def view(copies: Any, **changes: Any) -> View:
    """Of copies [J, A, ...]: all present, rounds 1 to J, nothing known of the noise."""
    rows, members = jax.tree.leaves(copies)[0].shape[:2]
    rounds = jnp.broadcast_to(1 + jnp.arange(rows, dtype=jnp.int32)[:, None], (rows, members))
    unknown = jax.tree.map(lambda _: jnp.full((rows, members), jnp.nan), W)
    there = jnp.ones((rows, members), bool)
    return fed.replaced(View(copies, copies, there, rounds, unknown), **changes)


def spread(value: Any, public: Public = HEAD) -> Any:
    """The same σ [J, A] of all touched parameters, 0 of the others."""
    return jax.tree.map(lambda touched: jnp.float32(value) * touched, public.touched)


def one(copy: Any, **changes: Any) -> View:
    return view(jax.tree.map(lambda leaf: leaf[None, None], copy), **changes)


def short(cls: type, **changes: Any) -> Any:
    """With few steps."""
    few = {"steps": 6, "batch_size": 8, "asked": 24}
    fields = cls.__dataclass_fields__
    return cls(**{**{name: few[name] for name in few if name in fields}, **changes})


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


@jax.jit
def steal(thief, key, view, own, public):
    return thief.steal(key, view, own, public)


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


def right(params: Any) -> float:
    """Share of own images on which a model says what W says."""
    images, labels = np.asarray(OWN.images)[:150], np.asarray(OWN.labels)[:150]
    return (logits(params, images).argmax(1) == labels).mean()


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


# A head in closed form.


def plain_ridge(x, y, factor):
    """Float64: a penalty of `factor` mean variances on the kernel, none on the bias."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    penalty = factor * np.mean(x.var(axis=0)) * len(x)
    full = np.concatenate([x, np.ones((len(x), 1))], 1)
    penalties = np.diag([penalty] * x.shape[1] + [0.0])
    found = np.linalg.solve(full.T @ full + penalties, full.T @ y)
    return found[:-1], found[-1]


@pytest.mark.parametrize("factor", [1e-4, 0.1, 100.0])
def test_a_head_is_that_of_the_plain_equations(factor):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 1)) + rng.normal(size=(60, 9)) * 10.0 ** rng.uniform(-1, 1, 9)
    y, valid = rng.normal(size=(60, 3)), np.arange(60) < 50
    wanted = plain_ridge(x[valid], y[valid], factor)
    x[~valid], y[~valid] = np.nan, np.nan
    found = jax.jit(ridge.head)(jnp.float32(x), jnp.float32(y), jnp.asarray(valid), factor)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_head_is_recovered_from_its_logits():
    rng = np.random.default_rng(2)
    x = np.maximum(rng.normal(0.5, 1, (400, 84)), 0) * rng.uniform(0.1, 10, 84)  # as after a ReLU
    x[:, 7] = 0  # a dead unit: whatever is multiplied with it is 0
    kernel, bias = rng.normal(size=(84, 10)), rng.normal(size=10)
    kernel[7] = 0
    y = x @ kernel + bias
    found = jax.jit(ridge.head)(jnp.float32(x), jnp.float32(y), jnp.ones(400, bool), 0.0)
    np.testing.assert_allclose(found[0], kernel, atol=2e-5)
    np.testing.assert_allclose(found[1], bias, atol=2e-4)


def test_ridge_replaces_the_head_alone():
    copy = fed.lane(fed.lane(moved(noise(3), [[1]]), 0), 0)
    stolen = steal(attacks.Ridge(0.1), KEY, one(copy), OWN, LINEN)
    fed.assert_same(stolen["stem"], copy["stem"])
    rows = np.asarray(OWN.rows)[:150]
    x = nets.forward(fed.NET, nets.as_float64(W), np.asarray(OWN.images)[rows])[1][-1]
    y = np.eye(fed.CLASSES)[np.asarray(OWN.labels)[rows]] - 1 / fed.CLASSES
    wanted = plain_ridge(x, y, 0.1)
    np.testing.assert_allclose(stolen["head"]["kernel"], wanted[0], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(stolen["head"]["bias"], wanted[1], rtol=1e-3, atol=1e-5)
    assert right(stolen) > 0.9 > right(copy)


class Convolutions(fed.TinyCNN):
    """Its last layer is a convolution."""

    @fed.nn.compact
    def __call__(self, x):
        return fed.nn.Conv(fed.CLASSES, (3, 3), name="stem")(x).mean((1, 2))


class Unbiased(fed.TinyCNN):
    """A head without bias."""

    @fed.nn.compact
    def __call__(self, x):
        return fed.nn.Dense(fed.CLASSES, use_bias=False, name="head")(x.reshape(x.shape[0], -1))


class Straight(fed.TinyCNN):
    """Nothing lies below its only layer but the images."""

    @fed.nn.compact
    def __call__(self, x):
        return fed.nn.Dense(fed.CLASSES, name="head")(x.reshape(x.shape[0], -1))


def test_ridge_refuses_models_without_a_dense_head():
    for model in ((fed.initial, fed.forward), Straight()):
        attacks.Ridge().fit(models.functions(model), fed.IMAGE)
    for model in (Convolutions(), Unbiased()):
        with pytest.raises(ValueError, match=r"^model='"):
            attacks.Ridge().fit(models.functions(model), fed.IMAGE)
    attacks.Ridge().fit(models.functions(models.LeNet5()), (28, 28, 1))


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


# Training from one copy.

COPY = fed.lane(fed.lane(moved(noise(3, ALL, 0.3), [[1]]), 0), 0)


def test_the_posterior_lies_between_copy_and_fine_tuning():
    seen = one(COPY, spread=spread(np.full((1, 1), 0.3), ALL))
    settings: dict[str, Any] = {"steps": 60, "batch_size": 16}
    tuned = steal(attacks.FineTune(**settings), KEY, seen, OWN, ALL)

    def gone(width: float) -> float:
        thief = attacks.Posterior(width=width, **settings)
        found = steal(thief, KEY, seen, OWN, ALL)
        moves = jax.tree.map(lambda a, b: float(jnp.sum((a - b) ** 2)), found, COPY)
        if width > 1e4:
            fed.assert_same(found, tuned, rtol=1e-3, atol=1e-4)
        return math.sqrt(sum(jax.tree.leaves(moves)))

    moves = [gone(width) for width in (1e-25, 1e-4, 0.1, 1.0, 1e5, 1e25)]
    assert moves[0] == 0
    assert moves[1] < 1e-3
    assert moves == sorted(moves)


def test_the_posterior_is_the_minimum():
    """Where descent has come to rest, n · gradient of cross-entropy is −(w − copy) / σ²."""
    few = fed.replaced(OWN, count=jnp.int32(12))
    known = {"stem": jnp.float32(0.02), "head": jnp.float32(0.2)}  # two layers, two widths
    sigma = {n: jax.tree.map(lambda _, n=n: known[n].reshape(1, 1), W[n]) for n in W}
    thief = attacks.Posterior(rate=0.05, steps=1500, batch_size=64)
    found = steal(thief, KEY, one(COPY, spread=sigma), few, ALL)
    rows = np.asarray(OWN.rows)[:12]
    pixels, labels = np.asarray(OWN.images)[rows], np.asarray(OWN.labels)[rows]
    _, gradient = nets.loss_and_gradient(fed.NET, nets.as_float64(found), pixels, labels)
    for layer in W:
        there = -(found[layer]["kernel"] - COPY[layer]["kernel"]) / known[layer] ** 2
        wanted = 12 * gradient[layer]["kernel"]
        assert np.linalg.norm(there - wanted) < 0.1 * np.linalg.norm(wanted)


def test_the_posterior_of_unknown_noise_and_of_fixed_layers():
    thief = short(attacks.Posterior)
    layer = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(COPY["head"])])
    sigma = np.sqrt(np.mean(np.float64(layer) ** 2)).reshape(1, 1)
    known = steal(thief, KEY, one(COPY, spread=spread(sigma)), OWN, HEAD)
    unknown = spread(np.full((1, 1), np.nan))
    fed.assert_same(steal(thief, KEY, one(COPY, spread=unknown), OWN, HEAD), known, **fed.CLOSE)
    fixed = steal(thief.replace(rest="fixed"), KEY, one(COPY), OWN, HEAD)
    fed.assert_same(fixed["stem"], COPY["stem"])
    for found in (known["stem"], known["head"], fixed["head"]):
        name = "stem" if found is known["stem"] else "head"
        assert not np.array_equal(found["kernel"], COPY[name]["kernel"])


def test_retrain_leaves_untouched_layers_alone():
    for public, kept, changed in ((HEAD, "stem", "head"), (touching("stem"), "head", "stem")):
        stolen = steal(short(attacks.Retrain), KEY, one(COPY), OWN, public)
        fed.assert_same(stolen[kept], COPY[kept])
        for name in ("kernel", "bias"):
            assert not np.array_equal(stolen[changed][name], COPY[changed][name])
    tuned = steal(short(attacks.FineTune), KEY, one(COPY), OWN, ALL)
    fed.assert_same(steal(short(attacks.Retrain), KEY, one(COPY), OWN, ALL), tuned, **fed.CLOSE)


def test_reinitialise_does_not_read_touched_layers():
    thief = short(attacks.Reinitialise)
    stolen = steal(thief, KEY, one(COPY), OWN, HEAD)
    other = {**COPY, "head": jax.tree.map(lambda leaf: 3 * leaf + 1, COPY["head"])}
    fed.assert_same(steal(thief, KEY, one(other), OWN, HEAD), stolen)
    fed.assert_same(stolen["stem"], COPY["stem"])
    other = {**COPY, "stem": jax.tree.map(lambda leaf: 3 * leaf, COPY["stem"])}
    found = steal(thief, KEY, one(other), OWN, HEAD)
    assert not np.array_equal(found["head"]["kernel"], stolen["head"]["kernel"])


def test_scratch_reads_no_copy():
    thief = short(attacks.Scratch)
    stolen = steal(thief, KEY, one(COPY), OWN, HEAD)
    other = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), COPY)
    fed.assert_same(steal(thief, KEY, one(other), OWN, HEAD), stolen)


def test_recalibrate_scales_and_shifts_channels():
    """Of a model with a parameter more, that belongs to no layer."""

    def start(key, images):
        return {**fed.initial(key, images), "gain": jnp.float32(1.5)}

    model = models.functions((start, lambda p, x: p["gain"] * fed.forward(p, x)))
    copy = {**COPY, "gain": jnp.float32(1.5)}
    known = fed.replaced(
        ALL, functions=model, touched=jax.tree.map(lambda _: jnp.bool_(True), copy)
    )
    seen = one(copy, spread=jax.tree.map(lambda _: jnp.zeros((1, 1)), copy))
    stolen = steal(short(attacks.Recalibrate), KEY, seen, OWN, known)
    fed.assert_same(stolen["gain"], copy["gain"])
    for name in ("stem", "head"):
        channels = copy[name]["kernel"].shape[-1]
        ratio = np.reshape(stolen[name]["kernel"] / copy[name]["kernel"], (-1, channels))
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[0], ratio.shape), rtol=1e-5)
        assert np.sum(ratio[0] != 1) >= 2  # a dead channel's is 1
        assert not np.array_equal(stolen[name]["bias"], copy[name]["bias"])


def test_recalibrate_undoes_scaled_channels():
    scales = jnp.asarray([6.0, 0.1, 0.2, 4.0])
    head = {"kernel": W["head"]["kernel"] * scales, "bias": W["head"]["bias"] + scales}
    copy = {**W, "head": head}
    stolen = steal(attacks.Recalibrate(rate=0.1), KEY, one(copy), OWN, HEAD)
    assert right(stolen) > 0.9 > 0.7 > right(copy)


# Answers of the owner.


def test_questions_are_own_images_and_what_is_made_of_them():
    few = fed.replaced(OWN, count=jnp.int32(9))
    asked = jax.jit(attacks.KnockOff(asked=60).questions)(KEY, few, HEAD)
    assert asked.shape == (60, *fed.IMAGE)
    assert asked.dtype == jnp.uint8
    mine = np.asarray(OWN.images)[np.asarray(OWN.rows)[:9]]
    asked = np.asarray(asked)
    assert sorted(map(bytes, asked[:9])) == sorted(map(bytes, mine))
    wide = np.pad(mine, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = [(row, column) for row in range(5) for column in range(5)]
    shifted = {bytes(w[r : r + 8, c : c + 8].copy()) for w in wide for r, c in places}
    assert all(bytes(image) in shifted for image in asked[10::2])
    assert len({bytes(image) for image in asked[10::2]}) > 15
    for image in asked[9::2].astype(np.int32):
        fits = [
            np.ptp(np.abs(image - np.round(s * a + (1 - s) * b))) <= 1
            and np.abs(image - np.round(s * a + (1 - s) * b)).max() <= 1
            for a in mine.astype(np.float64)
            for b in mine.astype(np.float64)
            for s in [_share(image, a, b)]
        ]
        assert any(fits)
    # No more than half are plain, however many there are.
    many = np.asarray(attacks.KnockOff(asked=60).questions(KEY, OWN, HEAD))
    known = {bytes(image) for image in np.asarray(OWN.images)}
    assert 30 <= sum(bytes(image) in known for image in many) < 40


def _share(image: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """The λ of λ a + (1 − λ) b that fits best."""
    d = (a - b).ravel()
    return float(np.clip((image - b).ravel() @ d / max(d @ d, 1), 0, 1))


def test_knock_off_learns_from_answers_alone():
    thief = attacks.KnockOff(asked=400, steps=150)
    broken = view(moved(noise(3, size=2.0), [[1, 1]]))
    questions = thief.questions(KEY, OWN, HEAD)
    answers = jax.nn.softmax(jnp.float32(logits(W, questions)))
    seen = fed.replaced(broken, questions=questions, answers=answers)
    blind = fed.replaced(OWN, labels=jnp.zeros_like(OWN.labels))
    stolen = steal(thief, KEY, seen, blind, HEAD)
    assert right(stolen) > 0.9 > 0.6 > right(fed.lane(fed.lane(broken.copies, 0), 0))
