"""Singular values shrunk at the Marchenko-Pastur edge (PROTECTION.md, "Thieves")."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from noisefl.attacks.average import mean, weights
from noisefl.attacks.base import Attack, Params, Public, View
from noisefl.local import Own
from noisefl.parts import Number, number, part

FACTORS = (0.5, 1.0, 2.0)  # times `factor`: the candidates
UNKNOWN = 0.5  # noise of which nothing is known, in RMS of the kernel


@part
class Denoise(Attack):
    """The mean of all copies (`average.weights`), and of each touched kernel, as a matrix
    [fan_in, fan_out], what stands out of the noise that the mean has left: σ √Σ weights², as if no
    two copies shared a draw; `factor` is what they do."""

    views: ClassVar[tuple[str, ...]] = ("V1", "V2", "V3", "V4")

    factor: Number = number(1.0, "times the noise, in the middle of those tried", low=0)

    def candidates(self) -> list[Attack]:
        return [self.replace(factor=self.factor * factor) for factor in FACTORS]

    def steal(self, key: jax.Array, view: View, own: Own, public: Public) -> Params:
        shares = weights(view, public.touched)
        left = jax.tree.map(jnp.sqrt, mean(jax.tree.map(jnp.square, view.spread), shares**2))
        noise: dict = flatten_dict(left)  # pyright: ignore[reportAssignmentType]
        touched, flat = flatten_dict(public.touched), flatten_dict(mean(view.copies, shares))

        def one(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
            if path[-1] != "kernel" or leaf.ndim < 2:
                return leaf
            rms = jnp.sqrt(jnp.mean(jnp.square(leaf)))
            level = jnp.where(jnp.isnan(noise[path]), UNKNOWN * rms, noise[path]) * self.factor
            matrix = leaf.reshape(-1, leaf.shape[-1])
            # A decomposition is dear, and most kernels are not touched.
            kept = lax.cond(touched[path], shrunk, lambda matrix, _: matrix, matrix, level)
            return kept.reshape(leaf.shape)

        return unflatten_dict({path: one(path, leaf) for path, leaf in flat.items()})  # pyright: ignore


def shrunk(matrix: jax.Array, noise: jax.Array) -> jax.Array:
    """The best estimate of a matrix of low rank under white noise, in Frobenius norm.

    A singular value y of X + noise, in units of σ √n, becomes √((y² − β − 1)² − 4 β) / y above the
    edge 1 + √β, and 0 below (Gavish and Donoho 2017, "Optimal Shrinkage of Singular Values",
    arXiv 1405.7511, equation 7).

    Args:
      matrix: float32 [m, n] or [n, m], β = m / n ≤ 1.
      noise: float32 [], σ.
    """
    short, long = sorted(matrix.shape)
    beta, unit = short / long, noise * long**0.5
    finite = jnp.all(jnp.isfinite(matrix))
    left, values, right = jnp.linalg.svd(  # which of NaN need not come back
        jnp.where(finite, matrix, 0), full_matrices=False
    )
    square, edge = jnp.square(values), jnp.square(unit)
    inside = jnp.square(square - (beta + 1) * edge) - 4 * beta * jnp.square(edge)
    above = values > (1 + beta**0.5) * unit
    kept = jnp.sqrt(jnp.where(above, inside, 0)) / jnp.where(above, values, 1)
    found = jnp.matmul(left * kept, right, precision="highest")
    return jnp.where(finite, found, matrix)
