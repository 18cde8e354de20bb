"""Convolution that keeps the machine's GEMM rate inside a round.

XLA's own convolution is slow where a federated round needs it: vmapped over clients it becomes a
grouped convolution, and its gradient inside a loop on a CPU loses its fast path. Matrix products
keep it, and vmapping them gives a batched GEMM.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from noisefl.models import winograd
from noisefl.models.lowering import Lowering
from noisefl.models.pooling import blocks_of, max_pool, shifted
from noisefl.models.product import product


class Geometry(NamedTuple):
    """Where the windows of a convolution lie, and which channels they see."""

    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)  # of the kernel
    groups: int = 1

    def plain(self, kernel: tuple[int, ...]) -> bool:
        """Every place, every pixel of a square window, every channel."""
        return self == EVERYWHERE and kernel[0] == kernel[1]

    def places(self, images: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, int]:
        """(H', W') of images [B, H, W, Ch] that are padded already."""
        rows, columns = (
            (images[1 + axis] - self.dilation[axis] * (kernel[axis] - 1) - 1) // self.strides[axis]
            + 1
            for axis in (0, 1)
        )
        return rows, columns


EVERYWHERE = Geometry()


def by_patches(
    images: jax.Array, kernel: jax.Array, precision: str, at: Geometry = EVERYWHERE
) -> jax.Array:
    """Convolution without padding as one matrix product of patches.

    Of images [B, H, W, Ch] and a kernel [h, w, Ch / groups, F]: [B, H', W', F].

    All shifts of the images side by side: their gradient is one sum. Of windows that do not overlap
    there are none: the images are cut into blocks.
    """
    height, width, channels, _ = kernel.shape
    rows, columns = at.places(images.shape, kernel.shape)
    if at.groups > 1:
        return _grouped(images, kernel, precision, at)
    if at.strides == (height, width) and at.dilation == (1, 1):
        cut = images[:, : rows * height, : columns * width]
        cut = cut.reshape(-1, rows, height, columns, width, channels).transpose(0, 1, 3, 2, 4, 5)
        return _of_patches(cut.reshape(*cut.shape[:3], -1), kernel, precision)
    shifts = shifted(images, (height, width), at.strides, at.dilation, (rows, columns))
    return _of_patches(jnp.concatenate(shifts, axis=-1), kernel, precision)


def _of_patches(patches: jax.Array, kernel: jax.Array, precision: str) -> jax.Array:
    matrix = kernel.reshape(-1, kernel.shape[-1])
    out: Any = product(patches.reshape(-1, len(matrix)), matrix, precision)
    return out.reshape(*patches.shape[:3], kernel.shape[-1])


def _grouped(images: jax.Array, kernel: jax.Array, precision: str, at: Geometry) -> jax.Array:
    """Each of G groups of channels with its own O / G features; kernel [h, w, Ch / G, O]."""
    height, width, channels, features = kernel.shape
    places = at.places(images.shape, kernel.shape)
    shifts = shifted(images, (height, width), at.strides, at.dilation, places)
    each = features // at.groups
    if channels == 1:  # depthwise: nothing is summed over channels
        taps = kernel.reshape(height * width, features)
        if precision == "bfloat16":
            shifts = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in shifts]
            taps = taps.astype(jnp.bfloat16).astype(jnp.float32)
        terms = [jnp.repeat(x, each, axis=-1) * tap for x, tap in zip(shifts, taps, strict=True)]
        return functools.reduce(jnp.add, terms)
    grouped = [x.reshape(*x.shape[:3], at.groups, channels) for x in shifts]
    patches = jnp.concatenate(grouped, axis=-1)
    matrix = kernel.reshape(-1, at.groups, each)
    one = functools.partial(product, precision=precision)
    many = jax.vmap(lambda a, b: one(a, b), in_axes=1, out_axes=1)
    out = many(patches.reshape(-1, *patches.shape[3:]), matrix)
    return out.reshape(*patches.shape[:3], features)


def by_strips(images: jax.Array, kernel: jax.Array, precision: str) -> jax.Array:
    """`by_patches` for a forward pass alone: the same, in h + w copies for XLA to compile.

    Of images [B, H, W, Ch] and a kernel [h, w, Ch, F].

    A window is cut column by column, and then row by row out of what that gave.
    """
    across = jnp.concatenate(_along(images, 2, kernel.shape[1]), axis=-1)
    return _of_patches(
        jnp.concatenate(_along(across, 1, kernel.shape[0]), axis=-1), kernel, precision
    )


def _along(images: jax.Array, axis: int, size: int) -> list[jax.Array]:
    """The shifts whose entries at one place are a window of `size` along one axis."""
    length = images.shape[axis] - size + 1
    return [lax.slice_in_dim(images, at, at + length, axis=axis) for at in range(size)]


def by_windows(images: jax.Array, kernel: jax.Array, precision: str) -> jax.Array:
    """Convolution without padding and 2 × 2 max pooling of it, as one matrix product of patches.

    Of images [B, H, W, Ch] and a kernel [h, h, Ch, F].

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
    blocks = blocks_of(blocks).transpose(0, 1, 3, 2, 4, 5)
    out = by_patches(blocks.reshape(*blocks.shape[:3], 4 * channels), matrix, precision)
    return _top(out.reshape(*out.shape[:3], 4, features))


def _extent(images: jax.Array, height: int, width: int) -> jax.Array:
    """Cut, or with zeros added, below and to the right."""
    images = images[:, :height, :width]
    short = height - images.shape[1], width - images.shape[2]
    return jnp.pad(images, ((0, 0), (0, short[0]), (0, short[1]), (0, 0)))


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


def by_lax(
    images: jax.Array, kernel: jax.Array, precision: str, at: Geometry = EVERYWHERE
) -> jax.Array:
    """`xla`; of many kernels [h, w, Ch, F] side by side under vmap, `by_patches`."""
    return _lax(precision, at)(images, kernel)


def xla(
    images: jax.Array, kernel: jax.Array, precision: str, at: Geometry = EVERYWHERE
) -> jax.Array:
    """Convolution of images [B, H, W, Ch] without padding as XLA has it."""
    highest = lax.Precision.HIGHEST if precision == "float32" else None
    if precision == "bfloat16":
        images, kernel = images.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    out = lax.conv_general_dilated(
        images, kernel, at.strides, "VALID", rhs_dilation=at.dilation, precision=highest,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=at.groups,
    )  # fmt: skip
    return out.astype(jnp.float32)


@functools.cache
def _lax(precision: str, at: Geometry) -> Callable[[jax.Array, jax.Array], jax.Array]:
    @jax.custom_batching.custom_vmap
    def convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return xla(images, kernel, precision, at)

    @convolve.def_vmap
    def many(size: int, batched: list[bool], images: jax.Array, kernel: jax.Array) -> Any:
        if batched[1]:  # XLA would make it a grouped convolution, an order of magnitude slower
            axes = (0 if batched[0] else None, 0)
            return jax.vmap(lambda i, k: by_patches(i, k, precision, at), axes)(
                images, kernel
            ), True
        out = convolve(images.reshape(-1, *images.shape[2:]), kernel)
        return out.reshape(size, -1, *out.shape[1:]), True

    return convolve


PLAIN = {"strips": by_strips, "winograd": winograd.convolve, "windows": by_windows}
ANY = {"patches": by_patches, "lax": by_lax, "xla": xla}


def _by(how: str, images: Any, kernel: Any, at: Geometry, pool: bool, lowering: Lowering) -> Any:
    if how in PLAIN:
        out = PLAIN[how](images, kernel, lowering.precision)
    else:
        out = ANY[how](images, kernel, lowering.precision, at)
    return max_pool(out, lowering) if pool and how != "windows" else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(images, kernel, at, pool, lowering):
    """One lowering of the forward pass alone, and one for a pass that is differentiated."""
    alone, _ = lowering.conv_of(kernel.shape, at.plain(kernel.shape), pool)
    return _by(alone, images, kernel, at, pool, lowering)


def _convolve_forward(images, kernel, at, pool, lowering):
    _, trained = lowering.conv_of(kernel.shape, at.plain(kernel.shape), pool)
    by = "xla" if trained == "lax" else trained  # a rule for vmap has no gradient
    return jax.vjp(lambda i, k: _by(by, i, k, at, pool, lowering), images, kernel)


def _convolve_backward(at, pool, lowering, pullback, g):
    del at, pool, lowering
    return pullback(g)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def convolve(
    images: jax.Array, kernel: jax.Array, padding: Any = ((0, 0), (0, 0)),
    lowering: Lowering | None = None, at: Geometry = EVERYWHERE, pool: bool = False,
) -> jax.Array:  # fmt: skip
    """2-D convolution: [B, H, W, Ch] to [B, H', W', O].

    Args:
      images: float32 [B, H, W, Ch].
      kernel: float32 [h, w, Ch / G, O].
      padding: zeros above and below, left and right.
      lowering: of both directions.
      at: strides, dilation, G groups.
      pool: 2 × 2 max pooling of what comes out (`max_pool`): [B, H' // 2, W' // 2, O].
    """
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    return _convolve(images, kernel, at, pool, lowering or Lowering())
