"""`python -m experiments.studies.early_noise`: why noise on early layers breaks the model.

Clients of one group train the same copy, W + ξ, those of the other W − ξ. Their updates of the
layers *without* noise are averaged, which helps if they point the same way. For noise on each layer
in turn: the cosine of two clients' updates, in the same group and in different ones, and η times
the largest eigenvalue of the Hessian of a client's loss where it starts, above 2 of which gradient
descent is unstable; each the mean over the first protected rounds (PROTECTION.md, "Why the place
decides").
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax.traverse_util import flatten_dict
from jax import lax

import noisefl
from experiments.command import BAD_INPUT, complain, end, helped
from noisefl import Experiment, Federation, evaluate, keys, noise, presets
from noisefl.data import PARTITIONS
from noisefl.local import Own
from noisefl.strategy import Strategy

IMAGES = 100  # of a client's, whose loss is looked at
ITERATIONS = 10  # of the power method, which finds at most the largest eigenvalue


def main(argv: list[str]) -> None:
    values = options(argv)
    out, dataset = Path(values["out"]), noisefl.load("mnist")
    rows, lines, table = [], [], ""
    out.mkdir(parents=True, exist_ok=True)
    for layers in values["layers"]:
        experiment = experiment_of(layers)
        for seed in range(values["seeds"]):
            data = noisefl.federate(dataset, partition=values["partition"], seed=seed)
            rows += run(layers, seed, experiment, data, values["rounds"])
            print(f"{layers}, seed {seed}: {rows[-1]}", file=sys.stderr)
        lines.append(line(layers, [row for row in rows if row["layers"] == layers]))
        cells = [lines[0].keys(), ["---"] * len(lines[0]), *(one.values() for one in lines)]
        table = "".join(f"| {' | '.join(row)} |\n" for row in cells)
        (out / "early_noise.json").write_text(json.dumps(rows, indent=1) + "\n")
        (out / "early_noise.md").write_text(table)
    print(table)


def options(argv: list[str]) -> dict[str, Any]:
    """The flags by name. Ends the process with one line about one that is wrong."""
    values = flags.FlagValues()
    every = ["none", "conv1", "conv2", "dense1", "dense2", "last", "all"]
    flags.DEFINE_string("out", "results/early_noise", "folder of the results", flag_values=values)
    flags.DEFINE_multi_enum("layers", every, every, "with noise; repeat", flag_values=values)
    flags.DEFINE_enum("partition", "iid", PARTITIONS, "of the images", flag_values=values)
    for name, default, of in (("seeds", 3, "runs of each"), ("rounds", 5, "protected rounds")):
        flags.DEFINE_integer(name, default, of, lower_bound=1, flag_values=values)
    if helped(argv, __doc__, values):
        sys.exit(0)
    try:
        if rest := values(argv)[1:]:
            raise flags.Error(f"unexpected argument {rest[0]!r}")
    except flags.Error as error:
        complain(str(error), "experiments.studies.early_noise")
        sys.exit(BAD_INPUT)
    return values.flag_values_dict()


def experiment_of(layers: str) -> Experiment:
    """The quickstart with noise on other layers, on convolutions that have a second derivative."""
    made = presets.quickstart()
    scheme: Any = made.scheme
    inner = scheme.inner.replace(
        on=noise.layers("last" if layers == "none" else layers, relative=True)
    )
    made = made.replace(
        scheme=scheme.replace(inner=inner), strategy=Strategy(conv="patches", pool="reduce")
    )
    return (noisefl.fedavg(made) if layers == "none" else made).resolved()


def run(
    layers: str, seed: int, experiment: Experiment, data: Federation, rounds: int
) -> list[dict[str, Any]]:
    """The figures of each protected round; a run that broke down ends."""
    touched = experiment.scheme.touched(experiment.functions, data.image_shape)
    everything = jax.eval_shape(
        lambda key: experiment.functions.init(key, data.image_shape), keys.root(0)
    )
    free = [path for path in flatten_dict(everything) if path not in touched]
    bare = free if free and layers != "none" else list(flatten_dict(everything))

    def observe(key: jax.Array, copy: Any, returned: Any, own: Own) -> tuple[jax.Array, jax.Array]:
        update: Any = flatten_dict(jax.tree.map(jnp.subtract, returned, copy))
        flat = jnp.concatenate([jnp.ravel(update[path]) for path in bare])
        return flat / jnp.linalg.norm(flat), sharpness(key, experiment, copy, own)

    def one(key: Any, state: Any) -> Any:
        after, info = noisefl.step(key, state, data, experiment, observe)
        return after, info.observed, info.members.groups, info.issue, info.finite

    root, step = keys.root(seed), jax.jit(one)
    rate = float(experiment.local.optimizer.learning_rate)  # pyright: ignore
    on_test, rows = experiment.replace(accuracy_on="test").judge(data), []
    state = noisefl.init(root, experiment, data)
    for _ in range(rounds + 1):
        state, (directions, sharp), groups, issue, finite = step(root, state)
        if int(state.round) == 1:  # of warm-up
            continue
        same, other = cosines(np.asarray(directions), np.asarray(groups))
        row = {
            "layers": layers, "seed": seed, "round": int(state.round), "same_group": same,
            "other_group": other, "rate_sharpness": rate * float(np.median(sharp)),
            "broken": float(np.mean(~np.isfinite(np.asarray(directions)).all(axis=1))),
            "owner": float(on_test.accuracy(state.owner)) if finite else math.nan,
            "r": float(issue.relative_strength),
        }  # fmt: skip
        rows.append({n: None if v != v else v for n, v in row.items()})
        if not finite:
            break
    return rows


def cosines(directions: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Mean cosine of two clients' updates, of the same group and of different ones; NaN where there
    are no two that are finite.

    Args:
      directions: float32 [M, P], of length 1.
      groups: int32 [M].
    """
    finite = np.isfinite(directions).all(axis=1)
    directions, groups = directions[finite], groups[finite]
    found = directions @ directions.T
    same = groups[:, None] == groups
    two = ~np.eye(len(groups), dtype=bool)
    each = [found[same & two], found[~same]]
    one, other = (float(pairs.mean()) if pairs.size else math.nan for pairs in each)
    return one, other


def sharpness(key: jax.Array, experiment: Experiment, params: Any, own: Own) -> jax.Array:
    """Largest eigenvalue of the Hessian of a client's mean loss, float32 []: power method."""
    rows = own.rows[: min(IMAGES, own.rows.shape[0])]
    images, labels = evaluate.scale(own.images[rows]), own.labels[rows]

    def loss(params: Any) -> jax.Array:
        logits = experiment.functions.apply(params, images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def times(vector: Any) -> Any:
        # Twice in reverse: the layers' own rules for gradients have no forward mode.
        return jax.grad(lambda at: optax.tree.vdot(jax.grad(loss)(at), vector))(params)

    def again(_: int, vector: Any) -> Any:
        found = times(vector)
        size = optax.tree.norm(found)
        return jax.tree.map(lambda leaf: leaf / jnp.maximum(size, 1e-30), found)

    begin = optax.tree.random_like(key, params)
    vector = lax.fori_loop(0, ITERATIONS, again, begin)
    return jnp.divide(optax.tree.vdot(vector, times(vector)), optax.tree.vdot(vector, vector))


def line(layers: str, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Of the table: means over rounds and seeds, of the owner the last round of each seed."""
    last = [[row for row in rows if row["seed"] == seed][-1] for seed in {r["seed"] for r in rows}]

    def mean(name: str, of: list[dict[str, Any]] = rows, form: str = ".2f") -> str:
        known = [row[name] for row in of if row[name] is not None]
        return f"{np.mean(known):{form}}" if known else "–"

    broke = f"{sum(row['owner'] is None for row in last)} of {len(last)}"
    return {
        "noise on": layers,
        "r": mean("r", form=".1f"),
        "cosine, same group": mean("same_group"),
        "cosine, other group": mean("other_group"),
        "η λ_max at the copy, median client": mean("rate_sharpness", form=".1f"),
        "clients whose model broke": mean("broken"),
        "runs that broke": broke,
        "owner": mean("owner", last, ".3f"),
    }


if __name__ == "__main__":
    end(main)
