"""Convolution as batched matrix multiplication, and max pooling as a reduction.

XLA's own convolution is slow where a federated round needs it: vmapped over clients it becomes a
grouped convolution, and inside a loop on a CPU it loses its fast path. Patches and one matrix
product keep the machine's GEMM rate, and vmapping them gives a batched GEMM.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn


def patches(images: jax.Array, size: int, padding: str) -> jax.Array:
    """All size × size windows of images, stride 1.

    Args:
      images: [B, H, W, Ch].
      size: edge of a window, odd when padding is "SAME".
      padding: "SAME" (zeros around the image) or "VALID".

    Returns:
      [B, H', W', size·size·Ch], the window's entries in the order of a kernel [size, size, Ch].
    """
    if padding == "SAME":
        border = (size // 2, (size - 1) // 2)
        images = jnp.pad(images, ((0, 0), border[::-1], border[::-1], (0, 0)))
    height, width = images.shape[1] - size + 1, images.shape[2] - size + 1
    windows = [
        images[:, row : row + height, column : column + width]
        for row in range(size)
        for column in range(size)
    ]
    return jnp.concatenate(windows, axis=-1)


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
        windows = patches(x, self.size, self.padding)
        out = windows.reshape(-1, windows.shape[-1]) @ kernel.reshape(-1, self.features)
        return out.reshape(*windows.shape[:-1], self.features) + bias


def max_pool(x: jax.Array) -> jax.Array:
    """2 × 2 max pooling, stride 2; an odd last row or column is dropped, as in `flax.linen`.

    Maps [B, H, W, Ch] to [B, H // 2, W // 2, Ch].
    """
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
