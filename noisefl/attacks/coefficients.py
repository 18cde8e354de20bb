"""Any linear combination of copies, fitted on own data (PROTECTION.md, "Thieves")."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from noisefl.attacks.average import gram, mean, usable, weights
from noisefl.attacks.base import Params, Public, View
from noisefl.attacks.training import Training, labelled
from noisefl.local import Own
from noisefl.parts import Number, number, part

SEEN = 1e-6  # of the largest eigenvalue: smaller ones are rounding
DECAY = 0.99  # of Adam's mean of squares


@part
class Coefficients(Training):
    """W(α) = Σ α_j copy_j on touched parameters, from the plain mean of the copies on; what is not
    touched is the mean of `average.weights`.

    α need not sum to 1: signs, rescaled draws W + s_j ξ, and secrets of one scalar, c_j · W, are
    all undone by some α.
    """

    views: ClassVar[tuple[str, ...]] = ("V2", "V3", "V4")

    rate: Number = number(0.1, "η of Adam, in the middle of those tried", low=0, inside="()")

    def steal(self, key: jax.Array, view: View, own: Own, public: Public) -> Params:
        return combined(self.coefficients(key, view, own, public), view, public)

    def coefficients(self, key: jax.Array, view: View, own: Own, public: Public) -> jax.Array:
        """α, float32 [J, A]; 0 of absent and broken copies.

        Copies are much alike, so that α itself is a bad coordinate. With c̄ the plain mean and
        V the eigenvectors of the Gram matrix of c_j − c̄,

            W = (1 + γ) c̄ + Σ_k β_k Σ_j V_jk (c_j − c̄):

        a scale γ, and orthogonal directions β whose unit is how far the copies lie apart. Adam
        gives each a pace of its own.
        """
        there = usable(view)
        plain = there.reshape(-1) / jnp.sum(there)
        values, vectors = jnp.linalg.eigh(gram(view.copies, there.reshape(-1), public.touched))
        vectors = jnp.where(values > SEEN * values[-1], vectors, 0)

        def alpha(moved: tuple[jax.Array, jax.Array]) -> jax.Array:
            scale, along = moved
            turned = jnp.matmul(vectors, along, precision="highest")
            turned = jnp.where(there.reshape(-1), turned, 0)
            return (plain * (1 + scale - jnp.sum(turned)) + turned).reshape(there.shape)

        loss, model = labelled(own, public), _model(view, public)
        start = jnp.float32(0), jnp.zeros(there.size)

        def objective(moved: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
            return loss(model(alpha(moved)), batch, key)

        return alpha(self.descend(key, start, objective, own.count))

    def optimizer(self) -> optax.GradientTransformation:
        """Adam (arXiv 1412.6980): directions differ in scale by the strength of the noise, and one
        rate of descent would fit the steepest alone."""
        return optax.adam(self.falling_rate, b1=self.momentum, b2=DECAY)


def combined(alpha: jax.Array, view: View, public: Public) -> Params:
    """W(α) of α float32 [J, A], 0 where a copy is absent or broken."""
    return _model(view, public)(alpha)


def _model(view: View, public: Public) -> Any:
    """α [J, A] → W(α)."""
    there = usable(view)
    rest = mean(view.copies, weights(view, public.touched))

    def clean(leaf: jax.Array) -> jax.Array:  # 0 · NaN would be NaN
        return jnp.where(there.reshape(*there.shape, *[1] * (leaf.ndim - 2)), leaf, 0)

    copies = jax.tree.map(clean, view.copies)

    def model(alpha: jax.Array) -> Params:
        def one(leaf: jax.Array, rest: jax.Array, touched: jax.Array) -> jax.Array:
            return jnp.where(touched, jnp.tensordot(alpha, leaf, 2, precision="highest"), rest)

        return jax.tree.map(one, copies, rest, public.touched)

    return model
