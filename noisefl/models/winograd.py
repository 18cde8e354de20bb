"""Winograd's minimal filtering: convolution in fewer multiplications.

Lavin & Gray 2016 (arXiv 1509.09308). A tile of 6 × 6 inputs d and a kernel g of size r × r give
m × m outputs, m = 7 − r, as Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A: 36 multiplications instead of m² r²,
144 for r = 3 and 100 for r = 5. Over channels and tiles they are 36 matrix products.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TILE = 6
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0)  # and infinity


@functools.cache
def matrices(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Aᵀ [m, 6], G [6, r] and Bᵀ [6, 6] of a kernel of size r, float64.

    Polynomials of degree m − 1 and r − 1 are multiplied by their values at six points (Toom-Cook);
    filtering is the transpose of that product.
    """
    points = np.array(POINTS)

    def values(terms: int) -> np.ndarray:
        table = np.zeros((TILE, terms))
        table[:-1] = points[:, None] ** np.arange(terms)
        table[-1, -1] = 1  # at infinity: the leading coefficient
        return table

    # Row i of Bᵀ becomes whole numbers times this; G takes the inverse.
    factor = np.array([np.prod(p - np.delete(points, i)) for i, p in enumerate(points)] + [1.0])
    inputs = np.linalg.inv(values(TILE)).T * factor[:, None]
    return values(TILE + 1 - size).T, values(size) / factor[:, None], np.round(inputs)


def _mix(matrix: np.ndarray, parts: Sequence[jax.Array], axis: int = 0) -> jax.Array:
    """Σ_q matrix[p, q] · parts[q], stacked over p along `axis`: additions, no small products."""

    def row(weights: np.ndarray) -> jax.Array:
        terms = [part * float(w) for w, part in zip(weights, parts, strict=True) if w]
        return sum(terms[1:], terms[0])

    return jnp.stack([row(weights) for weights in matrix], axis)


def _entries(x: jax.Array, axis: int) -> list[jax.Array]:
    return [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])]


def _windows(x: jax.Array, step: int, axis: int) -> list[jax.Array]:
    """The six entries of all tiles along `axis`, tiles `step` apart."""
    span = x.shape[axis] - TILE + 1
    return [lax.slice_in_dim(x, i, i + span, step, axis) for i in range(TILE)]


def _scatter(x: jax.Array, step: int, axis: int) -> jax.Array:
    """Adjoint of `_mix(Bᵀ, _windows(…))`: x [6, …, T, …] to [..., m·(T + J − 1), …]."""
    back = matrices(TILE + 1 - step)[2].T
    parts = _entries(x, 0)
    reach = -(-TILE // step)  # tiles that overlap in one place
    outs = []
    for place in range(step):
        total: jax.Array | float = 0.0
        for tile in range(reach):
            if place + step * tile < TILE:
                part = _mix(back[place + step * tile][None], parts)[0]
                pad = [(0, 0)] * part.ndim
                pad[axis] = (tile, reach - 1 - tile)
                total = total + jnp.pad(part, pad)
        outs.append(total)
    out = jnp.stack(outs, axis + 1)
    return out.reshape(*out.shape[:axis], -1, *out.shape[axis + 2 :])


def _transform_images(x: jax.Array, step: int) -> jax.Array:
    """[B, H, W, Ch] to [36, B·T·T', Ch]: Bᵀ d B of every tile."""
    inputs = matrices(TILE + 1 - step)[2]
    rows = _mix(inputs, _windows(x, step, axis=1))
    return _mix(inputs, _windows(rows, step, axis=3)).reshape(TILE**2, -1, x.shape[-1])


def _transform_kernel(kernel: jax.Array) -> jax.Array:
    """[r, r, Ch, O] to [36, Ch, O]: G g Gᵀ."""
    weights = matrices(kernel.shape[0])[1]
    rows = _mix(weights, _entries(kernel, 0), axis=1)
    return _mix(weights, _entries(rows, 0)).reshape(TILE**2, *kernel.shape[2:])


def _extend(x: jax.Array, size: int, step: int) -> jax.Array:
    """Zeros below and to the right, so that whole tiles cover x."""
    short = [-(n - size + 1) % step for n in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), (0, short[0]), (0, short[1]), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(images: jax.Array, kernel: jax.Array, precision: str = "default") -> jax.Array:
    """2-D convolution, stride 1, no padding: [B, H, W, Ch] to [B, H − r + 1, W − r + 1, O].

    Args:
      images: float32 [B, H, W, Ch].
      kernel: float32 [r, r, Ch, O], 2 ≤ r ≤ 5.
      precision: "default" or "float32" (`Lowering.precision`).
    """
    return _forward(images, kernel, precision)[0]


def _product(a: jax.Array, b: jax.Array, precision: str) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST if precision == "float32" else None)


def _forward(images, kernel, precision):
    batch, height, width, _ = images.shape
    size, features = kernel.shape[0], kernel.shape[-1]
    step = TILE + 1 - size
    padded = _extend(images, size, step)
    tiles = tuple((n - size + 1) // step for n in padded.shape[1:3])
    # Without the barriers XLA computes a transform anew inside each product that reads it.
    inputs = lax.optimization_barrier(_transform_images(padded, step))
    weights = _transform_kernel(kernel)
    out = _product(inputs, weights, precision).reshape(TILE, TILE, batch, *tiles, features)
    outputs = matrices(size)[0]
    rows = _mix(outputs, _entries(out, 1), axis=3)  # [6, B, T, m, T', O]
    both = _mix(outputs, _entries(rows, 0), axis=4)  # [B, T, m, T', m, O]
    out = both.reshape(batch, tiles[0] * step, tiles[1] * step, features)
    return out[:, : height - size + 1, : width - size + 1], (inputs, weights, images, kernel)


def _backward(precision, residual, g):
    inputs, weights, images, kernel = residual
    size, channels, features = kernel.shape[0], *kernel.shape[2:]
    step = TILE + 1 - size
    outputs, kernels, _ = matrices(size)
    g = _extend(g, 1, step)
    tiles = g.shape[1] // step, g.shape[2] // step
    tiled = g.reshape(-1, tiles[0], step, tiles[1], step, features)
    rows = _mix(outputs.T, _entries(tiled, 2))  # [6, B, T, T', m, O]
    both = _mix(outputs.T, _entries(rows, 4)).reshape(TILE**2, -1, features)
    both = lax.optimization_barrier(both)

    # A product that contracts the first axis of both sides is slow on a CPU.
    turned = lax.optimization_barrier(jnp.swapaxes(inputs, 1, 2))
    grad = _product(turned, both, precision).reshape(TILE, TILE, channels, features)
    grad = _mix(kernels.T, _entries(grad, 0))  # [r, 6, Ch, O], columns first
    grad_kernel = _mix(kernels.T, _entries(grad, 1))

    spread = _product(both, jnp.swapaxes(weights, 1, 2), precision)
    spread = spread.reshape(TILE, TILE, -1, *tiles, channels)
    grad_images = _scatter(_scatter(spread, step, axis=3), step, axis=1)
    return grad_images[:, : images.shape[1], : images.shape[2]], grad_kernel


convolve.defvjp(_forward, _backward)
