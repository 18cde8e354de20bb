"""`python -m experiments.study_readings`: what each open reading of the source does, in one table.

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
from experiments.summary import summarise

_OUT = flags.DEFINE_string("out", "results/readings", "folder of the study")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "seeds, comma-separated")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "rounds of each run", lower_bound=1)
_ONLY = flags.DEFINE_multi_string("only", None, "a reading to run, repeatedly; all if not given")

# The literal loop takes up to 60 tries a round on 5,000 images. All other rows raise σ by a factor,
# measure it in units of the layer's RMS and evaluate on 2,000 images: the cheapest loop that is
# honest, in that every pair that ships has been evaluated.
CHEAP = (
    "--validation_size=2000",
    "--noise_scale=relative",
    "--calibrator=geometric",
    "--strength=0.5",
    "--strength_factor=1.2",
    "--strength_max=20",
    "--max_tries=24",
)

READINGS: dict[str, tuple[str, ...]] = {
    "literal": (),
    "literal, geometric step": CHEAP,
    "one draw rescaled": (*CHEAP, "--redraw=rescale"),
    "kernel only": (*CHEAP, "--noise_parameters=kernel"),
    "noise on conv2": (*CHEAP, "--noise_layers=conv2"),
    "noise on all layers": (*CHEAP, "--noise_layers=all", "--strength=0.1"),
    "noise on the last layer": (*CHEAP, "--noise_layers=last"),
    "noise subtracted": (*CHEAP, "--cancellation=subtract"),
    "next base = G": (*CHEAP, "--next_base=owner"),
    "no server-side clients": (*CHEAP, "--server_clients=0"),
    "m server-side clients": (*CHEAP, "--server_clients=m"),
    "4m server-side clients": (*CHEAP, "--server_clients=4m"),
    "keep-best": (*CHEAP, "--keep_best"),
    "gradient clipping 1": (*CHEAP, "--clip_norm=1"),
    "learning rate x 0.9 a round": (*CHEAP, "--learning_rate_decay=0.9"),
    # The best of the above on the first convolution, put together.
    "rate 0.03, 60 tries": (*CHEAP, "--learning_rate=0.03", "--max_tries=60"),
    "rate 0.03, 60 tries, keep-best, m server-side": (
        *CHEAP,
        "--learning_rate=0.03",
        "--max_tries=60",
        "--keep_best",
        "--server_clients=m",
    ),
}

HEADINGS = (
    "reading",
    "owner",
    "FedAvg",
    "gap, points",
    "over cap on test",
    "infeasible",
    "collapses",
    "clients' own models",
    "tries a round",
)


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)  # app.run would show every checkpoint
    out = Path(_OUT.value)
    names = _ONLY.value or list(READINGS)
    if unknown := [name for name in names if name not in READINGS]:
        raise app.UsageError(f"only={unknown[0]!r}: must be among {', '.join(READINGS)}")
    lines = [" | ".join(HEADINGS), " | ".join("---" for _ in HEADINGS)]
    for name in names:
        folders = [out / name.replace(" ", "_").replace(",", "") / seed for seed in _SEEDS.value]
        for folder, seed in zip(folders, _SEEDS.value, strict=True):
            command = ["experiments.run", "--flagfile=literal", *READINGS[name], f"--seed={seed}"]
            command += [f"--rounds={_ROUNDS.value}", f"--out={folder}", "--resume"]
            if code := run.main(command):
                print(f"{folder}: exit code {code}", file=sys.stderr)
        lines.append(" | ".join(row(name, folders)))
    table = "\n".join(f"| {line} |" for line in lines) + "\n"
    (out / "readings.md").write_text(table)
    print(table)


def row(name: str, folders: list[Path]) -> list[str]:
    """A line of the table over the seeds. A run that broke down ends there, with owner NaN."""
    done, tries, owners = [], [], []
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        if not rows or rows[-1]["run"] != "noise":
            return [name, f"{folder} has no noise run", *[""] * (len(HEADINGS) - 2)]
        done.append(summarise(rows, cap=0.6, num_classes=10, timing={}))
        tries += [record["calibration_tries"] for record in rows if record["protected"]]
        last = rows[-1]
        owners.append(
            f"{last['owner_accuracy']:.3f}" if last["finite"] else f"NaN in round {last['round']}"
        )

    def count(key: str) -> str:
        return f"{sum(s[key] for s in done)}/{sum(s['protected_rounds'] for s in done)}"

    return [
        name,
        ", ".join(owners),
        ", ".join(f"{s['baseline_accuracy_final']:.3f}" for s in done),
        ", ".join(f"{100 * s['gap_final']:.1f}" for s in done),
        count("rounds_over_cap_test"),
        count("infeasible_rounds"),
        f"{sum(s['collapsed'] for s in done)}/{len(done)}",
        ", ".join(f"{s['local_accuracy_mean']:.3f}" for s in done),
        f"{mean(tries):.1f}",
    ]


if __name__ == "__main__":
    app.run(main)
