"""Measures: what is recorded of a round. One file each, one contract (`base`)."""

from noisefl.measure.accuracies import Accuracies as Accuracies
from noisefl.measure.averaged import Averaged as Averaged
from noisefl.measure.base import Conclusion as Conclusion
from noisefl.measure.base import Following as Following
from noisefl.measure.base import Measure as Measure
from noisefl.measure.base import Numbers as Numbers
from noisefl.measure.base import Regular as Regular
from noisefl.measure.protocol import Protocol as Protocol
from noisefl.measure.standard import Standard as Standard
from noisefl.measure.thief import Thief as Thief
from noisefl.measure.thieves import FEW as FEW
from noisefl.measure.thieves import Thieves as Thieves
