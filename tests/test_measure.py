"""The contract of measures: numbers of a round by name; what they are is in `test_simulate`."""

import functools
from typing import Any

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


@pytest.mark.parametrize("members", [2, 3, 9])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_mean_of_what_a_coalition_received_is_as_good_as_the_reference_says(scheme, members):
    """Of M = 4 clients in turn: two pairs, one of three, or all; of a pair it is W."""
    experiment = fed.experiment(scheme=SCHEMES[scheme], strength=3.0).resolved()
    made = measure.Averaged(members=members)
    wrapper: Any = experiment.scheme
    number = jnp.int32(int(wrapper.warmup_rounds) + 1)
    state = fed.start(experiment)
    base = jax.tree_util.tree_map_with_path(  # large biases: a sum is not as good as a mean
        lambda path, w: w + jnp.cos(9 * jnp.arange(w.size)) * ("bias" in str(path[-1]))
        if w.ndim == 1 else w, state.base
    )  # fmt: skip
    state = fed.replaced(state, base=base, round=number, measured=())
    _, numbers = simulate.measured_step(fed.KEY, state, DATA, experiment, made)
    _, info = fed.step(fed.KEY, state, DATA, experiment)
    groups = np.asarray(info.members.groups).tolist()
    a, b = ([slot for slot, g in enumerate(groups) if g == one] for one in (0, 1))
    turns = [slot for both in zip(a, b, strict=True) for slot in both]
    copies = [nets.as_float64(fed.plain(fed.lane(info.observed[0], slot))) for slot in turns]
    c = min(members, 4)
    images = np.asarray(DATA.test_images), np.asarray(DATA.test_labels)
    found = []
    for first in range(0, 4 // c * c, c):
        mean = jax.tree.map(lambda *each: sum(each) / c, *copies[first : first + c])
        found.append(nets.accuracy(fed.NET, mean, *images))
    assert float(numbers["averaged_accuracy_max"]) == pytest.approx(max(found), abs=1e-6)
    if scheme == "pair" and members == 2:
        assert max(found) == nets.accuracy(fed.NET, nets.as_float64(state.base), *images)
