"""What changes only speed, memory and the last bits: how clients, images and layers are laid out.

None and "auto" mean the measured best of a target; docs/speed.md has the figures. Those of
accelerators are reasoned, not measured.
"""

import jax

from noisefl.errors import refuse
from noisefl.models import LOWERINGS, Lowering
from noisefl.parts import Part, choice, part, size, static

AUTOMATIC = "the best of the target"


@part
class Strategy(Part):
    """Options that change how a round runs, and results in the last bits alone."""

    clients_at_once: int | None = size(
        None, "clients trained side by side; 0: all of a round", unit="clients", low=0,
        none=AUTOMATIC,
    )  # fmt: skip
    eval_batch: int | None = size(
        None,
        "images in one forward pass of an evaluation; lanes side by side share them",
        unit="images",
        none=AUTOMATIC,
    )
    gather: str = choice(
        "auto", ("auto", "step", "client"), "a client's images are fetched each step, or at once"
    )
    conv: str = choice("auto", LOWERINGS["conv"], "lowering of convolutions")
    pool: str = choice("auto", LOWERINGS["pool"], "gradient of max pooling")
    dense: str = choice("auto", LOWERINGS["dense"], "gradient of dense kernels")
    precision: str = choice(
        "default", LOWERINGS["precision"], "of matrix products; default is JAX's for the target"
    )
    target: str = choice(
        "auto", ("auto", "cpu", "gpu", "tpu"), "platform that the automatic choices are for"
    )
    clients_axis: str = static(
        "", "mapped axis over which clients and evaluations are split; empty: they are not"
    )

    @property
    def lowering(self) -> Lowering:
        """Of the model's layers. Raises ValueError where two of the options exclude each other."""
        target = None if self.target == "auto" else self.target
        return Lowering(self.conv, self.pool, self.dense, self.precision, target)

    def check(self) -> None:
        _ = self.lowering
        if not isinstance(self.clients_axis, str):
            raise refuse("clients_axis", self.clients_axis, "must be a text")

    def resolved(self, clients: int) -> "Strategy":
        """With a value wherever it says None or auto.

        Two CPU cores are busy with one client's products, and its model stays in cache; on an
        accelerator one client's products are far too small, and a hundred bound the memory. A CPU
        forwards so few images at once that the activations stay in cache.

        Args:
          clients: M, of a round.
        """
        target = jax.default_backend() if self.target == "auto" else self.target
        cpu = target == "cpu"
        at_once = self.clients_at_once
        if at_once is None:
            at_once = 1 if cpu else 100
        return self.replace(
            target="gpu" if target in ("cuda", "rocm") else target,
            clients_at_once=min(at_once or clients, clients),
            eval_batch=self.eval_batch or (50 if cpu else 1000),
            gather="client" if self.gather == "auto" else self.gather,
        )


def lanes_side_by_side(lanes: int, target: str) -> int:
    """Lanes of a sweep side by side on one device; on a CPU one keeps a core busy, as a client."""
    return 1 if target == "cpu" else lanes


def lanes_a_device(total: int, target: str) -> int:
    """Lanes of one program on one device before the memory is looked at. On a CPU lanes go in turn:
    enough of them that devices seldom wait for each other, few enough to be seen to advance."""
    return min(total, 8 if target == "cpu" else 256)


def eval_batch_of_a_lane(batch: int, lanes: int) -> int:
    """Images of each lane in one forward pass, where lanes side by side share it: 64 lanes of 1,000
    images would be 64,000. With less than 32 a pass is little more than its launches."""
    return max(batch // lanes, min(batch, 32))
