"""The source's loop with a sequential test in place of whole-split accuracies.

ALGORITHM.md, "One round", the while loop; `climb` and `wager` for the test.
"""

import jax

from noisefl import keys
from noisefl.calibrate.base import Decision, Evidence, Probe
from noisefl.calibrate.climb import Tested, climb
from noisefl.parts import part


@part
class Sequential(Tested):
    """Climbs from below the last round's strength until the test accepts a fresh draw.

    Where the bare base is at or under the aim on the scouts, it is the first to be tested. Fresh
    draws find those that degrade all copies at little strength. Raising one draw until it does,
    however strong that is, broke models down, and so did steps of 1.2 (docs/results.md).

    Guarantee: as `Tested`. The scouts are none of the images that it tests on.
    """

    def calibrate(
        self, key: jax.Array, probe: Probe, carry: jax.Array
    ) -> tuple[Decision, Evidence, Probe, jax.Array]:
        scouts, jury = self.seat(key, probe)
        images = scouts.images.reshape(-1)
        clean, probe = probe.clean(images)
        decision, evidence, probe = climb(
            self,
            probe,
            draw_of=lambda number: probe.draw(keys.stream(key, "draw", number)),
            bare=scouts.accuracy(clean, probe.labels[images]) <= self.aim,
            start=self.warm_start(carry, 0.7),
            jury=jury,
            redraw=True,
        )
        return decision, evidence, probe, self.remembered(decision, carry)
