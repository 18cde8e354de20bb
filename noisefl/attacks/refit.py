"""Refitting: the touched parameters alone are trained (PROTECTION.md, "Thieves").

Where the others carry no noise, the features below are the owner's own, and a layer on top of them
takes few images.
"""

import jax
import jax.numpy as jnp

from noisefl import keys
from noisefl.attacks.base import Params, Public, View, newest
from noisefl.attacks.training import Training, labelled
from noisefl.local import Own
from noisefl.parts import Number, number, part


@part
class Retrain(Training):
    """The touched parameters, from the newest copy on."""

    def steal(self, key: jax.Array, view: View, own: Own, public: Public) -> Params:
        copy = newest(view, view.copies)
        return self.descend(key, copy, labelled(own, public), own.count, public.touched)


@part
class Reinitialise(Training):
    """The touched parameters, drawn anew: strong noise is a worse start than none."""

    rate: Number = number(0.1, "η, in the middle of those tried", low=0, inside="()")

    def steal(self, key: jax.Array, view: View, own: Own, public: Public) -> Params:
        fresh = public.functions.init(keys.stream(key, "fresh"), public.image_shape)
        start = jax.tree.map(jnp.where, public.touched, fresh, newest(view, view.copies))
        tune = keys.stream(key, "tune")
        return self.descend(tune, start, labelled(own, public), own.count, public.touched)
