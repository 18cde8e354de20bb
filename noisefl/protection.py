"""What a scheme protects, in figures (PROTECTION.md, "Figures"). NumPy; n is seeds, paired.

O is the owner's accuracy, T the thief's and S that of scratch, the same thief with no copy.
λ = (T − S) / (O − S): 0 where nothing was stolen, 1 where all of it was.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000  # of the bootstrap
LEVEL = 0.95  # of its intervals
SHIELDED = 1.05  # T / S below this counts as shielded (TEESlice, arXiv 2310.07152)


class Interval(NamedTuple):
    """A figure over seeds with its bootstrapped interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


def share_stolen(owner: Sequence[float], thief: Sequence[float], scratch: Sequence[float],
                 seed: int = 0) -> Interval:  # fmt: skip
    """λ as a ratio of paired means, signed and not clipped.

    Undefined unless the interval of O − S lies above 0: else there was nothing to steal. Of a
    single seed there is no interval, and O − S itself must be above 0.

    Args:
      owner: O [n].
      thief: T [n].
      scratch: S [n].
      seed: of the resampling.
    """
    o, t, s = (np.asarray(x, float) for x in (owner, thief, scratch))
    nothing = Interval(np.nan, np.nan, np.nan)
    if not np.all(np.isfinite([o, t, s])) or not o.size:
        return nothing
    worth, taken = _means(o - s, seed), _means(t - s, seed)
    if not np.quantile(worth, (1 - LEVEL) / 2) > 0:
        return nothing
    value = np.mean(t - s) / np.mean(o - s)
    if o.size == 1:
        return Interval(float(value), np.nan, np.nan)
    some = worth > 0  # in all but a fortieth at most there is something to steal
    return Interval(float(value), *_ends(taken[some] / worth[some]))


def mean(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean over seeds; of one there is no interval."""
    x = np.asarray(values, float)
    if not x.size or not np.all(np.isfinite(x)):
        return Interval(np.nan, np.nan, np.nan)
    if x.size == 1:
        return Interval(float(x[0]), np.nan, np.nan)
    return Interval(float(np.mean(x)), *_ends(_means(x, seed)))


def over_scratch(thief: Sequence[float], scratch: Sequence[float]) -> float:
    """T / S of the means (TEESlice's measure); below `SHIELDED` counts as shielded."""
    return float(np.mean(thief) / np.mean(scratch))


def images_needed(
    thief: float, images: Sequence[float], scratch: Sequence[float]
) -> tuple[float, bool]:
    """Data-equivalent: images with which scratch comes to T.

    Between two measured points accuracy is taken as linear in the logarithm of the images.

    Args:
      thief: T.
      images: n of each point of scratch's curve, increasing.
      scratch: S of each.

    Returns:
      (images, True), or a bound and False: "fewer than" the first, or "more than" the last.
    """
    n, s = np.asarray(images, float), np.maximum.accumulate(np.asarray(scratch, float))
    if thief <= s[0]:
        return float(n[0]), bool(thief == s[0])
    if thief > s[-1]:
        return float(n[-1]), False
    after = int(np.argmax(s >= thief))
    share = (thief - s[after - 1]) / (s[after] - s[after - 1])
    return float(np.exp(np.interp(share, [0, 1], np.log(n[after - 1 : after + 1])))), True


def _means(values: np.ndarray, seed: int) -> np.ndarray:
    """Of resamples; the same seed resamples the same places, so that paired stays paired."""
    places = np.random.default_rng(seed).integers(0, values.size, (RESAMPLES, values.size))
    return values[places].mean(axis=1)


def _ends(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
