"""The judge of `experiments.bench_calibration`: accuracies on test that no calibrator sees."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from experiments.bench.figures import RATIOS
from noisefl import Experiment, schemes
from noisefl.calibrate import Probe
from noisefl.probing import Copies


class Judge(NamedTuple):
    """Test accuracies, jitted once for all calibrators."""

    owner: Any  # (params, data) → float32 []
    copies: Any  # (base, data, draw, strength) → float32 [V], of all that was to be under the cap
    around: Any  # the same → float32 [G], the highest one at RATIOS times the strength; where the
    # model is not cut below the noise, on 1,000 test images


def make_judge(experiment: Experiment, scheme: schemes.Calibrated) -> Judge:
    """Of the experiment's model and the scheme's copies, whatever their calibrator."""
    on_test = experiment.replace(accuracy_on="test")

    def probe(base: Any, data: Any, size: int | None = None) -> Probe:
        judge = on_test.judge(data)
        judge = judge._replace(images=judge.images[:size], labels=judge.labels[:size])
        members = jax.eval_shape(experiment.cohort.draw, jax.random.key(0), data.counts)
        copies = Copies(
            variants=scheme.variants(members),
            moves=scheme.moves,
            touched=scheme.touched(judge.model, judge.image_shape),
            draw=lambda key: scheme.draw(key, base, judge),
            copy=lambda draw, strength, variant: scheme.variant(base, draw, strength, variant),
        )
        return judge.probe(base, copies)

    def around(base: Any, data: Any, draw: Any, strength: jax.Array) -> jax.Array:
        asked = probe(base, data)
        if asked.questions.below is None:  # each strength is a forward pass of the whole model
            asked = probe(base, data, 1_000)
        of = asked.accuracy
        return lax.map(lambda ratio: jnp.max(of(draw, ratio * strength)[0]), jnp.asarray(RATIOS))

    def copies(base: Any, data: Any, draw: Any, strength: jax.Array) -> jax.Array:
        return probe(base, data).accuracy(draw, strength)[0]

    return Judge(
        jax.jit(lambda params, data: on_test.judge(data).accuracy(params)),
        jax.jit(copies),
        jax.jit(around),
    )
