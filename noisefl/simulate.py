"""Many rounds as one compiled program, with their measurements inside."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from noisefl.average import Mean
from noisefl.cohort import Members
from noisefl.data import Federation
from noisefl.errors import refuse, whole
from noisefl.experiment import Experiment
from noisefl.local import Own
from noisefl.measure import Conclusion, Measure, Numbers, Standard
from noisefl.owner import ServerClients
from noisefl.parts import LARGEST
from noisefl.round import State, check_labels, init, step
from noisefl.schemes import Bare

Row = dict[str, Any]
Simulation = Callable[[jax.Array, State, Federation, Experiment, jax.Array], tuple[State, Numbers]]


def begin(key: jax.Array, experiment: Experiment, data: Federation, measure: Measure) -> State:
    """`round.init`, with what the measure remembers; arguments as there."""
    experiment = experiment.resolved()
    state = init(key, experiment, data)
    return state.replace(measured=measure.init(key, experiment, data, state))  # pyright: ignore


def measured_step(
    key: jax.Array, state: State, data: Federation, experiment: Experiment, measure: Measure
) -> tuple[State, Numbers]:
    """`round.step`, and what the measure makes of it: numbers [] by name."""
    experiment = experiment.resolved()

    def observe(key: jax.Array, copy: Any, returned: Any, own: Own) -> Any:
        number = state.round + 1
        return measure.observe(experiment, data, number, key, copy, returned, own)

    def follow(members: Members) -> jax.Array:
        return measure.places(members, state.measured)

    after, info = step(
        key, state, data, experiment, observe, follow if measure.followers else None,
        measure.followers,
    )  # fmt: skip
    numbers, carry = measure.update(
        experiment, state, after, info, info.observed, data, state.measured
    )
    return after.replace(measured=carry), numbers  # pyright: ignore[reportAttributeAccessIssue]


def conclude(
    key: jax.Array, state: State, data: Federation, experiment: Experiment, measure: Measure
) -> Conclusion:
    """What a measure says after the last round, [] by row and column.

    Args:
      key: the run's root.
      state: after its last round.
      data: the federation.
      experiment: the parts.
      measure: that which was with the run from the beginning.
    """
    told = untold(experiment.resolved())
    return measure.conclude(key, told, data, state.owner, state.measured)


def untold(experiment: Experiment) -> Experiment:
    """Without what a measure is not told in the end: the scheme, and how the server averages and
    makes its owner's model. Those of all schemes are then of one structure, and one program's."""
    return experiment.replace(scheme=Bare(), average=Mean(), owner=ServerClients())


def chunk_of_rounds(rounds_per_chunk: int, measure: Measure | None = None) -> Simulation:
    """R rounds as one pure function, for jit, vmap and `shard_map`.

    Args:
      rounds_per_chunk: R, rounds between two looks of the host.
      measure: what is recorded; default `Standard()`.

    Returns:
      (key, state, data, experiment, last_round int32 []) → (state, numbers [R] by name). Rounds
      past `last_round` are not run; their numbers are zero.

    Raises:
      ValueError: `rounds_per_chunk` below 1.
    """
    rounds_per_chunk = whole("rounds_per_chunk", rounds_per_chunk, 1, LARGEST, "must be at least 1")
    if not isinstance(measure, Measure | None):
        raise refuse("measure", measure, "must be a noisefl.measure.Measure, or None")
    kept = Standard() if measure is None else measure

    def simulation(
        key: jax.Array, state: State, data: Federation, experiment: Experiment, last: jax.Array
    ) -> tuple[State, Numbers]:
        @functools.partial(jax.jit, inline=True)  # traced once, for its shapes and for the loop
        def run(state: State) -> tuple[State, Numbers]:
            return measured_step(key, state, data, experiment, kept)

        shapes = jax.eval_shape(run, state)[1]
        kinds = {shape.dtype: [] for shape in shapes.values()}
        for name, shape in shapes.items():
            kinds[shape.dtype].append(name)
        # Numbers of one type are one array: an accelerator writes them at once. A loop that ends,
        # rather than a branch in each of R rounds, spares it copies of the whole state.
        begun = jnp.int32(0), state, [
            jnp.zeros((rounds_per_chunk, len(kinds[kind])), kind) for kind in kinds
        ]  # fmt: skip

        def unfinished(loop: Any) -> jax.Array:
            number, state, _ = loop
            return (number < rounds_per_chunk) & (state.round < last)

        def one(loop: Any) -> Any:
            number, state, rows = loop
            state, found = run(state)
            columns = (jnp.stack([found[name] for name in kinds[kind]]) for kind in kinds)
            written = [row.at[number].set(new) for row, new in zip(rows, columns, strict=True)]
            return number + 1, state, written

        _, state, rows = lax.while_loop(unfinished, one, begun)
        found = {
            name: row[:, place]
            for names, row in zip(kinds.values(), rows, strict=True)
            for place, name in enumerate(names)
        }
        return state, {name: found[name] for name in shapes}

    return simulation


def run(
    key: jax.Array,
    experiment: Experiment,
    data: Federation,
    *,
    rounds: int,
    measure: Measure | None = None,
    rounds_per_chunk: int = 1,
    state: State | None = None,
) -> Iterator[tuple[State, list[Row]]]:
    """Goes on to round `rounds`, a compiled chunk at a time.

    Args:
      key: the run's root, `keys.root(seed)`; the same key goes on to the same result.
      experiment: the parts.
      data: the federation.
      rounds: last round, counted from 1.
      measure: what is recorded; default `Standard()`.
      rounds_per_chunk: rounds between two looks of the host.
      state: where to go on; donated. Default: the beginning.

    Yields:
      (state, rows): the state after the chunk, valid until the generator advances, and a dict of
      plain Python values for each round in it.
    """
    kept = Standard() if measure is None else measure
    experiment = experiment.resolved()
    check_labels(experiment, data)
    simulation = jax.jit(chunk_of_rounds(rounds_per_chunk, kept), donate_argnums=1)
    now: State = (
        jax.jit(lambda k, e, d: begin(k, e, d, kept))(key, experiment, data)
        if state is None
        else state
    )
    done = int(now.round)
    while done < rounds:
        now, numbers = simulation(key, now, data, experiment, jnp.int32(rounds))
        finished = int(now.round)
        yield now, rows(numbers)[: finished - done]
        done = finished


def rows(numbers: Numbers) -> list[Row]:
    """One dict a round of numbers [R], the round first, the others in order of name; floats are the
    shortest decimals of their float32, so that 0.6 is 0.6."""
    names = sorted(numbers, key=lambda name: (name != "round", name))
    columns = {name: np.asarray(numbers[name]) for name in names}
    length = len(next(iter(columns.values())))
    return [{name: _plain(column[at]) for name, column in columns.items()} for at in range(length)]


def _plain(value: Any) -> bool | int | float:
    return float(str(value)) if value.dtype == np.float32 else value.item()
