"""Many runs as one compiled program: lanes, each with its own key, hyperparameters and partition.

purejaxrl (Lu et al. 2022) showed for reinforcement learning what that is worth. A lane equals the
single run of `simulate` with the same key, hyper and data, up to the order of floating-point sums.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from noisefl import keys, mesh, strategy
from noisefl.config import Config, Hyper, as_arrays, check_hyper, refuse
from noisefl.data import FederatedData
from noisefl.lanes import OF_A_LANE, own_places, put, select, stack, width
from noisefl.rounds import RoundState, make_round
from noisefl.simulate import Metrics, chunk_of_rounds


class TooLarge(ValueError):
    """Not even one lane a device fits in memory."""


USABLE = 0.8  # of a device's memory; the rest is for what the analysis of a program cannot see


class Program(NamedTuple):
    """Two compiled functions on arrays over lanes, spread over a mesh.

    `init(seeds) → states`; `chunk(seeds, states, data, hypers, last_rounds) → (states, metrics)`,
    with metrics [L, R]. Seeds are `jax.random.key_data` of the runs' roots, uint32 [L, 2]; states
    are donated; a lane whose last_rounds int32 [L] is behind it is not run.
    """

    init: Callable[..., RoundState]
    chunk: Callable[..., tuple[RoundState, Metrics]]
    bytes_a_device: int  # XLA's own count of arguments, results and temporaries of `chunk`


def make_program(
    model: nn.Module,
    config: Config,
    data: FederatedData,
    lanes: int,
    rounds_per_chunk: int,
    on: Mesh,
    side_by_side: int | None = None,
    **options: Any,
) -> Program:
    """Compiles a chunk of rounds of L lanes.

    Args:
      model: of all lanes.
      config: static options of all lanes.
      data: of `put`, or its shapes with L lanes.
      lanes: L, a multiple of the mesh's lanes.
      rounds_per_chunk: R.
      on: a mesh of `mesh.make`.
      side_by_side: lanes of one device under vmap at a time, the rest in turn; default the best of
        the backend. Changes results in the last bits.
      options: of `make_round`.

    Raises:
      ValueError: as `make_round` and `chunk_of_rounds` do.
    """
    axis = mesh.CLIENTS if on.shape[mesh.CLIENTS] > 1 else None
    round_ = make_round(model, config, clients_axis=axis, **options)
    one = chunk_of_rounds(round_, model, config, rounds_per_chunk)
    at_once = side_by_side or strategy.lanes_side_by_side(lanes // on.shape[mesh.LANES])

    def init(seeds: jax.Array) -> RoundState:
        def first(seed: jax.Array) -> RoundState:
            return round_.init(keys.stream(jax.random.wrap_key_data(seed), "init"))

        return lax.map(first, seeds)

    def chunk(seeds, states, data, hypers, last_rounds):
        def lane(x: Any) -> tuple[RoundState, Metrics]:
            seed, state, own, hyper, last = x
            key = keys.stream(jax.random.wrap_key_data(seed), "rounds")
            return one(key, state, data.replace(**own), hyper, last)

        own = {name: getattr(data, name) for name in OF_A_LANE}
        xs = (seeds, states, own, hypers, last_rounds)
        return lax.map(lane, xs, batch_size=at_once if at_once > 1 else None)

    over, same = PartitionSpec(mesh.LANES), PartitionSpec()
    of_data: Any = data.replace(  # pyright: ignore
        **{name: over if name in OF_A_LANE else same for name in vars(data)}
    )
    # Nothing here is differentiated through, and every result is made equal over the clients' axis.
    spread = functools.partial(jax.shard_map, mesh=on, check_vma=False)
    in_specs = (over, over, of_data, over, over)
    seeds = jax.ShapeDtypeStruct((lanes, 2), jnp.uint32, sharding=mesh.over_lanes(on))

    def shapes(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((lanes, *x.shape), x.dtype, sharding=seeds.sharding),
            tree,
        )

    lower_init = jax.jit(spread(init, in_specs=over, out_specs=over)).lower
    states = shapes(jax.eval_shape(round_.init, jax.eval_shape(lambda: jax.random.key(0))))
    numbers = shapes(jax.eval_shape(lambda: as_arrays(Hyper())))
    program = jax.jit(spread(chunk, in_specs=in_specs, out_specs=over), donate_argnums=1)
    compiled = program.lower(seeds, states, data, numbers, shapes(jnp.int32(0))).compile()
    return Program(lower_init(seeds).compile(), compiled, _bytes(compiled))


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

    states: RoundState  # [L, ...], after the last round
    metrics: Metrics  # [L, T]


def run(
    config: Config | Sequence[Config],
    hypers: Hyper,
    roots: jax.Array,
    data: FederatedData | Sequence[FederatedData],
    *,
    model: nn.Module,
    rounds: int,
    rounds_per_chunk: int = 1,
    on: Mesh | None = None,
    lanes_at_once: int | None = None,
    **options: Any,
) -> Result:
    """Runs L lanes, as many at once as fit, the rest after them.

    Args:
      config: of all lanes, or one a lane; one compilation for each that is different.
      hypers: each leaf [L], or one number for all.
      roots: keys [L], `keys.root` of the seeds; lanes may share one.
      data: of `stack`, or one a lane.
      model: of all lanes.
      rounds: T.
      rounds_per_chunk: R, rounds of one call of the program.
      on: default `mesh.make()`, all devices.
      lanes_at_once: default by the backend and the memory (`width`, `fitting`).
      options: of `make_round`.

    Raises:
      ValueError: arguments that do not agree on L; what `check_hyper` and `make_round` refuse.
    """
    on = mesh.make() if on is None else on
    if not (isinstance(roots, jax.Array) and roots.ndim == 1 and roots.size):
        shape = getattr(roots, "shape", type(roots).__name__)
        raise refuse("roots", shape, "must be an array of keys [L], of at least one lane")
    if lanes_at_once is not None and lanes_at_once < 1:
        raise refuse("lanes_at_once", lanes_at_once, "must be at least 1")
    data = data if isinstance(data, FederatedData) else stack(data)
    if data.clients.ndim != 3:
        raise refuse("data", "of one run", "must be of `stack`, or one a lane")
    if rounds < 1:
        raise refuse("rounds", rounds, "must be at least 1")
    total = roots.shape[0]
    configs = [config] * total if isinstance(config, Config) else list(config)
    for name, leaf in vars(as_arrays(hypers)).items():
        if leaf.shape not in ((), (total,)):
            raise refuse(name, leaf.shape, f"must be one number, or one for each of {total} roots")
    for one in dict.fromkeys(configs):
        check_hyper(hypers, one)
    numbers = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (total,)), as_arrays(hypers))
    for name, count in (("config", len(configs)), ("data", data.counts.shape[0])):
        if count != total:
            raise refuse(name, f"{count} lanes", f"roots has {total}")
    seeds = np.asarray(jax.random.key_data(roots))
    parts: list[tuple[np.ndarray, Result]] = []
    for one in dict.fromkeys(configs):
        members = np.array([lane for lane in range(total) if configs[lane] == one])

        def compile(lanes: int, one=one, members=members) -> Program:
            some = put(select(data, members[own_places(on, lanes, len(members))]), on)
            return make_program(model, one, some, lanes, rounds_per_chunk, on, **options)

        lanes, program = fitting(compile, width(len(members), on, lanes_at_once), on)
        for start in range(0, len(members), lanes):
            chosen = members[start : start + lanes]
            mine = chosen[own_places(on, lanes, len(chosen))]
            last = np.where(mesh.own_lanes(on, lanes) < len(chosen), rounds, 0).astype(np.int32)
            result = _run_batch(program, on, seeds[mine], select(data, mine),
                                select(numbers, mine), last, rounds)  # fmt: skip
            parts.append((chosen, select(result, np.arange(len(chosen)))))
    order = np.argsort(np.concatenate([lanes for lanes, _ in parts]))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *(r for _, r in parts))


def _run_batch(program, on, seeds, data, hypers, last_rounds, rounds: int) -> Result:
    over = mesh.over_lanes(on)
    seeds, hypers, last_rounds = mesh.put((seeds, hypers, last_rounds), over)
    data = put(data, on)
    states, chunks, done = program.init(seeds), [], 0
    while done < rounds:
        states, metrics = program.chunk(seeds, states, data, hypers, last_rounds)
        chunks.append(mesh.everyones(metrics))
        done += chunks[-1].round.shape[1]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1)[:, :rounds], *chunks)
    return Result(mesh.everyones(states), joined)


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
