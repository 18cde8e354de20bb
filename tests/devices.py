"""`python devices.py alone|one|lanes|square FILE.npz`: the runs of `many_lanes` on a CPU:
by themselves or as lanes of one device, each lane on one of four devices, or on 2 × 2.

A process of its own, as the number of devices is fixed by the first use of one.
"""

import sys
from typing import Any

import jax
import many_lanes
import numpy as np

from noisefl import mesh


def main(which: str, file: str) -> None:
    assert len(jax.devices()) == (1 if which in ("alone", "one") else 4)
    if which == "alone":
        each = [many_lanes.alone(lane) for lane in many_lanes.lanes()]
        found = jax.tree.map(lambda *each: np.stack(each), *each)
    else:
        found = many_lanes.swept(on=mesh.make(2 if which == "square" else 1))
    leaves: Any = many_lanes.by_name(found)
    np.savez(file, **leaves)


if __name__ == "__main__":
    main(*sys.argv[1:])
