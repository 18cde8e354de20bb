"""Convolution, dense layer and max pooling that keep the machine's GEMM rate inside a round.

XLA's own convolution is slow where a federated round needs it: vmapped over clients it becomes a
grouped convolution, and its gradient inside a loop on a CPU loses its fast path. Matrix products
keep it, and vmapping them gives a batched GEMM.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from noisefl.errors import refuse
from noisefl.models import winograd
from noisefl.models.lowering import Lowering
from noisefl.models.product import product


def pad_same(images: jax.Array, size: int) -> jax.Array:
    """Zeros around images [B, H, W, Ch], so that `size` × `size` windows are H × W."""
    border = ((size - 1) // 2, size // 2)
    return jnp.pad(images, ((0, 0), border, border, (0, 0)))


def _shifted(images: jax.Array, axis: int, size: int) -> list[jax.Array]:
    """The shifts whose entries at one place are a window of `size` along one axis."""
    length = images.shape[axis] - size + 1
    return [lax.slice_in_dim(images, at, at + length, axis=axis) for at in range(size)]


def by_patches(images: jax.Array, kernel: jax.Array, precision: str) -> jax.Array:
    """Convolution without padding as one matrix product of patches.

    All size² shifts side by side: their gradient is one sum.
    """
    size = kernel.shape[0]
    rows, columns = (length - size + 1 for length in images.shape[1:3])
    shifts = [
        images[:, row : row + rows, column : column + columns]
        for row in range(size)
        for column in range(size)
    ]
    return _of_patches(jnp.concatenate(shifts, axis=-1), kernel, precision)


def by_strips(images: jax.Array, kernel: jax.Array, precision: str) -> jax.Array:
    """`by_patches` for a forward pass alone: the same, in 2 · size copies for XLA to compile.

    A window is cut column by column, and then row by row out of what that gave.
    """
    size = kernel.shape[0]
    across = jnp.concatenate(_shifted(images, 2, size), axis=-1)
    return _of_patches(jnp.concatenate(_shifted(across, 1, size), axis=-1), kernel, precision)


def _of_patches(patches: jax.Array, kernel: jax.Array, precision: str) -> jax.Array:
    matrix = kernel.reshape(-1, kernel.shape[-1])
    out: Any = product(patches.reshape(-1, len(matrix)), matrix, precision)
    return out.reshape(*patches.shape[:3], kernel.shape[-1])


def by_planes(images: jax.Array, kernel: jax.Array, precision: str) -> jax.Array:
    """`by_strips` of images of one channel to few, for a CPU.

    Single numbers side by side are slow to write. Whole images one after another are not, and the
    few output channels become the short side of a long product.
    """
    size, _, _, features = kernel.shape
    across = jnp.stack(_shifted(images[..., 0], 2, size))
    patches = jnp.stack(_shifted(across, 2, size))
    matrix = kernel.reshape(-1, features)
    out: Any = product(matrix.T, patches.reshape(len(matrix), -1), precision)
    return jnp.moveaxis(out.reshape(features, *patches.shape[2:]), 0, -1)


def by_lax(images: jax.Array, kernel: jax.Array, precision: str) -> jax.Array:
    """`xla`; of many kernels side by side under vmap, `by_patches`."""
    return _lax(precision)(images, kernel)


def xla(images: jax.Array, kernel: jax.Array, precision: str) -> jax.Array:
    """Convolution without padding as XLA has it."""
    highest = lax.Precision.HIGHEST if precision == "float32" else None
    if precision == "bfloat16":
        images, kernel = images.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    axes = ("NHWC", "HWIO", "NHWC")
    out = lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=axes, precision=highest
    )
    return out.astype(jnp.float32)


@functools.cache
def _lax(precision: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    @jax.custom_batching.custom_vmap
    def convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return xla(images, kernel, precision)

    @convolve.def_vmap
    def many(size: int, batched: list[bool], images: jax.Array, kernel: jax.Array) -> Any:
        if batched[1]:  # XLA would make it a grouped convolution, an order of magnitude slower
            axes = (0 if batched[0] else None, 0)
            return jax.vmap(lambda i, k: by_patches(i, k, precision), axes)(images, kernel), True
        out = convolve(images.reshape(-1, *images.shape[2:]), kernel)
        return out.reshape(size, -1, *out.shape[1:]), True

    return convolve


LOWERED = {
    "patches": by_patches,
    "strips": by_strips,
    "planes": by_planes,
    "winograd": winograd.convolve,
    "lax": by_lax,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(images, kernel, alone, trained, precision):
    """One lowering of the forward pass alone, and one for a pass that is differentiated."""
    del trained
    return LOWERED[alone](images, kernel, precision)


def _convolve_forward(images, kernel, alone, trained, precision):
    del alone
    by = xla if trained == "lax" else LOWERED[trained]  # a rule for vmap has no gradient
    return jax.vjp(lambda i, k: by(i, k, precision), images, kernel)


def _convolve_backward(alone, trained, precision, pullback, g):
    del alone, trained, precision
    return pullback(g)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def convolve(
    images: jax.Array, kernel: jax.Array, padding: str, lowering: Lowering | None = None
) -> jax.Array:
    """2-D convolution, stride 1: [B, H, W, Ch] to [B, H', W', O].

    Args:
      images: float32 [B, H, W, Ch].
      kernel: float32 [size, size, Ch, O].
      padding: "SAME" (zeros around the image) or "VALID".
      lowering: `conv` and `precision` are read.
    """
    lowering = lowering or Lowering()
    size, _, channels, features = kernel.shape
    if padding not in ("SAME", "VALID"):
        raise refuse("padding", padding, "must be SAME or VALID")
    if padding == "SAME":
        images = pad_same(images, size)
    alone, trained = lowering.conv_of(size, channels, features)
    return _convolve(images, kernel, alone, trained, lowering.precision)


class Conv(nn.Module):
    """2-D convolution, stride 1; parameters of the names and shapes of `flax.linen.Conv`.

    Attributes:
      features: output channels O.
      size: edge of the square kernel; kernel [size, size, Ch, O], bias [O].
      padding: "SAME" or "VALID".
    """

    features: int
    size: int
    padding: str = "SAME"
    lowering: Lowering = Lowering()
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, Ch] to [B, H', W', O]."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return convolve(x, kernel, self.padding, self.lowering) + bias


class Dense(nn.Module):
    """Affine layer; parameters of the names and shapes of `flax.linen.Dense`."""

    features: int
    lowering: Lowering = Lowering()
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, P] to [B, features]."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        gradient = self.lowering.dense_of(x.shape[0])
        out: Any = product(x, kernel, self.lowering.precision, gradient)
        return out + bias


def _blocks(x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels)


def max_pool(x: jax.Array, lowering: Lowering | None = None) -> jax.Array:
    """2 × 2 max pooling, stride 2; an odd last row or column is dropped, as in `flax.linen`.

    Maps [B, H, W, Ch] to [B, H // 2, W // 2, Ch]. Equal maxima share the gradient equally.
    """
    pool = {"compare": _compare, "mask": _mask, "reduce": _reduce}
    return pool[(lowering or Lowering()).pool_of()](_blocks(x))


def _reduce(blocks: jax.Array) -> jax.Array:
    return blocks.max(axis=(2, 4))


@jax.custom_vjp
def _compare(blocks: jax.Array) -> jax.Array:
    return _reduce(blocks)


@jax.custom_vjp
def _mask(blocks: jax.Array) -> jax.Array:
    return _reduce(blocks)


def _pool_forward(blocks: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    top = _reduce(blocks)
    return top, (blocks, top)


def _compare_backward(residual: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array]:
    blocks, top = residual
    # Four comparisons that XLA fuses; the gradient of its own reduction writes each mask to memory.
    hit = [[blocks[:, :, row, :, column] == top for column in (0, 1)] for row in (0, 1)]
    share = g / sum(h.astype(g.dtype) for pair in hit for h in pair)
    rows = [jnp.stack([jnp.where(h, share, 0) for h in pair], axis=3) for pair in hit]
    return (jnp.stack(rows, axis=2),)


def _mask_backward(residual: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array]:
    blocks, top = residual
    hit = blocks == top[:, :, None, :, None]  # one kernel, where four stacked ones are many more
    share = g / jnp.sum(hit, axis=(2, 4), dtype=g.dtype)
    return (jnp.where(hit, share[:, :, None, :, None], 0),)


_compare.defvjp(_pool_forward, _compare_backward)
_mask.defvjp(_pool_forward, _mask_backward)
