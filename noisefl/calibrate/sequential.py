"""The source's loop with a sequential test in place of whole-split accuracies.

ALGORITHM.md, "One round", the while loop; `climb` and `wager` for the test.
"""

import jax.numpy as jnp

from noisefl import keys
from noisefl.calibrate.base import Calibrator, Probe, num_classes, warm_start
from noisefl.calibrate.blocks import blocks
from noisefl.calibrate.climb import climb


def sequential(chunk: int = 50, limit: int = 1500) -> Calibrator:
    """Climbs from below the last round's strength until the test accepts a fresh draw.

    Fresh draws find those that degrade both copies at little strength. Raising one draw until it
    does, however strong that is, broke the model down in a quarter of the runs (BUILD_NOTES.md).

    Guarantee: the chance, over the order of the images and the images themselves, that a round
    ships as feasible a pair of which one copy's accuracy exceeds cap − cap_margin is at most
    δ = `Hyper.error_rate`, whatever the base and the draw, as long as the base was not fitted to
    the validation images. (It depends on them only through earlier rounds' strengths.) Accuracy is
    that on the images' distribution, with classes as frequent as in the validation split.

    Args:
      chunk: images between two looks.
      limit: images that one copy is judged on at most; undecided then, it does not hold.
    """

    def calibrate(key, base, probe: Probe, hyper, carry):
        del base
        jury = blocks(keys.stream(key, "images"), probe.labels, num_classes(probe), limit)
        found = climb(
            probe,
            lambda number: probe.draw(keys.stream(key, "draw", number)),
            warm_start(carry, hyper, 0.7),
            jury,
            hyper,
            hyper.strength_factor,
            chunk,
            redraw=True,
        )
        return found, jnp.where(found.feasible, found.strength, carry)

    return Calibrator(init=lambda: jnp.float32(jnp.nan), calibrate=calibrate)
