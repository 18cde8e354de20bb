"""Weighted averages over the clients, and the server-side clients.

ALGORITHM.md, "One round": W ← Σ_{a ⊔ b} (n_k / n) w_k, and G the same with s included.
"""

from typing import Any

import jax
import jax.numpy as jnp

from noisefl.config import Config

Params = Any


def shares(counts: jax.Array) -> jax.Array:
    """n_k / n, float32 [M], of counts int32 [M]."""
    counts = counts.astype(jnp.float32)
    return counts / jnp.sum(counts)


def halves(shares: jax.Array, signs: jax.Array) -> jax.Array:
    """Shares rescaled so that groups a (+1) and b (−1) weigh ½ each, float32 [M].

    The noise ±ξ then cancels exactly for updates that do not depend on where they started, however
    unequal the groups' sample counts (ALGORITHM.md, "Derived": p_A = p_B).

    Args:
      shares: float32 [M], n_k / n.
      signs: float32 [M], +1 or −1.
    """
    plus = signs > 0
    share_plus = jnp.sum(jnp.where(plus, shares, 0))
    share_minus = jnp.sum(jnp.where(plus, 0, shares))
    return shares / (2 * jnp.where(plus, share_plus, share_minus))


def borrowed_counts(key: jax.Array, counts: jax.Array, config: Config) -> jax.Array:
    """Samples that each server-side client counts for, float32 [number of server-side clients].

    Args:
      key: randomness of the borrowing.
      counts: int32 [K], n_k of the population, from which each server-side client draws one
        client independently ("borrowed"), or takes the mean ("uniform").
      config: `server_clients` and `server_weights` are read.
    """
    counts = counts.astype(jnp.float32)
    shape = (config.num_server_clients,)
    if config.server_weights == "uniform":
        return jnp.full(shape, jnp.mean(counts))
    return jax.random.choice(key, counts, shape)


def include_server_clients(
    average: Params, owner: Params, client_samples: jax.Array, server_samples: jax.Array
) -> Params:
    """Σ_{a ⊔ b ⊔ s} (n_k / n) w_k, given the clients' own average.

    All server-side clients hold the same model G, so that their terms are one.

    Args:
      average: Σ_{a ⊔ b} (n_k / n) w_k over the clients alone.
      owner: G.
      client_samples: float32 [], samples of the clients.
      server_samples: float32 [], samples that the server-side clients count for.
    """
    share = server_samples / (client_samples + server_samples)
    return jax.tree.map(lambda w, g: (1 - share) * w + share * g, average, owner)
