"""`python -m experiments.studies.readings`: which readings of the source reproduce its figure.

Eight questions that the source leaves open have 1,440 combinations of answers. The first phase,
`--phase=screen`, runs an eighth of them for a few rounds on a seed of its own: of each layer six
choices of what a program is compiled for, balanced, each with all rates and remedies. The second,
`--phase=settle`, runs what was best for each layer for the source's 30 rounds on other seeds, with
thieves. Both are sweeps of `experiments.run`, with its way of going on; what is no flag of this
study is one of the driver's. Leaves `screen.md` and `settle.md` in the folder of results.
"""

import itertools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import flags

from experiments import run
from experiments.command import complain, end, helped
from experiments.report import frontier as reported
from experiments.sweep.options import CommandLine, parse
from experiments.sweep.plan import plan
from noisefl.errors import refuse

COMPILED = {  # what a program is compiled for
    "noise_layers": ("first", "conv2", "dense1", "last", "all"),
    "noise_scale": ("absolute", "relative"),
    "cancellation": ("pair", "subtract"),
    "owner": ("server_clients", "feeds_back+server_clients"),
    "server_clients": ("0", "m/2", "4m"),
    "local_epochs": ("1", "5"),
}
TRACED = {"learning_rate": ("0.01", "0.03", "0.1"), "damping": ("0", "0.5")}
READINGS = {**COMPILED, **TRACED}
# Of the source; the rule for σ is the one that costs least and vouches for its copies.
SOURCE = [
    "--flagfile=literal", "--calibrator=predictive", "--strength=1", "--strength_max=100",
]  # fmt: skip
PHASES: dict[str, dict[str, Any]] = {
    "screen": {"seeds": [100], "rounds": 10, "thieves": ["--thieves=none"]},
    "settle": {"seeds": [0, 1, 2, 3, 4], "rounds": 30, "thieves": [
        "--thieves=thieves", "--attacks=few", "--singles=1", "--coalitions=2", "--kept_copies=1",
    ]},
}  # fmt: skip
OF_LAYER = 6  # choices of what a program is compiled for, of each layer
KEPT = 2  # readings of each layer that are settled
CLOSE = 0.01  # "about as good as FedAvg": Figure 1 of the source
NEAR = 0.03  # of ten rounds


def main(argv: list[str]) -> int:
    """Runs one command line; returns the exit code, as `experiments.run` does."""
    name = "experiments.studies.readings"
    again = "go on with: " + shlex.join(["python", "-m", name, *argv[1:]])
    try:
        given = options(argv)
        if given is None:
            return 0
        phase, out, rest = given
        here = out / phase
        chosen = screened(out) if phase == "settle" else fraction()
        command = planned(phase, chosen, here, rest)
        if command is None:
            return 0
        command.driver.start_devices()
        code = run.run(command, again)
        if code or command.driver.dry_run:
            return code
        text = settled(here, command) if phase == "settle" else effects(results(here))
        (out / f"{phase}.md").write_text(text)
        print(text)
        return 0
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        complain(str(error), name)
        return 2
    except KeyboardInterrupt:
        complain(f"interrupted; {again}", name)
        return 130


def options(argv: list[str]) -> tuple[str, Path, list[str]] | None:
    """Phase, folder and the driver's flags; None after --help. Raises ValueError about a flag that
    is wrong."""
    values = flags.FlagValues()
    flags.DEFINE_enum("phase", "screen", list(PHASES), "of the study", flag_values=values)
    flags.DEFINE_string("out", "results/readings", "folder of the study", flag_values=values)
    if helped(argv, __doc__, values):
        return None
    try:
        rest = values(argv, known_only=True)[1:]
    except flags.Error as error:
        raise ValueError(" ".join(str(error).split())) from None
    return str(values["phase"].value), Path(str(values["out"].value)), rest


def fraction() -> list[dict[str, str]]:
    """The readings of the screening, texts by flag: the same ones each time."""
    rng, found = np.random.default_rng(0), []
    for layer in COMPILED["noise_layers"]:
        rows: set[tuple[str, ...]] = set()
        while len(rows) < OF_LAYER:  # two that are the same would be one run
            columns = [rng.permutation(np.tile(levels, OF_LAYER // len(levels))).tolist()
                       for flag, levels in COMPILED.items() if flag != "noise_layers"]  # fmt: skip
            rows = set(zip(*columns, strict=True))
        for values in sorted(rows):
            compiled = dict(zip(COMPILED, (layer, *values), strict=True))
            found += [compiled | dict(zip(TRACED, both, strict=True))
                      for both in itertools.product(*TRACED.values())]  # fmt: skip
    return found


def planned(
    phase: str, readings: Sequence[Mapping[str, str]], out: Path, rest: Sequence[str]
) -> CommandLine | None:
    """The sweep of readings and seeds. Raises ValueError about a flag of the driver's."""
    own = PHASES[phase]
    command = parse([
        "readings", *SOURCE, f"--rounds={own['rounds']}", *own["thieves"], *rest, f"--out={out}",
        f"--every={own['rounds']}",
    ], beside=("phase",))  # fmt: skip
    if command is None:
        return None
    if command.axes:
        raise refuse("grid", command.axes[0].flag, "the study has a grid of its own")
    points = [
        {flag: command.known[flag].parse(text) for flag, text in reading.items()} | {"seed": seed}
        for reading in readings
        for seed in own["seeds"]
    ]
    return command.at(points)


def results(folder: Path) -> pd.DataFrame:
    """Of each run of a sweep: its reading, texts by flag, and what came of it.

    Raises:
      ValueError: the folder holds no complete sweep.
    """

    def summary(path: str) -> dict[str, Any]:
        return json.loads((folder / path / "summary.json").read_text())

    try:
        planned = json.loads((folder / "sweep.json").read_text())["runs"]
        rows = []
        for path, entry in planned.items():
            if entry["run"] == "fedavg":
                continue
            said, bare = summary(path), summary(entry["baseline"])
            reading = {flag: _text(entry["grid"][flag]) for flag in READINGS}
            broke = said["failed"] is not None
            rows.append({
                **reading, "seed": entry["seed"], "path": path, "broke": broke,
                "accuracy": math.nan if broke else said["owner_accuracy_final"],
                "fedavg": bare["owner_accuracy_final"],
                "over": said["rounds_over_cap_test"], "protected": said["protected_rounds"],
                "infeasible": said["infeasible_rounds"],
                "highest": said["shared_accuracy_max_test"],
            })  # fmt: skip
    except (OSError, KeyError) as error:
        raise refuse("out", str(folder), f"holds no complete sweep ({error!r})") from None
    frame = pd.DataFrame(rows)
    frame["gap"] = frame["fedavg"] - frame["accuracy"]
    frame["held"] = (frame["over"] == 0) & (frame["infeasible"] == 0) & ~frame["broke"]
    return frame


def screened(out: Path) -> list[dict[str, str]]:
    """The readings to be settled: of each layer those of the smallest gap, what held the cap before
    what did not, and what broke down last of all."""
    frame, found = results(out / "screen"), []
    for _, group in frame.groupby("noise_layers", sort=False):
        best = group.sort_values(["broke", "held", "gap"], ascending=[True, False, True])
        rows = best[list(READINGS)].head(KEPT).to_numpy().tolist()
        found += [dict(zip(READINGS, row, strict=True)) for row in rows]
    return found


def effects(frame: pd.DataFrame) -> str:
    """What each answer does, in Markdown, over all runs of the screening that have it."""
    lines = [
        "| question | answer | runs | broke down | gap to FedAvg of the others, median, points | "
        "cap held on test in every round | both, within 3 points |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for flag, answers in READINGS.items():
        for answer in answers:
            some = frame[frame[flag] == answer]
            good = some["held"] & (some["gap"] <= NEAR)
            gap = float(np.nanmedian(some["gap"])) if not np.all(some["broke"]) else math.nan
            lines.append(
                f"| {flag} | {answer} | {len(some)} | {some['broke'].mean():.0%} | "
                f"{'–' if math.isnan(gap) else f'{100 * gap:.1f}'} | {some['held'].mean():.0%} | "
                f"{good.sum()} |"
            )
    return "\n".join(lines) + "\n"


def settled(folder: Path, command: CommandLine) -> str:
    """Which readings reproduce Figure 1, and what each protects, in Markdown."""
    frame = results(folder)
    frame["reading"] = [" · ".join(row) for row in frame[list(READINGS)].to_numpy().tolist()]
    label = dict(zip(frame["path"], frame["reading"], strict=True))
    curves = {one.path: (label[one.path], None) for one in plan(command) if one.path in label}
    stolen = pd.DataFrame(reported.rows(folder, curves, dict.fromkeys(frame["reading"], "")))
    best = reported.best_thieves(stolen)
    lines = [
        f"| {' · '.join(READINGS)} | owner, % | FedAvg, % | broke down | rounds over the cap on "
        "test (highest) | infeasible | reproduces | best thief of one copy, λ | of two clients, λ "
        "|",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, some in frame.groupby("reading", sort=False):
        of = best[best["scheme"] == name]
        alone, two = (of[(of["view"] == view) & (of["members"] == c)].iloc[:1].to_dict("records")
                      for view, c in (("V1", 1), ("V3", 2)))  # fmt: skip
        reproduces = bool(some["held"].all() and some["gap"].mean() <= CLOSE)
        lines.append(
            f"| {name} | {_mean(some['accuracy'])} | {_mean(some['fedavg'])} | "
            f"{some['broke'].sum()} of {len(some)} | {some['over'].sum()} of "
            f"{some['protected'].sum()} ({some['highest'].max():.3f}) | "
            f"{some['infeasible'].sum()} | {'yes' if reproduces else 'no'} | "
            f"{_stolen(alone)} | {_stolen(two)} |"
        )
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _mean(column: Any) -> str:
    known = column.dropna()
    return f"{100 * known.mean():.1f} ± {100 * known.std():.1f}" if len(known) > 1 else "–"


def _stolen(best: Sequence[Mapping[Any, Any]]) -> str:
    if not best:
        return "–"
    [one] = best
    ratio = "–" if math.isnan(one["lambda"]) else f"{one['lambda']:.2f}"
    return f"{100 * one['thief_accuracy']:.1f} ({one['thief'].replace('_', ' ')}), {ratio}"


if __name__ == "__main__":
    end(main)
