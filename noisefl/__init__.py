"""noisefl: simulating federated learning that protects the model it trains."""

from noisefl import aggregate as aggregate
from noisefl import calibrate as calibrate
from noisefl import client as client
from noisefl import evaluate as evaluate
from noisefl import keys as keys
from noisefl import mesh as mesh
from noisefl import models as models
from noisefl import noise as noise
from noisefl import simulate as simulate
from noisefl import sweep as sweep
from noisefl.config import NEVER as NEVER
from noisefl.config import Config as Config
from noisefl.config import Hyper as Hyper
from noisefl.config import check_hyper as check_hyper
from noisefl.config import fedavg as fedavg
from noisefl.data import Dataset as Dataset
from noisefl.data import FederatedData as FederatedData
from noisefl.data import federate as federate
from noisefl.data import load as load
from noisefl.rounds import Round as Round
from noisefl.rounds import RoundInfo as RoundInfo
from noisefl.rounds import RoundState as RoundState
from noisefl.rounds import make_round as make_round

__version__ = "0.1.0"
