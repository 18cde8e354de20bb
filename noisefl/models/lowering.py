"""How a model's layers become XLA operations: options that change speed and the last bits."""

import dataclasses

import jax

from noisefl.errors import nearest, refuse

LOWERINGS: dict[str, tuple[str, ...]] = {
    "conv": ("auto", "patches", "winograd", "lax"),
    "pool": ("auto", "compare", "mask", "reduce"),
    "dense": ("auto", "matmul", "outer"),
    "precision": ("default", "float32", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class Lowering:
    """Lowering of each kind of layer; "auto" is the measured best of the backend (BUILD_NOTES.md).

    Attributes:
      conv: "patches": shifted images side by side, one matrix product; of a convolution that is
        pooled, patches of whole pooling windows. "winograd": a sixth to a third of its
        multiplications, about 10 times its rounding error, kernels of 2 × 2 to 5 × 5. "lax": XLA's
        own convolution, which is slow in a loop on a CPU and under vmap.
      pool: gradient of max pooling by "compare" with the maximum, place by place in a window; by a
        "mask" of four bits a window; or XLA's own of a "reduce". Patches of windows have their own.
      dense: gradient of a dense kernel by "matmul", or as a sum of the rows' "outer" products,
        which XLA fuses with the optimizer's update, so that a large kernel is written once a step.
      target: the platform that "auto" is for: "cpu", "gpu" or "tpu"; None is the default backend.
        `Strategy` fills it in before anything is traced.
      precision: of products: "default", JAX's (float32 on a CPU, TensorFloat-32 on a GPU, bfloat16
        on a TPU); "float32" everywhere; "bfloat16" inputs with float32 sums.
    """

    conv: str = "auto"
    pool: str = "auto"
    dense: str = "auto"
    precision: str = "default"
    target: str | None = None

    def __post_init__(self):
        for name, choices in LOWERINGS.items():
            value = getattr(self, name)
            if not (isinstance(value, str) and value in choices):
                raise refuse(name, value, nearest(str(value), choices))
        if self.target is not None and not isinstance(self.target, str):
            raise refuse("target", self.target, "must be a platform, or None")
        if self.conv == "winograd" and self.precision == "bfloat16":
            raise refuse("conv", self.conv, "needs float32: it would amplify the rounding")

    def with_precision(self, precision: str) -> "Lowering":
        return dataclasses.replace(self, precision=precision)

    def conv_of(self, kernel: tuple[int, ...], plain: bool, pool: bool = False) -> tuple[str, str]:
        """How one layer is lowered: in a forward pass alone, and in one that is differentiated.
        Patches may be those of whole pooling windows.

        Args:
          kernel: [h, w, Ch / G, O].
          plain: square, without strides, dilation or groups; any other has patches or XLA's own.
          pool: 2 × 2 max pooling follows.
        """
        if not plain:
            return ("lax", "lax") if self.conv == "lax" else ("patches", "patches")
        size, _, channels, features = kernel
        fits = 2 <= size <= 5
        alone = "windows" if pool else "strips"
        # A GPU's compiler finds no tiles for some gradients of windows.
        patches = alone, alone if pool and self._on_cpu() else "patches"
        if self.conv == "patches" or (self.conv == "winograd" and not fits):
            return patches
        if self.conv != "auto":
            return self.conv, self.conv
        # The transforms are paid back by products over many channels only. A GPU's own product runs
        # in TensorFloat-32, whose rounding they would amplify.
        many = fits and min(channels, features) >= 16
        if many and self._on_cpu() and self.precision != "bfloat16":
            return "winograd", "winograd"
        return patches

    def pool_of(self) -> str:
        if self.pool != "auto":
            return self.pool
        return "compare" if self._on_cpu() else "mask"

    def dense_of(self, rows: int) -> str:
        """ "matmul" or "outer" for a batch of `rows`."""
        if self.dense != "auto":
            return self.dense
        pays = self._on_cpu() and rows <= 16 and self.precision != "bfloat16"
        return "outer" if pays else "matmul"

    def _on_cpu(self) -> bool:
        return (self.target or jax.default_backend()) == "cpu"
