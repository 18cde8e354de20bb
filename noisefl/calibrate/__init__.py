"""Calibrators: how strong the noise of a round is. One file each, one contract (`base`)."""

from noisefl.calibrate.base import Bill as Bill
from noisefl.calibrate.base import Calibrator as Calibrator
from noisefl.calibrate.base import Decision as Decision
from noisefl.calibrate.base import Draw as Draw
from noisefl.calibrate.base import Evidence as Evidence
from noisefl.calibrate.base import Probe as Probe
from noisefl.calibrate.base import Questions as Questions
from noisefl.calibrate.base import Search as Search
from noisefl.calibrate.bisection import Bisection as Bisection
from noisefl.calibrate.climb import Tested as Tested
from noisefl.calibrate.fixed import Fixed as Fixed
from noisefl.calibrate.loop import Additive as Additive
from noisefl.calibrate.loop import Geometric as Geometric
from noisefl.calibrate.loop import Loop as Loop
from noisefl.calibrate.parallel import Parallel as Parallel
from noisefl.calibrate.predictive import Predictive as Predictive
from noisefl.calibrate.sequential import Sequential as Sequential
from noisefl.calibrate.unverified import SNR as SNR
from noisefl.calibrate.unverified import Unverified as Unverified
