"""Convolution as batched matrix multiplication, and max pooling as a reduction.

XLA's own convolution is slow where a federated round needs it: vmapped over clients it becomes a
grouped convolution, and inside a loop on a CPU it loses its fast path. Patches and one matrix
product keep the machine's GEMM rate, and vmapping them gives a batched GEMM.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn


def windows(images: jax.Array, size: int, padding: str) -> list[jax.Array]:
    """The size · size shifts of images whose entries at one place are the window there, stride 1.

    Args:
      images: [B, H, W, Ch].
      size: edge of a window.
      padding: "SAME" (zeros around the image) or "VALID".

    Returns:
      Arrays [B, H', W', Ch] in the order of a kernel [size, size].
    """
    if padding == "SAME":
        border = ((size - 1) // 2, size // 2)
        images = jnp.pad(images, ((0, 0), border, border, (0, 0)))
    height, width = images.shape[1] - size + 1, images.shape[2] - size + 1
    return [
        images[:, row : row + height, column : column + width]
        for row in range(size)
        for column in range(size)
    ]


def convolve(images: jax.Array, kernel: jax.Array, padding: str) -> jax.Array:
    """2-D convolution, stride 1, as one matrix product: [B, H, W, Ch] to [B, H', W', O].

    Args:
      images: [B, H, W, Ch].
      kernel: [size, size, Ch, O].
      padding: "SAME" or "VALID".
    """
    shifts = windows(images, kernel.shape[0], padding)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    if images.shape[-1] == 1:
        # Single numbers side by side are slow to write. Whole images one after another are not,
        # and the few output channels become the short side of a long product.
        out = matrix.T @ jnp.stack(shifts).reshape(len(shifts), -1)
        return jnp.moveaxis(out.reshape(-1, *shifts[0].shape[:3]), 0, -1)
    out = jnp.concatenate(shifts, axis=-1).reshape(-1, len(matrix)) @ matrix
    return out.reshape(*shifts[0].shape[:3], -1)


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
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, Ch] to [B, H', W', O]."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return convolve(x, kernel, self.padding) + bias


def max_pool(x: jax.Array) -> jax.Array:
    """2 × 2 max pooling, stride 2; an odd last row or column is dropped, as in `flax.linen`.

    Maps [B, H, W, Ch] to [B, H // 2, W // 2, Ch].
    """
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
