"""Attacks: what a thief makes of the copies it was given. One file each, one contract (`base`)."""

from noisefl.attacks.base import Attack as Attack
from noisefl.attacks.base import View as View
from noisefl.attacks.own_model import OwnModel as OwnModel
