"""Keys: one root a seed, then named streams. No key is used twice and none has a default."""

import zlib

import jax

from noisefl.errors import whole

# A purpose's number is a hash of its name, so adding one never shifts the randomness of another.


def root(seed: int) -> jax.Array:
    """The root key [] of a run: what `init` and every `step` of it are given.

    Raises:
      ValueError: a seed outside 0 … 2³² − 1, which would share its randomness with one inside.
    """
    return jax.random.key(whole("seed", seed, 0, 2**32 - 1, "must be 0 to 4294967295"))


def stream(key: jax.Array, purpose: str, index: jax.Array | int | None = None) -> jax.Array:
    """The key of one purpose, and of one index (round, client, try) within that purpose.

    Args:
      key: a key that is used for nothing but deriving streams.
      purpose: the stream's name, e.g. "groups".
      index: int32 [], optional.
    """
    key = jax.random.fold_in(key, zlib.crc32(purpose.encode()))
    return key if index is None else jax.random.fold_in(key, index)


def of_round(root: jax.Array, number: jax.Array | int) -> jax.Array:
    """The key [] of round t = 1, 2, … of a run, the same wherever the run is driven from."""
    return stream(stream(root, "rounds"), "round", number)
