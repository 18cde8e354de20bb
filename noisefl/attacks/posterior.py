"""The most probable model, given the copy and own data (PROTECTION.md, "Thieves": MAP)."""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from noisefl.attacks.base import Attack, Params, Public, View, newest
from noisefl.attacks.training import Training, labelled
from noisefl.local import Own
from noisefl.parts import Number, choice, number, part

RATES = (1 / 3, 1.0, 3.0)
WIDTHS = (1.0, 3.0)  # colder posteriors often do better (Wenzel et al. 2020, arXiv 2002.02405)


@part
class Posterior(Training):
    """Minimises mean cross-entropy + Σ (w − copy)² / (2 n σ_l²), the sum over touched parameters.

    The copy is W + ξ with ξ ~ N(0, σ_l²), and σ_l is no secret. Where it is not known, the RMS of
    that layer's touched parameters stands in. What is not touched is free or stays as it is.

    The prior's curvature 1 / (n σ²) has no bound, and plain descent would diverge of it. With
    v = n σ², w = copy + z / √(1 + 1/v) has the prior z² / (2 (1 + v)), of curvature below 1, and
    the same minimum: σ → ∞ is descent in w itself, and at σ → 0 only the copy is left.
    """

    width: Number = number(1.0, "times σ_l", low=0, inside="()")
    rest: str = choice("free", ("free", "fixed"), "parameters that are not touched")

    def candidates(self) -> list[Attack]:
        return [
            self.replace(rate=self.rate * rate, width=self.width * width)
            for width in WIDTHS
            for rate in RATES
        ]

    def steal(self, key: jax.Array, view: View, own: Own, public: Public) -> Params:
        copy = _flat(newest(view, view.copies))
        spread, touched = _flat(newest(view, view.spread)), _flat(public.touched)
        units, prior = {}, {}
        for path, known in spread.items():
            layer = [other for other in copy if other[:-1] == path[:-1]]
            sigma = jnp.where(jnp.isnan(known), _rms(copy, touched, layer), known) * self.width
            v = jnp.maximum(own.count, 1) * jnp.square(sigma)
            units[path] = jnp.where(touched[path], jax.lax.rsqrt(1 + 1 / v), 1)
            prior[path] = jnp.where(touched[path], 1 / (1 + v), 0)
        loss = labelled(own, public)

        def model(z: dict) -> Params:
            return unflatten_dict({path: copy[path] + units[path] * z[path] for path in copy})

        def objective(z: dict, batch: jax.Array, key: jax.Array) -> jax.Array:
            penalties = [prior[path] * jnp.sum(jnp.square(z[path])) for path in z]
            return loss(model(z), batch, key) + sum(penalties) / 2

        trained = touched if self.rest == "fixed" else None
        start = jax.tree.map(jnp.zeros_like, copy)
        return model(self.descend(key, start, objective, own.count, trained))


def _flat(params: Params) -> dict:
    return flatten_dict(params)  # pyright: ignore[reportReturnType]


def _rms(copy: dict, touched: dict, layer: list) -> jax.Array:
    """Of the touched parameters of a layer, float32 []."""
    squares = sum(jnp.where(touched[p], jnp.sum(jnp.square(copy[p])), 0) for p in layer)
    return jnp.sqrt(squares / jnp.maximum(sum(touched[p] * copy[p].size for p in layer), 1))
