"""noisefl: simulating federated learning that protects the model it trains."""

from noisefl import attacks as attacks
from noisefl import average as average
from noisefl import calibrate as calibrate
from noisefl import evaluate as evaluate
from noisefl import keys as keys
from noisefl import local as local
from noisefl import measure as measure
from noisefl import mesh as mesh
from noisefl import models as models
from noisefl import noise as noise
from noisefl import optimizers as optimizers
from noisefl import owner as owner
from noisefl import presets as presets
from noisefl import schemes as schemes
from noisefl import server as server
from noisefl import simulate as simulate
from noisefl import sweep as sweep
from noisefl.cohort import Cohort as Cohort
from noisefl.data import Deal as Deal
from noisefl.data import Federation as Federation
from noisefl.data import federate as federate
from noisefl.data import load as load
from noisefl.experiment import Experiment as Experiment
from noisefl.experiment import fedavg as fedavg
from noisefl.parts import Part as Part
from noisefl.parts import child as child
from noisefl.parts import choice as choice
from noisefl.parts import count as count
from noisefl.parts import lanes as lanes
from noisefl.parts import number as number
from noisefl.parts import part as part
from noisefl.parts import size as size
from noisefl.parts import static as static
from noisefl.round import RoundInfo as RoundInfo
from noisefl.round import State as State
from noisefl.round import init as init
from noisefl.round import received as received
from noisefl.round import step as step
from noisefl.strategy import Strategy as Strategy

__version__ = "0.3.0"
