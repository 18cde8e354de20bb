"""Figures of protection, against numbers made by hand and by simulation."""

import math
import warnings

import numpy as np
import pytest

from noisefl import protection
from noisefl.protection import Interval, images_needed, mean, over_scratch


def share_stolen(owner, thief, scratch) -> Interval:
    """Of lists or arrays."""
    return protection.share_stolen(list(owner), list(thief), list(scratch))


def undefined(found: Interval) -> bool:
    return all(map(math.isnan, found))


@pytest.mark.parametrize(
    ("owner", "thief", "scratch", "wanted"),
    [
        ([0.9], [0.5], [0.5], 0.0),  # nothing stolen
        ([0.9], [0.9], [0.5], 1.0),  # all of it
        ([0.9], [0.7], [0.5], 0.5),
        ([0.9], [0.4], [0.5], -0.25),  # signed: the copy has misled the thief
        ([0.9], [0.98], [0.5], 1.2),  # and not clipped
        ([0.9, 0.8], [0.8, 0.6], [0.5, 0.5], 0.4 / 0.7),  # a ratio of means, not a mean of ratios
        ([0.9, 0.6], [0.9, 0.4], [0.5, 0.5], 0.6),
        ([0.9, 0.9], [0.5, 0.3], [0.5, 0.5], -0.25),
    ],
)
def test_the_share_stolen_of_numbers_made_by_hand(owner, thief, scratch, wanted):
    found = share_stolen(owner, thief, scratch)
    assert found.value == pytest.approx(wanted, abs=1e-12)
    if len(owner) == 1:  # one seed is no interval
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    else:
        assert found.low <= found.value <= found.high
    assert share_stolen(owner, thief, scratch) == pytest.approx(found, nan_ok=True)


@pytest.mark.parametrize(
    ("owner", "thief", "scratch"),
    [
        ([0.5], [0.6], [0.5]),  # nothing to steal
        ([0.4], [0.6], [0.5]),
        ([0.4, 0.3], [0.6, 0.6], [0.5, 0.5]),
        ([0.9, 0.5], [0.6, 0.6], [0.5, 0.5]),  # the interval of O − S ends at 0
        ([0.9, 0.9, 0.45], [0.6, 0.6, 0.6], [0.5, 0.5, 0.5]),  # and goes below
        ([math.nan], [0.6], [0.5]),
        ([0.9, 0.9], [0.6, math.nan], [0.5, 0.5]),
        ([0.9, 0.9], [0.6, 0.7], [math.nan, 0.5]),
        ([math.inf], [0.6], [0.5]),
        ([], [], []),
    ],
)
def test_where_there_was_nothing_to_steal_no_share_is_stolen(owner, thief, scratch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert undefined(share_stolen(owner, thief, scratch))


def test_an_owner_above_scratch_in_all_seeds_is_worth_something():
    owner, scratch = [0.9, 0.52, 0.51], [0.5, 0.5, 0.5]
    found = share_stolen(owner, [0.7, 0.51, 0.505], scratch)
    assert found.value == pytest.approx(0.215 / 0.43)
    assert 0 < found.low <= found.value <= found.high < 1


def test_a_seed_with_nothing_to_steal_does_not_spoil_the_interval():
    """Of four seeds one has O = T = S, and a resample may be of that one alone; the interval of
    O − S is above 0 all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = share_stolen([0.5, 0.9, 0.9, 0.9], [0.5, 0.8, 0.8, 0.8], [0.5] * 4)
    assert found.value == pytest.approx(0.75)
    assert found.low == pytest.approx(0.75)
    assert found.high == pytest.approx(0.75)


def test_seeds_are_paired():
    """O, T and S go up and down together, so that what was stolen is the same in each seed."""
    shift = np.array([-0.2, -0.1, 0.0, 0.1, 0.2])
    found = share_stolen(0.7 + shift, 0.6 + shift, 0.3 + shift)
    assert found == pytest.approx((0.75, 0.75, 0.75))
    apart = share_stolen(0.7 + shift, 0.6 + shift[::-1], 0.3 + shift)
    assert apart.value == pytest.approx(0.75)
    assert apart.high - apart.low > 0.3


def test_the_interval_covers_as_often_as_it_says():
    """30 seeds, 400 times: O − S has mean 0.4, T − S a quarter of it, and noise of both in common.

    The percentile bootstrap covers a little less than 95 %; at 93 % the count is Binomial(400,
    0.93), below 350 or above 392 less than once in 10,000 each.
    """
    rng, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(400):
        common = rng.normal(0, 0.1, 30)
        scratch = 0.4 + common
        owner = 0.8 + common + rng.normal(0, 0.05, 30)
        thief = 0.5 + common + rng.normal(0, 0.05, 30)
        found = share_stolen(owner, thief, scratch)
        covered += found.low <= 0.25 <= found.high
        widths.append(found.high - found.low)
    assert 350 <= covered <= 392
    # The delta method: sd of the ratio of means is √(0.05² + 0.25² 0.05²) / (0.4 √30).
    wide = 2 * 1.96 * 0.05 * math.sqrt(1 + 0.25**2) / (0.4 * math.sqrt(30))
    assert np.mean(widths) == pytest.approx(wide, rel=0.1)


def test_means_have_intervals_and_one_seed_has_none():
    found = mean([0.2, 0.4, 0.6])
    assert found.value == pytest.approx(0.4)
    assert 0.2 <= found.low < 0.4 < found.high <= 0.6
    alone = mean([0.3])
    assert alone.value == 0.3
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    assert undefined(mean([]))
    assert undefined(mean([0.3, math.nan]))
    assert mean([0.5] * 4) == pytest.approx((0.5, 0.5, 0.5))
    x = np.random.default_rng(1).normal(size=200)
    assert mean(list(x)).high - mean(list(x)).low == pytest.approx(
        2 * 1.96 * x.std() / math.sqrt(200), rel=0.1
    )


def test_over_scratch_is_of_the_means():
    assert over_scratch([0.6, 0.3], [0.5, 0.25]) == pytest.approx(1.2)
    assert over_scratch([0.9, 0.1], [0.3, 0.7]) == pytest.approx(1.0)
    assert over_scratch([0.51], [0.5]) < protection.SHIELDED < over_scratch([0.53], [0.5])


CURVE = [100, 200, 800], [0.5, 0.6, 0.9]


@pytest.mark.parametrize(
    ("thief", "images", "exact"),
    [
        (0.5, 100, True),
        (0.6, 200, True),
        (0.9, 800, True),
        (0.55, 100 * math.sqrt(2), True),  # half way in the logarithm
        (0.75, 400, True),
        (0.7, 200 * 4 ** (1 / 3), True),
        (0.4, 100, False),  # fewer than the first
        (0.95, 800, False),  # more than the last
    ],
)
def test_the_images_that_scratch_would_need(thief, images, exact):
    assert images_needed(thief, *CURVE) == (pytest.approx(images), exact)


def test_a_curve_that_falls_or_stands_still_never_needs_fewer_images_for_more():
    images, scratch = [100, 200, 400, 800], [0.5, 0.7, 0.6, 0.8]
    assert images_needed(0.65, images, scratch) == (pytest.approx(100 * 2**0.75), True)
    assert images_needed(0.7, images, scratch) == (pytest.approx(200), True)
    assert images_needed(0.75, images, scratch) == (pytest.approx(400 * math.sqrt(2)), True)
    assert images_needed(0.5, [100, 200], [0.5, 0.5]) == (100, True)
    assert images_needed(0.6, [100, 200], [0.5, 0.5]) == (200, False)
    needed = [images_needed(t, images, scratch)[0] for t in np.linspace(0.4, 0.9, 60)]
    assert needed == sorted(needed)


def test_of_one_point_of_the_curve_there_are_bounds_alone():
    assert images_needed(0.4, [100], [0.5]) == (100, False)
    assert images_needed(0.5, [100], [0.5]) == (100, True)
    assert images_needed(0.6, [100], [0.5]) == (100, False)
