"""Max pooling whose gradient is a few kernels, and pooling as the sum or maximum of shifts.

XLA's own gradient of a maximum over windows is slow on a CPU.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from noisefl.models.lowering import Lowering


def blocks_of(x: jax.Array) -> jax.Array:
    """Of [B, H, W, Ch] the 2 × 2 blocks: [B, H // 2, 2, W // 2, 2, Ch]."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels)


def max_pool(x: jax.Array, lowering: Lowering | None = None) -> jax.Array:
    """2 × 2 max pooling, stride 2; an odd last row or column is dropped, as in `flax.linen`.

    Maps [B, H, W, Ch] to [B, H // 2, W // 2, Ch]. Equal maxima share the gradient equally.
    """
    blocks, how = blocks_of(x), (lowering or Lowering()).pool_of()
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


def shifted(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], dilation: tuple[int, int],
    places: tuple[int, int],
) -> list[jax.Array]:  # fmt: skip
    """The h · w shifts of x [B, H, W, Ch] whose entries at one place are a window, [B, H', W', Ch]
    each."""

    def cut(x: jax.Array, axis: int, at: int) -> jax.Array:
        start, step = at * dilation[axis], strides[axis]
        end = start + (places[axis] - 1) * step + 1
        return lax.slice_in_dim(x, start, end, step, axis=1 + axis)

    return [
        cut(cut(x, 0, row), 1, column) for row in range(window[0]) for column in range(window[1])
    ]


def over_windows(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int],
    join: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:  # fmt: skip
    """`join`, a sum or a maximum, over all windows of x [B, H, W, Ch], padded already."""
    rows, columns = ((x.shape[1 + axis] - window[axis]) // strides[axis] + 1 for axis in (0, 1))
    return functools.reduce(join, shifted(x, window, strides, (1, 1), (rows, columns)))
