"""What happened in a round, without a look at any model."""

from typing import Any

import jax.numpy as jnp

from noisefl.data import Federation
from noisefl.experiment import Experiment
from noisefl.measure.base import Measure, Numbers
from noisefl.parts import part
from noisefl.round import RoundInfo, State


@part
class Protocol(Measure):
    """What happened, without looking at any model."""

    def update(
        self, experiment: Experiment, before: State, after: State, info: RoundInfo,
        observed: Any, data: Federation, carry: Any,
    ) -> tuple[Numbers, Any]:  # fmt: skip
        issue = info.issue
        sent = experiment.scheme.bytes_sent(before.base, issue)
        return {
            "round": after.round,  # int32
            "protected": issue.protected,  # bool: past warm-up, so that the cap applied
            "strength": issue.strength,  # float32: σ, or r where the scale is relative
            "relative_strength": issue.relative_strength,
            "calibration_tries": issue.bill.tries,  # int32
            "calibration_evaluations": issue.bill.evaluations,  # int32: models looked at
            "calibration_samples": issue.bill.samples,  # int32: forward passes of single images
            "training_samples": info.training_samples,  # int32: images, each local epoch counted
            "copy_bytes": jnp.where(issue.shipped, sent, 0),  # float32: of one copy
            "feasible": issue.feasible,  # bool: the calibrator held its aim
            "shipped": issue.shipped,  # bool: models were distributed
            "finite": info.finite,  # bool: no NaN or infinity in owner or base
        }, carry
