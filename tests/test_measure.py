"""The contract of measures: numbers of a round by name; what they are is in `test_simulate`."""

import example_parts as examples
import federation as fed
import jax
import jax.numpy as jnp
import pytest

from noisefl import measure, schemes, simulate
from noisefl.parts import implementations

CLASSES = [*filter(fed.ours, implementations(measure.Measure)), examples.Distance]
SCHEMES = {"pair": fed.TINY.scheme, "a copy a client": schemes.Warmup(examples.OwnNoise())}
DATA = fed.federation()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_of_a_round_by_name(cls, scheme):
    """Under any scheme; the state has one structure before and after, so that rounds are a loop."""
    experiment, made = fed.experiment(scheme=SCHEMES[scheme]), cls()

    def one(key):
        state = simulate.begin(key, experiment, DATA, made)
        after, numbers = simulate.measured_step(key, state, DATA, experiment, made)
        return state, after, numbers

    state, after, numbers = jax.eval_shape(one, fed.KEY)
    assert numbers
    for leaf in numbers.values():
        assert leaf.shape == ()
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_)
    kinds = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, after))
    assert next(kinds) == next(kinds)
    assert jax.tree.structure(state) == jax.tree.structure(after)
