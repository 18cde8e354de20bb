"""`python four_devices.py FILE.npz`: the lanes of `many_lanes` on 4, and on 2 × 2 devices of a CPU.

A process of its own, as the number of devices is fixed by the first use of one.
"""

import sys

import jax
import many_lanes
import numpy as np

from noisefl import mesh


def main(file: str) -> None:
    assert len(jax.devices()) == 4
    leaves = {}
    for name, on in (("lanes", mesh.make()), ("square", mesh.make(2))):
        for path, leaf in jax.tree.leaves_with_path(many_lanes.swept(on=on)):
            leaves[name + jax.tree_util.keystr(path)] = leaf
    np.savez(file, **leaves)


if __name__ == "__main__":
    main(sys.argv[1])
