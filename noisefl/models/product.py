"""Matrix products at a chosen precision, and the dense layer's gradient."""

import functools

import jax
import jax.numpy as jnp


def _matmul(a: jax.Array, b: jax.Array, precision: str) -> jax.Array:
    if precision == "bfloat16":
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    highest = jax.lax.Precision.HIGHEST if precision == "float32" else None
    return jnp.matmul(a, b, precision=highest, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(a: jax.Array, b: jax.Array, precision: str, gradient: str = "matmul") -> jax.Array:
    """a @ b in float32, [N, P] · [P, Q] → [N, Q]; its gradients have the same precision.

    Args:
      a: float32 [N, P].
      b: float32 [P, Q].
      precision: of `Lowering.precision`.
      gradient: how that of b is formed: "matmul", or "outer", a sum of N outer products that XLA
        fuses with what is done to it next.
    """
    del gradient
    return _matmul(a, b, precision)


def _forward(a, b, precision, gradient):
    return product(a, b, precision, gradient), (a, b)


def _backward(precision, gradient, residual, g):
    a, b = residual
    if gradient == "outer":
        if precision == "bfloat16":
            a, g = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (a, g))
        grad_b = sum(a[row, :, None] * g[row, None, :] for row in range(a.shape[0]))
    else:
        grad_b = _matmul(a.T, g, precision)
    return _matmul(g, b.T, precision), grad_b


product.defvjp(_forward, _backward)
