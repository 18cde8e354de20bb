"""Attacks: what a thief makes of the copies it was given. One file each, one contract (`base`)."""

from noisefl.attacks.average import Average as Average
from noisefl.attacks.average_then_tune import AverageThenTune as AverageThenTune
from noisefl.attacks.bare_copy import BareCopy as BareCopy
from noisefl.attacks.base import VIEWS as VIEWS
from noisefl.attacks.base import Attack as Attack
from noisefl.attacks.base import Public as Public
from noisefl.attacks.base import View as View
from noisefl.attacks.base import newest as newest
from noisefl.attacks.coefficients import Coefficients as Coefficients
from noisefl.attacks.contrast import Contrast as Contrast
from noisefl.attacks.denoise import Denoise as Denoise
from noisefl.attacks.fine_tune import FineTune as FineTune
from noisefl.attacks.knock_off import KnockOff as KnockOff
from noisefl.attacks.own_model import OwnModel as OwnModel
from noisefl.attacks.posterior import Posterior as Posterior
from noisefl.attacks.recalibrate import Recalibrate as Recalibrate
from noisefl.attacks.refit import Reinitialise as Reinitialise
from noisefl.attacks.refit import Retrain as Retrain
from noisefl.attacks.ridge import Ridge as Ridge
from noisefl.attacks.scratch import Scratch as Scratch
from noisefl.attacks.training import Training as Training
