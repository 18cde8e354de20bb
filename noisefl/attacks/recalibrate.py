"""Recalibration: a scale and a shift for each channel (PROTECTION.md, "Thieves")."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from noisefl.attacks.base import Params, Public, View, newest
from noisefl.attacks.training import Training, labelled
from noisefl.local import Own
from noisefl.parts import part


@part
class Recalibrate(Training):
    """Of each layer, kernel[..., c] · s[c] and bias[c] + t[c]: so few numbers that a handful of
    images decides them. Of the newest copy."""

    def steal(self, key: jax.Array, view: View, own: Own, public: Public) -> Params:
        copy: dict = flatten_dict(newest(view, view.copies))  # pyright: ignore
        layers = public.functions.layers(public.image_shape)
        kernels = [layer.kernel for layer in layers]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        scales = {path: jnp.ones(copy[path].shape[-1]) for path in kernels}
        shifts = {path: jnp.zeros_like(copy[path]) for path in biases}
        loss = labelled(own, public)

        def model(moved: tuple[dict, dict]) -> Params:
            scaled = {path: copy[path] * s for path, s in moved[0].items()}
            shifted = {path: copy[path] + t for path, t in moved[1].items()}
            return unflatten_dict({**copy, **scaled, **shifted})

        def objective(moved: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
            return loss(model(moved), batch, key)

        return model(self.descend(key, (scales, shifts), objective, own.count))
