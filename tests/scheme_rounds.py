"""Rounds that a scheme issues for the tiny model, and its clients' copies, without training."""

import functools

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from noisefl import calibrate, keys, noise
from noisefl.round import members_of
from noisefl.schemes import Slot

DATA, M = fed.federation(), 4
LINEN = fed.TINY.replace(model=fed.TinyCNN()).resolved()
W = jax.tree.map(jnp.float32, fed.trained())
LAST = noise.layers("last", relative=True)


def still(strength: float) -> calibrate.Calibrator:
    return calibrate.Unverified(strength=strength)


@functools.cache
def issuing(experiment):
    """Compiled once for each structure of a scheme."""
    judge = experiment.judge(DATA)

    @jax.jit
    def issue(scheme, key, round, base, members, carry):
        return scheme.issue(key, round, base, base, members, judge, carry)

    return issue


def issued(scheme, base=W, round=2, seed=5, carry=None, experiment=LINEN, members=None):
    """(issue, members, carry) of a round."""
    key = keys.root(seed)
    if members is None:
        members = members_of(key, experiment.replace(scheme=scheme), DATA)
    carry = scheme.init(keys.root(6), base) if carry is None else carry
    issue, carry = issuing(experiment)(scheme, key, jnp.int32(round), base, members, carry)
    return issue, members, carry


@jax.jit
def copies(scheme, issue, members, base=W):
    slots = Slot(jnp.arange(M), members.groups, members.clients)
    return jax.vmap(lambda slot: scheme.copy(base, issue, slot))(slots)


def flat(tree) -> dict[tuple[str, ...], np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree).items()}  # pyright: ignore


def joined(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def joined_clients(tree) -> np.ndarray:
    """[M, n]."""
    leaves = [np.reshape(leaf, (M, -1)) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=1)
