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

_OUT = flags.DEFINE_string("out", "results/readings", "folder of the study")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "seeds, comma-separated")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "rounds of each run")
_ONLY = flags.DEFINE_list("only", None, "names of the readings to run; all if not given")

# The literal loop takes up to 60 tries a round. All other rows raise σ by a factor and measure it
# in units of the layer's RMS, the cheapest honest loop: every pair that ships has been evaluated.
CHEAP = (
    "--noise_scale=relative",
    "--calibrator=geometric",
    "--strength=0.5",
    "--strength_factor=1.2",
    "--strength_max=20",
    "--max_tries=40",
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
    "groups reweighted": (*CHEAP, "--cancellation=reweight"),
    "next base = G": (*CHEAP, "--next_base=owner"),
    "no server-side clients": (*CHEAP, "--server_clients=0"),
    "m server-side clients": (*CHEAP, "--server_clients=m"),
    "4m server-side clients": (*CHEAP, "--server_clients=4m"),
    "keep-best": (*CHEAP, "--keep_best"),
    "gradient clipping 1": (*CHEAP, "--clip_norm=1"),
    "learning rate x 0.9 a round": (*CHEAP, "--learning_rate_decay=0.9"),
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
    """A line of the table over the seeds; a run that broke down is said, not averaged."""
    files = [folder / "summary.json" for folder in folders]
    done = [json.loads(file.read_text()) for file in files if file.exists()]
    if len(done) < len(folders):
        return [name, f"{len(folders) - len(done)} of {len(folders)} runs broke down"] + [""] * 7
    tries = [
        record["calibration_tries"]
        for folder in folders
        for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if record["protected"]
    ]

    def spread(key: str) -> str:
        each = ", ".join(f"{s[key]:.3f}" for s in done)
        return f"{mean(s[key] for s in done):.3f} ({each})"

    def count(key: str) -> str:
        return f"{sum(s[key] for s in done)}/{sum(s['protected_rounds'] for s in done)}"

    return [
        name,
        spread("owner_accuracy_final"),
        spread("baseline_accuracy_final"),
        f"{100 * mean(s['gap_final'] for s in done):.1f}",
        count("rounds_over_cap_test"),
        count("infeasible_rounds"),
        f"{sum(s['collapsed'] for s in done)}/{len(done)}",
        f"{mean(s['local_accuracy_mean'] or 0 for s in done):.3f}",
        f"{mean(tries):.1f}",
    ]


if __name__ == "__main__":
    app.run(main)
