"""Calibrators: how strong the noise of a round is. One file each, one contract (`base`)."""

from noisefl.calibrate.base import Calibration as Calibration
from noisefl.calibrate.base import Calibrator as Calibrator
from noisefl.calibrate.base import Probe as Probe
from noisefl.calibrate.base import Reading as Reading
from noisefl.calibrate.base import holds as holds
from noisefl.calibrate.base import no_noise as no_noise
from noisefl.calibrate.fixed import fixed as fixed
from noisefl.calibrate.loop import accuracy_loop as accuracy_loop
from noisefl.calibrate.loop import additive as additive
from noisefl.calibrate.loop import geometric as geometric
from noisefl.config import Config


def from_config(config: Config) -> Calibrator:
    """The calibrator that `config.calibrator` and `config.redraw` name."""
    if config.calibrator == "fixed":
        return fixed()
    rule = {"additive": additive, "geometric": geometric}[config.calibrator]
    return accuracy_loop(rule, config.redraw)
