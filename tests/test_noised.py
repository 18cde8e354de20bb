"""The family of noise on copies: what coalitions are left with, in closed form, by linear algebra
and by simulation; the pair, its corner, is in `test_reference` and `test_rounds_reference`."""

import dataclasses
import itertools
import math

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from scheme_rounds import DATA, LAST, M, W, copies, flat, issued, joined, joined_clients, still

from noisefl import noise, schemes
from noisefl.schemes.noised import left, left_of_late

WIDE = {"last": {"kernel": jnp.ones((50, 40)), "bias": jnp.ones(40)}}  # RMS 1: ξ is r times a unit
N = 2040
CLOSE = 5 * math.sqrt(2 / N)  # five relative errors of a variance of N entries


class Affine(nn.Module):
    """One layer of 2,040 parameters."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(40, name="last")(x.reshape(x.shape[0], -1)[:, :50])


WIDE_RUN = fed.TINY.replace(model=Affine()).resolved()

# The best affine combination, by linear algebra.


def covariance(common, fresh, sticky, there, draws=1, opposite=False) -> np.ndarray:
    """Of the noise of all copies of a coalition, written from what a copy is.

    Args:
      common, fresh: variances [J].
      sticky: a variance.
      there: bool [J, c]: who took part.
      draws: D; client k has draw k mod D.
      opposite: client k has sign (−1)^(k // D).
    """
    held = [(t, k) for t, k in itertools.product(*map(range, there.shape)) if there[t, k]]
    found = np.zeros((len(held), len(held)))
    for i, (t, k) in enumerate(held):
        for j, (s, m) in enumerate(held):
            signs = (-1) ** (k // draws) * (-1) ** (m // draws) if opposite else 1
            found[i, j] = (
                common[t] * signs * (t == s and k % draws == m % draws)
                + fresh[t] * (t == s and k == m)
                + sticky * (k == m)
            )
    return found


def best(sigma: np.ndarray) -> float:
    """Variance of the best weights that sum to 1; singular matrices by a ridge that is nothing."""
    ones = np.ones(len(sigma))
    return float(1 / (ones @ np.linalg.solve(sigma + 1e-9 * np.eye(len(sigma)), ones)))


variances = st.floats(0.01, 4)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 6))
def test_with_everybody_there_the_best_weights_are_left_with_what_the_closed_form_says(
    data, rounds, members
):
    """Variances differ from round to round: J is then a harmonic sum."""
    common, fresh = (data.draw(st.lists(variances, min_size=rounds, max_size=rounds)) for _ in "ab")
    sticky = data.draw(variances)
    sigma = covariance(common, fresh, sticky, np.ones((rounds, members), bool))
    of_rounds = [left(a, b, 0.0, members, 1) for a, b in zip(common, fresh, strict=True)]
    expected = 1 / sum(1 / x for x in of_rounds) + left(0.0, 0.0, sticky, members, 1)
    assert best(sigma) == pytest.approx(float(expected), rel=1e-4)
    same = covariance([common[0]] * rounds, [fresh[0]] * rounds, sticky,
                      np.ones((rounds, members), bool))  # fmt: skip
    found = left(common[0], fresh[0], sticky, members, rounds)
    assert best(same) == pytest.approx(float(found), rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_whoever_was_not_always_there_has_no_better_weights(data, rounds, members, draws, opposite):
    """Nor has a coalition whose members share draws: the closed form is a bound."""
    there = data.draw(st.lists(st.booleans(), min_size=rounds * members, max_size=rounds * members))
    there = np.reshape(there, (rounds, members))
    there[:, 0] |= ~there.any(axis=1)
    common, fresh, sticky = (data.draw(variances) for _ in "abc")
    sigma = covariance([common] * rounds, [fresh] * rounds, sticky, there, draws, opposite)
    bound = left(common, fresh, sticky, members, rounds, draws, opposite)
    assert best(sigma) >= float(bound) * (1 - 1e-4)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 7), st.integers(1, 5))
def test_whoever_may_weigh_early_rounds_at_will_is_left_with_no_less_than_the_bound(
    data, rounds, members
):
    """Of all ways to call the last rounds late: by linear algebra, and reached but for rounding of
    the best number of late rounds to a whole one."""
    common, fresh, sticky = (data.draw(variances) for _ in "abc")
    there = np.ones((rounds, members), bool)
    sigma = covariance([common] * rounds, [fresh] * rounds, sticky, there)
    inverse = np.linalg.inv(sigma + 1e-9 * np.eye(len(sigma)))
    found = []
    for early in range(rounds):
        late = np.repeat(np.arange(rounds) >= early, members).astype(float)
        found.append(1 / (late @ inverse @ late))
    bound = float(left_of_late(common, fresh, sticky, members, rounds))
    assert min(found) >= bound * (1 - 1e-4)
    assert bound >= 0.85 * min(found)


def test_early_rounds_give_sticky_noise_away():
    assert left_of_late(0.0, 0.0, 1.0, 3, 2) == 0
    assert left_of_late(0.0, 0.0, 1.0, 2, 1) == 0.5
    assert left_of_late(0.5, 0.0, 0.5, 1, 8) == pytest.approx(4 * 0.5 / 9)
    assert left_of_late(0.5, 0.0, 0.5, 20, 8) == left(0.5, 0.0, 0.5, 20, 8)
    assert left_of_late(0.0, 1.0, 0.0, 2, 4) == left(0.0, 1.0, 0.0, 2, 4)


def test_a_pair_leaves_two_members_nothing_and_one_its_share():
    assert left(1.0, 0.0, 0.0, 2, 1, opposite=True) == 0
    assert left(1.0, 0.0, 0.0, 1, 4, opposite=True) == 0.25
    assert left(1.0, 0.0, 0.0, 9, 1) == 1
    assert left(1.0, 0.0, 0.0, 9, 1, draws=3) == pytest.approx(1 / 3)


# By simulation.


def xi_of(scheme, strengths, members=None, seed=5):
    """Noise of M clients in rounds of those strengths, over a W of ones: [J, M, n]."""
    carry, found = None, []
    for t, strength in enumerate(strengths):
        now = scheme.replace(calibrator=still(strength))
        issue, members, carry = issued(now, WIDE, t, seed + t, carry, WIDE_RUN, members)
        found.append(joined_clients(copies(now, issue, members, WIDE)) - 1)
    return np.stack(found)


@pytest.mark.parametrize(
    ("own", "common"), [("fresh", 0.0), ("fresh", 0.3), ("sticky", 0.0), ("sticky", 0.5)]
)
def test_averages_keep_the_share_that_the_docstring_says(own, common):
    """c = M clients in J rounds. A variance of n = 2,040 entries has a relative error of
    √(2/n) = 0.031; of each figure five of these are allowed."""
    rounds, r = 5, 3.0
    xi = xi_of(schemes.own_noise(own, common, on=LAST), [r] * rounds) / r
    np.testing.assert_allclose(np.mean(xi**2, axis=-1), 1, rtol=CLOSE)
    own_share = 1 - common
    kinds = (common, own_share, 0.0) if own == "fresh" else (common, 0.0, own_share)
    expected = left(*kinds, M, rounds)
    assert np.mean(np.mean(xi, axis=(0, 1)) ** 2) == pytest.approx(float(expected), rel=CLOSE)
    # Correlations of two clients of a round are ρ; of two rounds of a client 1 − ρ or 0.
    assert np.mean(xi[0, 0] * xi[0, 1]) == pytest.approx(common, abs=CLOSE)
    of_rounds = own_share if own == "sticky" else 0
    assert np.mean(xi[0, 0] * xi[1, 0]) == pytest.approx(of_rounds, abs=CLOSE)


@pytest.mark.parametrize("common", [0.0, 0.2, 0.8])
def test_two_strengths_do_not_cancel_sticky_noise(common):
    """The best weights of all rounds, which know every variance, are left with the bound; the
    sticky noise is the same to rounding in all rounds, and a round that asks for less has it
    alone."""
    strengths = [2.0, 3.0, 0.5, 4.0]
    xi = xi_of(schemes.own_noise("sticky", common, on=LAST), strengths)
    sticky = (1 - common) * 4.0
    totals = np.array([max(s**2, sticky) for s in strengths])
    np.testing.assert_allclose(np.mean(xi**2, axis=-1), totals[:, None] * np.ones(M), rtol=CLOSE)
    differences = xi[:, 0] - xi[:, 1]
    np.testing.assert_allclose(differences, differences[:1] * np.ones((4, 1)), atol=1e-5)
    fresh = np.maximum(totals - sticky, 1e-12)
    sigma = covariance(fresh, [0.0] * 4, sticky, np.ones((4, M), bool))
    weights = np.linalg.solve(sigma + 1e-9 * np.eye(4 * M), np.ones(4 * M))
    weights /= weights.sum()
    found = np.mean((weights @ xi.reshape(4 * M, -1)) ** 2)
    assert found == pytest.approx(best(sigma), rel=CLOSE)
    assert found >= sticky / M * (1 - CLOSE)


def test_a_round_that_hands_out_w_bare_forgets_no_scale():
    """Nor does one before the first noise set it."""
    xi = xi_of(schemes.own_noise("sticky", 0.5, on=LAST), [0.0, 2.0, 0.0, 3.0])
    assert not xi[0].any()
    assert not xi[2].any()
    differences = xi[:, 0] - xi[:, 1]
    np.testing.assert_allclose(differences[3], differences[1], atol=1e-5)
    assert np.mean(differences[3] ** 2) == pytest.approx(2 * 0.5 * 2.0**2, rel=CLOSE)


def test_sticky_noise_is_of_the_client_and_not_of_its_slot():
    scheme = schemes.own_noise("sticky", calibrator=still(1.0))
    issue, members, carry = issued(scheme)
    turned = dataclasses.replace(members, clients=members.clients[::-1])
    again, _, _ = issued(scheme, W, 3, 9, carry, members=turned)
    one, other = copies(scheme, issue, members), copies(scheme, again, turned)
    fed.assert_same(one, jax.tree.map(lambda leaf: leaf[::-1], other), rtol=1e-6, atol=1e-6)
    fresh = schemes.own_noise(calibrator=still(1.0))
    of_round = joined(copies(fresh, issued(fresh)[0], members))
    assert (of_round != joined(copies(fresh, issued(fresh, seed=8)[0], members))).any()


def test_a_last_bit_of_the_strength_asks_for_no_common_noise():
    """√(whole² − sticky²) would be 3e-4 of it; what is more than a millionth of it is asked for."""
    scheme = schemes.own_noise("sticky", on=LAST)
    path = ("last", "kernel")
    bit = np.nextafter(np.float32(2), np.float32(3))
    for strength, wanted in ((2.0, 0.0), (bit, 0.0), (2.5, 1.5), (1.0, 0.0)):
        found = scheme.deviations(WIDE, {path: jnp.float32(2)}, jnp.float32(strength), (path,))
        assert float(found.common[path]) == pytest.approx(wanted, abs=1e-6)
        assert float(found.sticky[path]) == 2


def test_sticky_noise_is_independent_over_clients_and_seeds():
    scheme = schemes.own_noise("sticky", on=LAST)
    one, other = (xi_of(scheme, [1.0], seed=5)[0] for _ in "ab")
    np.testing.assert_array_equal(one, other)
    correlations = one @ one.T / N - np.eye(M)
    np.testing.assert_allclose(correlations, 0, atol=CLOSE)


def test_each_draw_goes_to_its_clients():
    """Of M = 4: slots 0 and 1 are group a, 2 and 3 group b."""
    xi = xi_of(schemes.Noised(on=LAST, common_draws=2), [1.0])[0]
    np.testing.assert_allclose(xi[0], -xi[2], atol=1e-6)
    np.testing.assert_allclose(xi[1], -xi[3], atol=1e-6)
    assert abs(np.mean(xi[0] * xi[1])) < CLOSE
    alike = xi_of(schemes.Noised(on=LAST, common_draws=2, signs="same"), [1.0])[0]
    np.testing.assert_array_equal(alike[0], alike[2])
    np.testing.assert_array_equal(xi_of(schemes.Noised(on=LAST, signs="same"), [1.0])[0][0],
                                  xi_of(schemes.Noised(on=LAST), [1.0])[0][0])  # fmt: skip


@pytest.mark.parametrize(("own", "share"), [("fresh", 0.4), ("sticky", 0.4), ("sticky", 0.1)])
def test_what_is_judged_for_a_coalition_has_the_variance_that_is_left(own, share):
    """With little common noise, what early rounds give away counts."""
    scheme = schemes.own_noise(own, share, on=LAST, coalition=3.0, coalition_rounds=2.0)
    carry = None
    for t, strength in enumerate((2.0, 3.0)):
        now = scheme.replace(calibrator=still(strength))
        issue, _, carry = issued(now, WIDE, t, 5 + t, carry, WIDE_RUN)
        draw = issue.secret.draw
        judged = now.variant(WIDE, draw, issue.strength, jnp.int32(M))
        first = now.variant(WIDE, draw, issue.strength, jnp.int32(0))
        xi, of_copy = (np.concatenate([np.ravel(x - 1) for x in jax.tree.leaves(model)])
                       for model in (judged, first))  # fmt: skip
        total = strength**2
        kinds = (share * total, (1 - share) * total, 0.0)
        if own == "sticky":
            kinds = (total - (1 - share) * 4.0, 0.0, (1 - share) * 4.0)
        if (share, strength) == (0.1, 2.0):
            assert left_of_late(*kinds, 3, 2) < 0.6 * left(*kinds, 3, 2)
        assert np.mean(xi**2) == pytest.approx(float(left_of_late(*kinds, 3, 2)), rel=CLOSE)
        assert abs(np.mean(xi * of_copy)) < CLOSE * total
        assert issue.accuracy.shape == (M,)


def test_the_cap_on_a_coalition_raises_the_strength():
    """On the trained tiny model, by the source's loop on the whole split."""

    def strength(**fields):
        rule = fed.LOOP.replace(strength=0.5, max_tries=400)
        scheme = schemes.own_noise("sticky", calibrator=rule, **fields)
        issue, *_ = issued(scheme)
        assert issue.feasible
        return float(issue.strength)

    alone, five = strength(), strength(coalition=5.0)
    assert five > 1.3 * alone


def test_what_does_not_go_together_is_refused():
    place = fed.TINY.functions, fed.IMAGE, fed.TINY.cohort
    with pytest.raises(ValueError, match=r"^signs='opposite': two clients average it away"):
        schemes.Noised(coalition=2.0).fit(*place)
    schemes.Noised(coalition=2.0, signs="same").fit(*place)
    with pytest.raises(ValueError, match=r"^clients_per_round=4: each of the two groups needs"):
        schemes.Noised(common_draws=3).fit(*place)


def test_the_pair_is_a_corner():
    """One draw by the keys of `Where.draw`, and ±."""
    scheme = schemes.Noised(on=noise.layers("last"), calibrator=still(1.5))
    issue, members, _ = issued(scheme)
    drawn = {path: np.asarray(leaf) for path, leaf in issue.secret.draw.common[0].items()}
    for slot in range(M):
        copy = flat(
            jax.tree.map(lambda leaf, slot=slot: leaf[slot], copies(scheme, issue, members))
        )
        sign = 1 - 2 * int(members.groups[slot])
        for path, leaf in flat(W).items():
            wanted = leaf + sign * 1.5 * drawn[path] if path in drawn else leaf
            np.testing.assert_allclose(copy[path], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("own", ["absent", "sticky"])
@pytest.mark.parametrize("damping", [0.0, 1.0, 2.0])
def test_damped_steps_are_those_of_a_smaller_rate(own, damping):
    """Of SGD, by the relative strength of the round; not in rounds that hand out W."""
    r, rate = 3.0, 0.5

    def after(learning_rate, warmup_rounds=0, **fields):
        scheme = schemes.own_noise(own, on=LAST, calibrator=still(r), **fields)
        scheme = schemes.Warmup(scheme, warmup_rounds)
        one = fed.experiment(scheme=scheme, learning_rate=learning_rate, momentum=0.0)
        return fed.step(fed.KEY, fed.start(one), DATA, one)[0].base

    smaller = rate * (1 + r**2) ** (-damping / 2)
    fed.assert_same(after(rate, damping=damping), after(smaller), **fed.CLOSE)
    fed.assert_same(after(rate, 9, damping=damping), after(rate, 9), **fed.CLOSE)
