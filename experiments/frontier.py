"""`python -m experiments.frontier`: what schemes protect, from which thieves, and at what price.

Runs schemes x strengths x data sets x models x partitions x populations x seeds as one sweep of
`experiments.run`, with its lanes, its store and its way of going on after any kill, and then reads
off what every thief made of every view. Leaves frontier.csv, frontier.parquet, frontier.md and
frontier-*.png beside the runs, and with --html frontier.html, which has them all in one file. What
is no flag of its own is one of the driver's: --cpu_devices=2, --dry_run, … With --merge it runs
nothing and makes the files anew from several frontier.csv: of other schemes, seeds, models,
machines.
"""

import dataclasses
import functools
import itertools
import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import run
from experiments.command import complain, end
from experiments.flags.grid import MOST, parse_axis
from experiments.report import frontier as reported
from experiments.report import page
from experiments.sweep import hosts
from experiments.sweep.options import CommandLine, find_file, named, parse, read_file
from experiments.sweep.plan import plan
from noisefl.errors import nearest, refuse


@dataclasses.dataclass(frozen=True)
class Curve:
    """A scheme along its strength.

    Attributes:
      flags: of the driver.
      strength: the flag along which it goes; empty of a scheme that has none.
      values: of that flag, from weak to strong.
    """

    flags: dict[str, str]
    strength: str = "cap"
    values: tuple[str, ...] = ("0.8", "0.6", "0.4")


LAST = {"noise_layers": "last", "noise_scale": "relative"}
FIRST = {"noise_layers": "first", "noise_scale": "relative"}
ALL = {"noise_layers": "all", "noise_scale": "relative"}
OWN = {  # as in the preset `two_way`, with any calibrator's own settings
    "scheme": "noised", "signs": "same", "cancellation": "subtract", "damping": "0.5",
    "server_clients": "4m", **LAST,
}  # fmt: skip
FROM_THE_START = {"warmup_rounds": "0"}  # the initial head would give away the last one
SEQUENTIAL = {"calibrator": "sequential", "strength": "0.5"}
CURVES = {
    "pair": Curve({"scheme": "noised", "own": "absent", **LAST}),
    "pair-first": Curve({"scheme": "noised", "own": "absent", **FIRST}),
    "pair-all": Curve({"scheme": "noised", "own": "absent", **ALL}),
    "own-fresh": Curve({**OWN, "own": "fresh", "common": "0"}),
    "own-sticky": Curve({**OWN, "own": "sticky", "common": "0"}),
    "two-way": Curve({**OWN, "own": "sticky", "common": "0.5"}),
    "released": Curve({"scheme": "released"}),
    "few-weights": Curve({"scheme": "few_weights"}),
    "quantised": Curve({"scheme": "quantised", **SEQUENTIAL}),
    "sub-model-sticky": Curve({"scheme": "sub_model", "units": "sticky", **SEQUENTIAL}),
    "sub-model-rolling": Curve({"scheme": "sub_model", "units": "rolling", **SEQUENTIAL}),
    "withheld": Curve({"scheme": "withheld", **FROM_THE_START}, "withheld_layers", ("1", "2")),
    "own-classes": Curve(
        {"scheme": "own_classes", **FROM_THE_START}, "least_share", ("0", "0.05", "0.1")
    ),
    "statistics": Curve({"scheme": "statistics"}, ""),
}
PARTITIONS = {
    "iid": {"partition": "iid"},
    "dirichlet": {"partition": "dirichlet", "dirichlet_alpha": "0.3"},
    "shards": {"partition": "shards"},
}
FLAGS = {  # of the driver: what a run of every curve is repeated for
    "datasets": "dataset", "models": "model", "clients": "num_clients",
    "server_images": "validation_size", "seeds": "seed",
}  # fmt: skip
FULL: dict[str, Any] = {
    "schemes": list(CURVES),
    "strengths": 3,
    "datasets": [],
    "models": [],
    "partitions": list(PARTITIONS),
    "clients": ["100", "1000"],
    "server_images": ["5000"],
    "seeds": ["0:5"],
    "rounds": 60,
    "attacks": "all",
    "singles": 3,
    "coalitions": "2+5+10",
    "copies": 8,
    "thief_images": 2000,
}
QUICK = {
    **FULL,
    "schemes": ["pair", "two-way", "few-weights"],
    "strengths": 1,
    "partitions": ["iid", "shards"],
    "clients": ["100"],
    "seeds": ["0"],
    "rounds": 6,
    "attacks": "bare_copy+scratch+fine_tune+ridge+average+average_then_tune",
    "singles": 1,
    "coalitions": "2",
    "copies": 1,
}
HELP = {
    "schemes": "curves",
    "strengths": "of each curve: 1 takes the one in the middle",
    "datasets": "names or paths instead of --dataset",
    "models": "names instead of --model",
    "partitions": "of the training images",
    "clients": "populations, K",
    "server_images": "sizes of the server's labelled split",
    "seeds": "of the runs, or start:stop",
    "rounds": "of each run",
    "attacks": "few, all, or names joined by +",
    "singles": "single thieves",
    "coalitions": "members of each, joined by +",
    "copies": "newest rounds of a view",
    "thief_images": "test images for thieves; 0: all",
}

OWN_FLAGS = (*FULL, "quick", "json", "html", "merge")


def main(argv: list[str]) -> int:
    """Runs one command line; returns the exit code, as `experiments.run` does."""
    typed = shlex.join(["python", "-m", "experiments.frontier", *argv[1:]])
    again = f"go on with: {typed}"
    try:
        given, rest = options(argv)
        if given is None:
            return 0
        if given["merge"]:
            return merge(given, rest, typed)
        command = points(given, rest)
        if command is None:
            return 0
        command.driver.start_devices()
        code = run.run(command, again)
        if code or command.driver.dry_run or not hosts.first():
            return code
        out = Path(command.out)
        wanted = page_of(given, typed, [out])
        found = reported.write(out, names(command), given["strength_names"], wanted)
        if given["json"]:
            Path(given["json"]).write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        return 0
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        complain(str(error), "experiments.frontier")
        return 2
    except KeyboardInterrupt:
        complain(f"interrupted; {again}", "experiments.frontier")
        return 130


def page_of(given: dict[str, Any], typed: str, sources: Sequence[Path]) -> reported.Page | None:
    """Of frontier.html, where it is asked for; `typed`: the command line."""
    if not given["html"]:
        return None
    return functools.partial(page.of_frontier, command=typed, sources=sources)


def merge(given: dict[str, Any], rest: Sequence[str], typed: str) -> int:
    """Of files that were made before; runs nothing."""
    if rest:
        raise refuse("merge", ",".join(given["merge"]), f"runs nothing: {rest[0]} is of no use")
    out = Path(given["out"])
    for file in given["merge"]:
        if Path(file).resolve() == (out / "frontier.csv").resolve():
            raise refuse("out", str(out), f"must not be where {file} is: it would be replaced")
    frame = reported.merged(given["merge"])
    out.mkdir(parents=True, exist_ok=True)
    reported.publish(out, frame, page_of(given, typed, [Path(file) for file in given["merge"]]))
    if given["json"]:
        frame.to_json(given["json"], orient="records", indent=1)
    return 0


def options(argv: list[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """Its own flags by name, with those that follow from --quick, and the driver's.

    Raises:
      ValueError: one line about the first that is wrong.
    """
    values = flags.FlagValues()
    kinds = {list: flags.DEFINE_list, int: flags.DEFINE_integer, str: flags.DEFINE_string}
    for name, default in FULL.items():
        shown = ",".join(default) if isinstance(default, list) else default
        kinds[type(default)](name, None, f"{HELP[name]}; {shown}", flag_values=values)
    flags.DEFINE_bool("quick", False, "three schemes, five thieves, one seed", flag_values=values)
    flags.DEFINE_string("json", "", "file for all figures, one object each", flag_values=values)
    flags.DEFINE_string("out", "", "folder of the results", flag_values=values)
    flags.DEFINE_bool("html", False, "one page with everything in it", flag_values=values)
    flags.DEFINE_list("merge", [], "frontier.csv files: one table of all", flag_values=values)
    flags.DEFINE_bool("help", False, "this page", flag_values=values)
    files, argv = named("flagfile", argv)  # as the driver reads them, and absl does not
    own_words = [word for file in files for word in read_file(find_file(file))]
    argv = [argv[0], *own_words, *argv[1:]]
    try:
        rest = values(argv, known_only=True)[1:]
    except flags.Error as error:
        wrong = re.match(r"flag --(\w+)=(.*?): invalid literal", str(error))
        if wrong is None:
            raise ValueError(" ".join(str(error).split())) from None
        raise refuse(wrong[1], wrong[2], "must be a whole number") from None
    if values["help"].value:
        print(f"{__doc__}\n{values.get_help()}\nThe driver's: python -m experiments.run --help")
        return None, rest
    base = QUICK if values["quick"].value else FULL
    found: dict[str, Any] = {
        name: base[name] if values[name].value is None else values[name].value for name in FULL
    }
    for name, known in (("schemes", CURVES), ("partitions", PARTITIONS)):
        for one in found[name]:
            if one not in known:
                raise refuse(name, one, nearest(one, list(known)))
    if not 1 <= found["strengths"] <= 3:
        raise refuse("strengths", found["strengths"], "must be 1 to 3")
    if values["json"].value:
        try:
            Path(values["json"].value).touch()
        except OSError as error:
            allowed = f"cannot be written ({error.strerror})"
            raise refuse("json", values["json"].value, allowed) from None
    for name in ("schemes", "partitions", "clients", "server_images", "seeds"):
        if not found[name]:
            raise refuse(name, "", "must name at least one")
    name = "-merged" if values["merge"].value else "-quick" if base is QUICK else ""
    out = values["out"].value or f"results/frontier{name}"
    own = {name: values[name].value for name in ("json", "html", "merge")}
    return {**found, **own, "out": out, "strength_names": {}}, rest


def points(given: dict[str, Any], rest: Sequence[str]) -> CommandLine | None:
    """The command line of the sweep, its grid a list of points instead of a product.

    Raises:
      ValueError: one line about a flag of the driver's.
    """
    command = parse([
        "frontier", f"--rounds={given['rounds']}", f"--out={given['out']}", "--thieves=thieves",
        f"--attacks={given['attacks']}", f"--coalitions={given['coalitions']}",
        f"--singles={given['singles']}", f"--kept_copies={given['copies']}",
        f"--thief_images={given['thief_images']}", f"--every={given['rounds']}",
        "--local_test_size=1", *rest,
    ], beside=OWN_FLAGS)  # fmt: skip
    if command is None:
        return None
    if command.axes:
        allowed = "the frontier's grid is --schemes, --partitions, --clients, --seeds, …"
        raise refuse("grid", command.axes[0].flag, allowed)
    for name in ("datasets", "models"):
        twice = [each for each in rest if given[name] and each.startswith(f"--{FLAGS[name]}=")]
        if twice:
            raise refuse(name, ",".join(given[name]), f"say that, or {twice[0]}")
    varied = {
        flag: parse_axis(f"{flag}={','.join(given[name])}", command.known, {}).values
        for name, flag in FLAGS.items()
        if given[name]
    }
    curves = sum(len(chosen(CURVES[name], given["strengths"])) for name in given["schemes"])
    sizes = [curves, len(given["partitions"]), *map(len, varied.values())]
    if math.prod(sizes) > MOST:
        raise refuse("grid", f"{math.prod(sizes)} points", f"must be at most {MOST}")
    found: list[dict[str, Any]] = []
    for name in given["schemes"]:
        curve = CURVES[name]
        given["strength_names"][name] = curve.strength
        for value in chosen(curve, given["strengths"]):
            own = {**curve.flags, **({curve.strength: value} if curve.strength else {})}
            for partition, *numbers in itertools.product(given["partitions"], *varied.values()):
                texts = {**own, **PARTITIONS[partition]}
                point = {flag: command.known[flag].parse(text) for flag, text in texts.items()}
                found.append({**point, **dict(zip(varied, numbers, strict=True))})
    return command.at(found)


def chosen(curve: Curve, number: int) -> tuple[str, ...]:
    """That many strengths of a curve: of three the one in the middle first."""
    if not curve.strength:
        return ("",)
    if number == 1 and len(curve.values) == 3:
        return curve.values[1:2]
    return curve.values[:number]


def names(command: CommandLine) -> dict[str, tuple[str, Any]]:
    """The curve and its strength, by the path of a run."""
    found = {}
    for one in plan(command):
        if one.kind == "fedavg":
            continue
        for name, curve in CURVES.items():
            texts = {flag: command.known[flag].parse(text) for flag, text in curve.flags.items()}
            if all(one.grid.get(flag, None) == value for flag, value in texts.items()):
                value = one.grid.get(curve.strength) if curve.strength else None
                found[one.path] = name, value
    return found


if __name__ == "__main__":
    end(main)
