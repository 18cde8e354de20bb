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


def by_windows(images: jax.Array, kernel: jax.Array, precision: str) -> jax.Array:
    """Convolution without padding and 2 × 2 max pooling of it, as one matrix product of patches.

    The four places of a pooling window share a patch one pixel wider than the kernel, which then
    has four columns of each feature: a quarter of the patches, and 36 / 25 of the products of a
    5 × 5 kernel. Blocks of 2 × 2 pixels become channels, so that no slice has strides.
    """
    size, _, channels, features = kernel.shape
    rows, columns = ((length - size + 1) // 2 for length in images.shape[1:3])
    wide = (size + 2) // 2  # blocks of a patch
    more = 2 * wide - size
    four = [
        jnp.pad(kernel, ((row, more - row), (column, more - column), (0, 0), (0, 0)))
        for row in (0, 1)
        for column in (0, 1)
    ]
    matrix = jnp.stack(four, axis=3).reshape(wide, 2, wide, 2, channels, 4 * features)
    matrix = matrix.transpose(0, 2, 1, 3, 4, 5).reshape(wide, wide, 4 * channels, 4 * features)
    blocks = _extent(images, 2 * (rows + wide - 1), 2 * (columns + wide - 1))
    blocks = _blocks(blocks).transpose(0, 1, 3, 2, 4, 5)
    out = by_patches(blocks.reshape(*blocks.shape[:3], 4 * channels), matrix, precision)
    return _top(out.reshape(*out.shape[:3], 4, features))


def _extent(images: jax.Array, height: int, width: int) -> jax.Array:
    """Cut, or with zeros added, below and to the right."""
    images = images[:, :height, :width]
    short = height - images.shape[1], width - images.shape[2]
    return jnp.pad(images, ((0, 0), (0, short[0]), (0, short[1]), (0, 0)))


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
    "winograd": winograd.convolve,
    "windows": by_windows,
    "lax": by_lax,
    "xla": xla,
}


def _by(how: str, images: Any, kernel: Any, pool: bool, lowering: Lowering) -> Any:
    out = LOWERED[how](images, kernel, lowering.precision)
    return max_pool(out, lowering) if pool and how != "windows" else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(images, kernel, pool, lowering):
    """One lowering of the forward pass alone, and one for a pass that is differentiated."""
    alone, _ = lowering.conv_of(kernel.shape[0], *kernel.shape[2:], pool)
    return _by(alone, images, kernel, pool, lowering)


def _convolve_forward(images, kernel, pool, lowering):
    _, trained = lowering.conv_of(kernel.shape[0], *kernel.shape[2:], pool)
    by = "xla" if trained == "lax" else trained  # a rule for vmap has no gradient
    return jax.vjp(lambda i, k: _by(by, i, k, pool, lowering), images, kernel)


def _convolve_backward(pool, lowering, pullback, g):
    del pool, lowering
    return pullback(g)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def convolve(
    images: jax.Array, kernel: jax.Array, padding: str, lowering: Lowering | None = None,
    pool: bool = False,
) -> jax.Array:  # fmt: skip
    """2-D convolution, stride 1: [B, H, W, Ch] to [B, H', W', O].

    Args:
      images: float32 [B, H, W, Ch].
      kernel: float32 [size, size, Ch, O].
      padding: "SAME" (zeros around the image) or "VALID".
      lowering: of both.
      pool: 2 × 2 max pooling of what comes out (`max_pool`): [B, H' // 2, W' // 2, O].
    """
    if padding not in ("SAME", "VALID"):
        raise refuse("padding", padding, "must be SAME or VALID")
    if padding == "SAME":
        images = pad_same(images, kernel.shape[0])
    return _convolve(images, kernel, pool, lowering or Lowering())


class Conv(nn.Module):
    """2-D convolution, stride 1; parameters of the names and shapes of `flax.linen.Conv`.

    Attributes:
      features: output channels O.
      size: edge of the square kernel; kernel [size, size, Ch, O], bias [O].
      padding: "SAME" or "VALID".
      pool: 2 × 2 max pooling follows; together they are faster than one after the other.
    """

    features: int
    size: int
    padding: str = "SAME"
    lowering: Lowering = Lowering()
    kernel_init: Callable = nn.initializers.lecun_normal()
    pool: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, Ch] to [B, H', W', O], or [B, H' // 2, W' // 2, O] where it pools."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        # The largest of four and then the bias is the same as the other way round, in a quarter
        # of the sums.
        return convolve(x, kernel, self.padding, self.lowering, self.pool) + bias


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
    blocks, how = _blocks(x), (lowering or Lowering()).pool_of()
    if how == "reduce":
        return blocks.max(axis=(2, 4))
    return {"compare": _compare, "mask": _mask}[how](blocks)


def _four(blocks: jax.Array) -> list[jax.Array]:
    return [blocks[:, :, row, :, column] for row in (0, 1) for column in (0, 1)]


def _of_four(four: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.stack(four[:2], axis=3), jnp.stack(four[2:], axis=3)], axis=2)


@jax.custom_vjp
def _mask(blocks: jax.Array) -> jax.Array:
    """Which of four are the largest is kept as four bits: one kernel each way."""
    return blocks.max(axis=(2, 4))


def _mask_forward(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    four = _four(blocks)
    top = jnp.maximum(jnp.maximum(four[0], four[1]), jnp.maximum(four[2], four[3]))
    bits = [jnp.where(x == top, jnp.uint8(1 << at), jnp.uint8(0)) for at, x in enumerate(four)]
    return top, sum(bits[1:], bits[0])


def _mask_backward(bits: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    share = g / lax.population_count(bits).astype(g.dtype)
    places = jnp.array([[1, 2], [4, 8]], jnp.uint8)[:, None, :, None]
    hit = (bits[:, :, None, :, None] & places) != 0
    return (jnp.where(hit, share[:, :, None, :, None], 0),)


_mask.defvjp(_mask_forward, _mask_backward)


@jax.custom_vjp
def _top(x: jax.Array) -> jax.Array:
    """The largest of four, [..., 4, O] to [..., O]."""
    return x.max(axis=-2)


def _top_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    top = _top(x)
    return top, (x, top)


def _top_backward(residual: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array]:
    x, top = residual
    hit = x == top[..., None, :]
    return (jnp.where(hit, (g / jnp.sum(hit, axis=-2, dtype=g.dtype))[..., None, :], 0),)


_top.defvjp(_top_forward, _top_backward)


@jax.custom_vjp
def _compare(blocks: jax.Array) -> jax.Array:
    return blocks.max(axis=(2, 4))


def _compare_forward(blocks: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    top = _compare(blocks)
    return top, (blocks, top)


def _compare_backward(residual: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array]:
    blocks, top = residual
    # Four comparisons that XLA fuses; the gradient of its own reduction writes each mask to memory.
    hit = [x == top for x in _four(blocks)]
    share = g / sum(h.astype(g.dtype) for h in hit)
    return (_of_four([jnp.where(h, share, 0) for h in hit]),)


_compare.defvjp(_compare_forward, _compare_backward)
