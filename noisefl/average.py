"""Averages of the clients' updates.

ALGORITHM.md, "One round": W ← Σ_{a ⊔ b} (n_k / n) w_k, here as the update Σ (n_k / n) (w_k − W).
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from noisefl.parts import Part, part

Update = Any


@part
class Average(Part):
    """Base. One that runs as updates come overrides empty, add and finish; one that must see all of
    them at once says `gathers = True` and overrides combine.

    A mask is None where every client held every coordinate, else of the update's shapes, 1 where
    this client held it. A coordinate that nobody held keeps W: its update is 0.
    """

    abstract: ClassVar[bool] = True
    gathers: ClassVar[bool] = False

    def empty(self, update: Update, mask: Update | None) -> Any:
        """The total of no updates, from the shapes of one."""
        raise NotImplementedError

    def add(self, total: Any, updates: Update, masks: Update | None, weights: jax.Array) -> Any:
        """The total with c more: updates and masks [c, ...], weights float32 [c]. Totals add up."""
        raise NotImplementedError

    def finish(self, total: Any) -> Update:
        """The update of all."""
        raise NotImplementedError

    def combine(self, updates: Update, masks: Update | None, weights: jax.Array) -> Update:
        """The update of all from updates and masks [M, ...], and weights float32 [M] of sum 1."""
        raise NotImplementedError


@part
class Mean(Average):
    """Weighted by samples (McMahan et al. 2017); with masks, by the samples of who held each."""

    def empty(self, update: Update, mask: Update | None) -> Any:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (update, mask))

    def add(self, total: Any, updates: Update, masks: Update | None, weights: jax.Array) -> Any:
        if masks is not None:
            updates = jax.tree.map(jnp.multiply, updates, masks)
        part = jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), (updates, masks))
        return jax.tree.map(jnp.add, total, part)

    def finish(self, total: Any) -> Update:
        update, held = total
        if held is None:
            return update
        return jax.tree.map(
            lambda u, h: jnp.where(h > 0, u / jnp.where(h > 0, h, 1), 0), update, held
        )
