"""The contract of measures: numbers of a round by name; what they are is in `test_simulate`."""

import functools

import example_parts as examples
import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_nets as nets

import noisefl
from noisefl import measure, schemes, simulate
from noisefl.parts import implementations

CLASSES = [*filter(fed.ours, implementations(measure.Measure)), examples.Distance]
SCHEMES = {"pair": fed.TINY.scheme, "a copy a client": schemes.Warmup(examples.OwnNoise())}
SMALL = {measure.Thieves: functools.partial(measure.Thieves, singles=1, coalitions="2")}
DATA = fed.federation()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_of_a_round_by_name(cls, scheme):
    """Under any scheme; the state has one structure before and after, so that rounds are a loop."""
    experiment, made = fed.experiment(scheme=SCHEMES[scheme]), (SMALL.get(cls) or cls)()

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


def test_a_base_that_is_handed_out_bare_is_measured_as_itself_and_not_as_the_owner():
    """In protected rounds G is another model than W; what is remembered of W is of W."""
    experiment = fed.experiment(
        cap=0.99, strength=0.0, accuracy_on="test", owner=noisefl.owner.ServerClients("m/2")
    ).resolved()
    made = measure.Accuracies()
    state = simulate.begin(fed.KEY, experiment, DATA, made)
    step = jax.jit(lambda state: simulate.measured_step(fed.KEY, state, DATA, experiment, made))
    judged = np.asarray(DATA.validation_images), np.asarray(DATA.validation_labels)
    apart = False
    for _ in range(5):
        before, (state, numbers) = state, step(state)
        of = {
            name: nets.accuracy(fed.NET, nets.as_float64(getattr(before, name)), *judged)
            for name in ("base", "owner")
        }
        assert float(numbers["shared_validation_accuracy"]) == pytest.approx(of["base"], abs=1e-6)
        apart |= before.round > 1 and of["base"] != of["owner"]
    assert apart
