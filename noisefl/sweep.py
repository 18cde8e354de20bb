"""Many runs as one compiled program: lanes, each with its own key, hyperparameters and partition.

purejaxrl (Lu et al. 2022) showed for reinforcement learning what that is worth. A lane equals the
single run of `simulate` with the same key, experiment and data, up to the order of floating-point
sums.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from noisefl import layout, mesh, strategy
from noisefl.data import Federation
from noisefl.errors import refuse
from noisefl.experiment import Experiment
from noisefl.layout import own_places, put, select, stack, width
from noisefl.measure import Conclusion, Measure, Numbers, Standard
from noisefl.round import State
from noisefl.simulate import begin, chunk_of_rounds, untold


class TooLarge(ValueError):
    """Not even one lane a device fits in memory."""


USABLE = 0.8  # of a device's memory; the rest is for what the analysis of a program cannot see


class Program(NamedTuple):
    """Compiled functions on arrays over lanes, spread over a mesh.

    `init(seeds, data, experiments) → states`; `chunk(seeds, states, data, experiments, last_rounds)
    → (states, numbers)`, with numbers [L, R] by name. Seeds are `jax.random.key_data` of the runs'
    roots, uint32 [L, 2]; states are donated; a lane whose last_rounds int32 [L] is behind it is not
    run.

    `conclude(seeds, states, data, experiments)`, of a measure that concludes: `last_words`.
    """

    init: Callable[..., State]
    chunk: Callable[..., tuple[State, Numbers]]
    bytes_a_device: int  # XLA's own count of arguments, results and temporaries of `chunk`
    numbers: dict[str, Any]  # shapes [L, R] and types of what `chunk` records, by name
    conclude: Callable[..., Iterator[Conclusion]] | None = None


class Traced(NamedTuple):
    """A `Program` that XLA has not seen yet."""

    init: Any  # jax.stages.Traced
    chunk: Any
    conclude: Callable[..., Iterator[Conclusion]] | None

    def compile(self) -> Program:
        """By XLA, both functions at a time: it leaves most of a second core idle."""
        lowered = self.chunk.lower()
        with ThreadPoolExecutor(1) as beside:
            init = beside.submit(self.init.lower().compile)
            chunk = lowered.compile()
        return Program(init.result(), chunk, _bytes(chunk), lowered.out_info[1], self.conclude)


def trace(
    experiments: Experiment,
    data: Federation,
    lanes: int,
    rounds_per_chunk: int,
    on: Mesh,
    measure: Measure | None = None,
    side_by_side: int | None = None,
) -> Traced:
    """A chunk of rounds of L lanes, up to what takes long.

    Args:
      experiments: numbers [l] of any lanes, of `parts.lanes`; only shapes are read.
      data: of `layout.stack`, of any lanes, or its shapes.
      lanes: L, a multiple of the mesh's lanes.
      rounds_per_chunk: R.
      on: a mesh of `mesh.make`.
      measure: what is recorded; default `Standard()`.
      side_by_side: lanes of one device under vmap at a time, the rest in turn; default the best of
        the backend. Changes results in the last bits.

    Raises:
      ValueError: as `round.init`, `round.step` and `chunk_of_rounds` do.
    """
    kept = Standard() if measure is None else measure
    axis = mesh.CLIENTS if on.shape[mesh.CLIENTS] > 1 else ""
    one = chunk_of_rounds(rounds_per_chunk, kept)
    own = lanes // on.shape[mesh.LANES]
    at_once = side_by_side or strategy.lanes_side_by_side(own, mesh.target(on))

    def placed(experiment: Experiment) -> Experiment:
        how = experiment.resolved().strategy
        batch = strategy.eval_batch_of_a_lane(how.eval_batch or 1, at_once)
        return experiment.replace(strategy=how.replace(clients_axis=axis, eval_batch=batch))

    def init(seeds: jax.Array, data: Federation, experiments: Experiment) -> State:
        def first(x: Any) -> State:
            seed, own, experiment = x
            key = jax.random.wrap_key_data(seed)
            return begin(key, experiment, own.replace(images=data.images), kept)

        return lax.map(first, (seeds, data.replace(images=()), experiments))  # pyright: ignore

    def chunk(seeds, states, data, experiments, last_rounds):
        def lane(x: Any) -> tuple[State, Numbers]:
            seed, state, own, experiment, last = x
            key = jax.random.wrap_key_data(seed)
            return one(key, state, own.replace(images=data.images), placed(experiment), last)

        xs = (seeds, states, data.replace(images=()), experiments, last_rounds)
        return lax.map(lane, xs, batch_size=at_once if at_once > 1 else None)

    over, same = PartitionSpec(mesh.LANES), PartitionSpec()
    of_data = layout.axes(over, same)
    # Nothing here is differentiated through, and every result is made equal over the clients' axis.
    spread = functools.partial(jax.shard_map, mesh=on, check_vma=False)

    def shapes(tree: Any) -> Any:
        return layout.shapes(tree, lanes, on)

    seeds, last = shapes((np.zeros((1, 2), np.uint32), np.zeros(1, np.int32)))
    data, numbers = shapes(data), shapes(experiments)
    first = jax.jit(spread(init, in_specs=(over, of_data, over), out_specs=over))
    begun = first.trace(seeds, data, numbers)
    in_specs = (over, over, of_data, over, over)
    program = jax.jit(spread(chunk, in_specs=in_specs, out_specs=over), donate_argnums=1)
    states = shapes(begun.out_info)
    traced = program.trace(seeds, states, data, numbers, last)
    last = functools.partial(last_words, kept, on) if kept.concludes else None
    return Traced(begun, traced, last)


def last_words(
    measure: Measure, on: Mesh, seeds: jax.Array, states: State, data: Federation,
    experiments: Experiment,
) -> Iterator[Conclusion]:  # fmt: skip
    """What a measure says after the last round, of one lane of each device after the other.

    The program is one for all numbers of lanes and all schemes, of which it is told nothing, so
    that a sweep compiles it once, and not before somebody asks.

    Yields:
      NumPy arrays [D] by row and column, for `in_order`.
    """
    told, images = untold(experiments), data.images
    given = seeds, states.owner, states.measured, data.replace(images=()), told  # pyright: ignore
    for place in range(seeds.shape[0] // on.shape[mesh.LANES]):
        some = _of_each_device(given, np.int32(place), on)
        yield mesh.everyones(_last_words_of_one(measure, *some, images, on))


def in_order(found: Sequence[Conclusion]) -> Any:
    """All of `last_words`: arrays [L] by row and column. Lanes go device by device."""
    return jax.tree.map(lambda *each: np.stack(each, axis=1).reshape(-1), *found)


@functools.partial(jax.jit, static_argnames="on")
def _of_each_device(tree: Any, place: Any, on: Mesh) -> Any:
    """[D, ...] of arrays [L, ...]: one lane of each device."""
    over = PartitionSpec(mesh.LANES)

    def one(tree: Any, place: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, place, 1), tree)

    specs = {"in_specs": (over, PartitionSpec()), "out_specs": over}
    return jax.shard_map(one, mesh=on, check_vma=False, **specs)(tree, place)


@functools.partial(jax.jit, static_argnames="on")
def _last_words_of_one(measure, seeds, owners, carries, data, experiments, images, on: Mesh) -> Any:
    """[D] by row and column, of one lane a device."""
    over, same = PartitionSpec(mesh.LANES), PartitionSpec()

    def lane(measure, images, lanes: Any) -> Any:
        seed, owner, carry, own, experiment = jax.tree.map(lambda leaf: leaf[0], lanes)
        key = jax.random.wrap_key_data(seed)
        found = measure.conclude(
            key, experiment.resolved(), own.replace(images=images), owner, carry
        )
        return jax.tree.map(lambda leaf: leaf[None], found)

    spread = jax.shard_map(
        lane, mesh=on, in_specs=(same, same, over), out_specs=over, check_vma=False
    )
    return spread(measure, images, (seeds, owners, carries, data, experiments))


def fitting(compile: Callable[[int], Program], lanes: int, on: Mesh) -> tuple[int, Program]:
    """The largest of `lanes`, lanes / 2, … whose program fits in memory, as XLA analyses it.

    Raises:
      TooLarge: not even one lane a device does.
    """
    across, memory = on.shape[mesh.LANES], mesh.memory_a_device(on)
    while True:
        program = compile(lanes)
        if program.bytes_a_device <= USABLE * memory:
            return lanes, program
        if lanes <= across:
            needs = f"a lane needs {program.bytes_a_device / 1e9:.1f} GB"
            allowed = f"{needs}, a device has {memory / 1e9:.1f}"
            raise TooLarge(str(refuse("lanes_at_once", lanes, allowed)))
        lanes = max(lanes // 2 // across * across, across)


class Result(NamedTuple):
    """What became of L lanes: NumPy arrays."""

    states: State  # [L, ...], after the last round; keys as their data
    metrics: dict[str, np.ndarray]  # [L, T] by name
    conclusions: dict[Any, dict[str, np.ndarray]]  # [L] by row and column; of most measures none


def run(
    experiments: Experiment | Sequence[Experiment],
    roots: jax.Array,
    data: Federation | Sequence[Federation],
    *,
    rounds: int,
    measure: Measure | None = None,
    rounds_per_chunk: int = 1,
    on: Mesh | None = None,
    lanes_at_once: int | None = None,
) -> Result:
    """Runs L lanes, as many at once as fit, the rest after them.

    Args:
      experiments: one a lane, with one compilation for each structure that is different and one
        kind of state; or one with numbers [L] or [], for all.
      roots: keys [L], `keys.root` of the seeds; lanes may share one.
      data: of `layout.stack`, or one a lane.
      rounds: T.
      measure: what is recorded; default `Standard()`.
      rounds_per_chunk: R, rounds of one call of the program.
      on: default `mesh.make()`, all devices.
      lanes_at_once: default by the backend and the memory (`width`, `fitting`).

    Raises:
      ValueError: arguments that do not agree on L; what `round.init` and `round.step` refuse.
    """
    on = mesh.make() if on is None else on
    if not (isinstance(roots, jax.Array) and roots.ndim == 1 and roots.size):
        shape = getattr(roots, "shape", type(roots).__name__)
        raise refuse("roots", shape, "must be an array of keys [L], of at least one lane")
    if lanes_at_once is not None and lanes_at_once < 1:
        raise refuse("lanes_at_once", lanes_at_once, "must be at least 1")
    if rounds < 1:
        raise refuse("rounds", rounds, "must be at least 1")
    total = roots.shape[0]
    each = _of_lanes(experiments, total)
    data = data if isinstance(data, Federation) else stack(data)
    if data.clients.ndim != 3:
        raise refuse("data", "of one run", "must be of `stack`, or one a lane")
    for name, found in (("experiments", len(each)), ("data", data.counts.shape[0])):
        if found != total:
            raise refuse(name, f"{found} lanes", f"roots has {total}")
    seeds = np.asarray(jax.random.key_data(roots))
    structures = [jax.tree.structure(one) for one in each]
    parts: list[tuple[np.ndarray, Result]] = []
    for structure in dict.fromkeys(structures):
        members = np.array([lane for lane in range(total) if structures[lane] == structure])
        numbers = jax.tree.map(lambda *leaves: np.stack(leaves), *(each[m] for m in members))

        def compile(lanes: int, members=members, numbers=numbers) -> Program:
            some = select(data, members)
            return trace(numbers, some, lanes, rounds_per_chunk, on, measure).compile()

        lanes, program = fitting(compile, width(len(members), on, lanes_at_once), on)
        for start in range(0, len(members), lanes):
            chosen = members[start : start + lanes]
            places = own_places(on, lanes, len(chosen))
            mine = chosen[places]
            last = np.where(mesh.own_lanes(on, lanes) < len(chosen), rounds, 0).astype(np.int32)
            result = _run_batch(
                program, on, seeds[mine], select(data, mine), select(numbers, start + places),
                last, rounds,
            )  # fmt: skip
            parts.append((chosen, select(result, np.arange(len(chosen)))))
    order = np.argsort(np.concatenate([lanes for lanes, _ in parts]))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *(r for _, r in parts))


def _of_lanes(experiments: Experiment | Sequence[Experiment], total: int) -> list[Experiment]:
    """One a lane, numbers [] in NumPy."""
    if not isinstance(experiments, Experiment):
        return [jax.tree.map(np.asarray, one) for one in experiments]
    for path, leaf in jax.tree_util.tree_flatten_with_path(experiments)[0]:
        if np.shape(leaf) not in ((), (total,)):
            name = jax.tree_util.keystr(path)
            allowed = f"must be one number, or one for each of {total} roots"
            raise refuse(f"experiments{name}", np.shape(leaf), allowed)
    full = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (total,)), experiments)
    return [jax.tree.map(lambda leaf: leaf[lane], full) for lane in range(total)]  # noqa: B023


def _run_batch(program, on, seeds, data, experiments, last_rounds, rounds: int) -> Result:
    over = mesh.over_lanes(on)
    seeds, experiments, last_rounds = mesh.put((seeds, experiments, last_rounds), over)
    data = put(data, on)
    states, chunks, done = program.init(seeds, data, experiments), [], 0
    while done < rounds:
        states, numbers = program.chunk(seeds, states, data, experiments, last_rounds)
        chunks.append(mesh.everyones(numbers))
        done += next(iter(numbers.values())).shape[1]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1)[:, :rounds], *chunks)
    last = program.conclude
    said = in_order(list(last(seeds, states, data, experiments))) if last else {}
    return Result(mesh.everyones(states), joined, said)


def _bytes(compiled: Any) -> int:
    found = compiled.memory_analysis()
    if found is None:
        return 0
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )
