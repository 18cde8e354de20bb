"""Schemes: what clients get instead of W. One file each, one contract (`base`)."""

from noisefl.schemes.bare import Bare as Bare
from noisefl.schemes.base import Calibrated as Calibrated
from noisefl.schemes.base import Issue as Issue
from noisefl.schemes.base import Scheme as Scheme
from noisefl.schemes.base import Secret as Secret
from noisefl.schemes.base import Slot as Slot
from noisefl.schemes.base import bare as bare
from noisefl.schemes.pair import Pair as Pair
from noisefl.schemes.wrappers import NEVER as NEVER
from noisefl.schemes.wrappers import Delayed as Delayed
from noisefl.schemes.wrappers import SkipInfeasible as SkipInfeasible
from noisefl.schemes.wrappers import UntilCap as UntilCap
from noisefl.schemes.wrappers import Warmup as Warmup
from noisefl.schemes.wrappers import Wrapper as Wrapper
