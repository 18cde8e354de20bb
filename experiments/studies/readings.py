"""`python -m experiments.studies.readings`: what each open reading of the source does, as a table.

Runs `experiments.run` once for each reading and seed, each in a folder of its own under `--out`,
then writes `readings.md` there. A second start goes on where the first ended; several processes
may share the work by taking different `--seeds`, and a last one with all seeds makes the table.
"""

import json
import sys
from pathlib import Path
from statistics import mean

from absl import app, flags, logging

from experiments import run
from noisefl.errors import nearest, refuse

_OUT = flags.DEFINE_string("out", "results/readings", "folder of the study")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "seeds, comma-separated")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "rounds of each run", lower_bound=1)
_ONLY = flags.DEFINE_multi_string("only", None, "a reading to run, repeatedly; all if not given")

# The literal loop takes up to 60 tries a round on 5,000 images. All other rows raise σ by a factor,
# measure it in units of the layer's RMS and evaluate on 2,000 images: the cheapest loop that is
# honest, in that every pair that ships has been evaluated.
CHEAP = (
    "--validation_size=2000 --noise_scale=relative --calibrator=geometric --strength=0.5 "
    "--strength_factor=1.2 --strength_max=20 --max_tries=24"
)
READINGS = {
    "literal": "",
    "literal, geometric step": CHEAP,
    "one draw rescaled": f"{CHEAP} --redraw=rescale",
    "kernel only": f"{CHEAP} --noise_parameters=kernel",
    "noise on conv2": f"{CHEAP} --noise_layers=conv2",
    "noise on all layers": f"{CHEAP} --noise_layers=all --strength=0.1",
    "noise on the last layer": f"{CHEAP} --noise_layers=last",
    "noise subtracted": f"{CHEAP} --cancellation=subtract",
    "next base = G": f"{CHEAP} --owner=feeds_back",
    "no server-side clients": f"{CHEAP} --server_clients=0",
    "m server-side clients": f"{CHEAP} --server_clients=m",
    "4m server-side clients": f"{CHEAP} --server_clients=4m",
    "keep-best": f"{CHEAP} --owner=keep_best",
    "gradient clipping 1": f"{CHEAP} --clip_norm=1",
    "learning rate x 0.9 a round": f"{CHEAP} --learning_rate_decay=0.9",
    # The best of the above on the first convolution, put together.
    "rate 0.03, 60 tries": f"{CHEAP} --learning_rate=0.03 --max_tries=60",
    "rate 0.03, 60 tries, keep-best, m server-side": (
        f"{CHEAP} --learning_rate=0.03 --max_tries=60 --owner=keep_best --server_clients=m"
    ),
}


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)  # app.run would show every checkpoint
    lines = []
    for name in _ONLY.value or READINGS:
        if name not in READINGS:
            raise app.UsageError(str(refuse("only", name, nearest(name, list(READINGS)))))
        begin = Path(_OUT.value) / name.replace(" ", "_").replace(",", "")
        folders = {seed: begin / seed for seed in _SEEDS.value}
        for seed, folder in folders.items():
            if code := run.main(["experiments.run", *command(name, seed, folder)]):
                print(f"{folder}: exit code {code}", file=sys.stderr)
        lines.append({"reading": name, **line(list(folders.values()))})
    cells = [lines[0].keys(), ["---"] * len(lines[0]), *(one.values() for one in lines)]
    table = "".join(f"| {' | '.join(row)} |\n" for row in cells)
    (Path(_OUT.value) / "readings.md").write_text(table)
    print(table)


def command(name: str, seed: str, folder: Path) -> list[str]:
    """The flags of one run."""
    own = [f"--seed={seed}", f"--rounds={_ROUNDS.value}", f"--out={folder}"]
    return ["--flagfile=literal", *READINGS[name].split(), *own]


def line(folders: list[Path]) -> dict[str, str]:
    """Of the table, over the complete runs; one that broke down ends there, its owner NaN."""
    folders = [folder for folder in folders if (folder / "summary.json").exists()]
    done = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    rows = [row for f in folders for row in map(json.loads, (f / "metrics.jsonl").open())]
    tries = [row["calibration_tries"] for row in rows if row["protected"]]

    def each(key: str, form: str, factor: float = 1) -> str:
        return ", ".join("–" if s[key] is None else f"{factor * s[key]:{form}}" for s in done)

    def share(key: str) -> str:
        return f"{sum(s[key] for s in done)}/{sum(s['protected_rounds'] for s in done)}"

    return {
        "owner": ", ".join(
            f"NaN in round {s['failed']['round']}" if s["failed"] else
            f"{s['owner_accuracy_final']:.3f}" for s in done
        ),
        "FedAvg": each("baseline_accuracy_final", ".3f"),
        "gap, points": each("gap_final", ".1f", 100),
        "over cap on test": share("rounds_over_cap_test"),
        "infeasible": share("infeasible_rounds"),
        "collapses": f"{sum(s['collapsed'] for s in done)}/{len(done)}",
        "clients' own models": each("local_accuracy_mean", ".3f"),
        "tries a round": f"{mean(tries):.1f}" if tries else "–",
    }  # fmt: skip


if __name__ == "__main__":
    app.run(main)
