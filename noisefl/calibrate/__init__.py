"""Calibrators: how strong the noise of a round is. One file each, one contract (`base`)."""

from noisefl.calibrate.base import Calibration as Calibration
from noisefl.calibrate.base import Calibrator as Calibrator
from noisefl.calibrate.base import Probe as Probe
from noisefl.calibrate.base import Reading as Reading
from noisefl.calibrate.base import aim as aim
from noisefl.calibrate.base import holds as holds
from noisefl.calibrate.base import no_noise as no_noise
from noisefl.calibrate.bisection import bisection as bisection
from noisefl.calibrate.blocks import blocks as blocks
from noisefl.calibrate.climb import climb as climb
from noisefl.calibrate.fixed import fixed as fixed
from noisefl.calibrate.loop import accuracy_loop as accuracy_loop
from noisefl.calibrate.loop import additive as additive
from noisefl.calibrate.loop import geometric as geometric
from noisefl.calibrate.parallel import parallel as parallel
from noisefl.calibrate.predictive import predictive as predictive
from noisefl.calibrate.sequential import sequential as sequential
from noisefl.calibrate.unverified import snr as snr
from noisefl.calibrate.unverified import unverified as unverified
from noisefl.config import Config

BY_NAME = {
    "fixed": fixed,
    "bisection": bisection,
    "parallel": parallel,
    "sequential": sequential,
    "predictive": predictive,
    "unverified": unverified,
    "snr": snr,
}

_ON_SPLIT = (
    "both copies are at or under the aim on the N images of the judging split; nothing is said of "
    "other images"
)
_ON_DISTRIBUTION = (
    "with probability 1 - error_rate a round, over the images and their order, no copy that ships "
    "as feasible exceeds the aim on new images with classes as frequent as in the judging split, "
    "for a base and a first strength not chosen on it"
)
GUARANTEES = {
    **dict.fromkeys(("additive", "geometric", "fixed", "bisection", "parallel"), _ON_SPLIT),
    **dict.fromkeys(("sequential", "predictive"), _ON_DISTRIBUTION),
    **dict.fromkeys(("unverified", "snr"), "none"),
}  # of a round that calls itself feasible


def from_config(config: Config) -> Calibrator:
    """The calibrator that `config.calibrator` and `config.redraw` name."""
    if config.calibrator in BY_NAME:
        return BY_NAME[config.calibrator]()
    rule = {"additive": additive, "geometric": geometric}[config.calibrator]
    return accuracy_loop(rule, config.redraw)
