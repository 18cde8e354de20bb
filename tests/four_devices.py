"""`python four_devices.py lanes|square FILE.npz`: the runs of `many_lanes` on 4 devices of a CPU,
each lane on one of them, or on 2 × 2.

A process of its own, as the number of devices is fixed by the first use of one.
"""

import sys
from typing import Any

import jax
import many_lanes
import numpy as np

from noisefl import mesh


def main(which: str, file: str) -> None:
    assert len(jax.devices()) == 4
    on = mesh.make(2 if which == "square" else 1)
    leaves: Any = many_lanes.by_name(many_lanes.swept(on=on))
    np.savez(file, **leaves)


if __name__ == "__main__":
    main(*sys.argv[1:])
