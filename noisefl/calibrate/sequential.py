"""The source's loop with a sequential test in place of whole-split accuracies.

ALGORITHM.md, "One round", the while loop; `climb` and `wager` for the test.
"""

import jax.numpy as jnp

from noisefl import keys
from noisefl.calibrate.base import Calibrator, Probe, warm_start
from noisefl.calibrate.blocks import deal
from noisefl.calibrate.climb import climb


def sequential(
    chunk: int = 50, limit: int = 1500, step: float = 1.1, stratified: bool = True
) -> Calibrator:
    """Climbs from below the last round's strength until the test accepts a fresh draw.

    Fresh draws find those that degrade both copies at little strength. Raising one draw until it
    does, however strong that is, broke models down, and so did steps of 1.2 (BUILD_NOTES.md).

    Guarantee: the chance, over the images and their order, that a round ships as feasible a pair of
    which one copy's accuracy exceeds cap − cap_margin is at most δ = `Hyper.error_rate`, whatever
    the draw, for a base and a first strength that do not depend on the judging split. That is so in
    the first protected round. Later ones know the split through the strengths that shipped before
    (and through accuracies, with `keep_best`, `warmup="until_cap"` or `on_infeasible="skip"`).

    Accuracy is that on new images with classes as frequent as in the judging split. Where the
    split's labels are themselves a small sample, their frequencies are off by chance, which δ does
    not cover: N = 2,000 is too few, 10,000 are enough (BUILD_NOTES.md). Without `stratified` it is
    the accuracy on new images and labels, for any N, and twice the images are needed.

    Args:
      chunk: images between two looks.
      limit: images that one copy is judged on at most; undecided then, it does not hold.
      step: factor between two tries.
      stratified: whether each look takes the classes in their proportions.
    """

    def calibrate(key, base, probe: Probe, hyper, carry):
        del base
        jury = deal(keys.stream(key, "images"), probe, limit, stratified)
        found = climb(
            probe,
            lambda number: probe.draw(keys.stream(key, "draw", number)),
            warm_start(carry, hyper, 0.7),
            jury,
            hyper,
            step,
            chunk,
            redraw=True,
        )
        return found, jnp.where(found.feasible, found.strength, carry)

    return Calibrator(init=lambda: jnp.float32(jnp.nan), calibrate=calibrate)
