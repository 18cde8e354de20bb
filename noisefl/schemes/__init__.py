"""Schemes: what clients get instead of W. One file each, one contract (`base`)."""

from noisefl.schemes.bare import Bare as Bare
from noisefl.schemes.base import Calibrated as Calibrated
from noisefl.schemes.base import Issue as Issue
from noisefl.schemes.base import OneCopy as OneCopy
from noisefl.schemes.base import Scheme as Scheme
from noisefl.schemes.base import Secret as Secret
from noisefl.schemes.base import Slot as Slot
from noisefl.schemes.base import bare as bare
from noisefl.schemes.base import uncalibrated as uncalibrated
from noisefl.schemes.few_weights import FewWeights as FewWeights
from noisefl.schemes.noised import Noised as Noised
from noisefl.schemes.noised import own_noise as own_noise
from noisefl.schemes.own_classes import OwnClasses as OwnClasses
from noisefl.schemes.quantised import Quantised as Quantised
from noisefl.schemes.released import Released as Released
from noisefl.schemes.statistics import Statistics as Statistics
from noisefl.schemes.sub_model import SubModel as SubModel
from noisefl.schemes.withheld import Withheld as Withheld
from noisefl.schemes.wrappers import NEVER as NEVER
from noisefl.schemes.wrappers import Delayed as Delayed
from noisefl.schemes.wrappers import SkipInfeasible as SkipInfeasible
from noisefl.schemes.wrappers import UntilCap as UntilCap
from noisefl.schemes.wrappers import Warmup as Warmup
from noisefl.schemes.wrappers import Wrapper as Wrapper
