"""Command lines as nobody should write them, and some that are right."""

import os
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from sweep_folder import fedavg_row, noise_row, single_run, summary

from experiments import frontier
from experiments.flags.fields import Flag, is_wrapper
from experiments.sweep import options
from noisefl.models import MODELS
from noisefl.parts import specs

KNOWN = options.catalogue(options.preset_of("quickstart"))
THERE = [  # flags that the quickstart's run has
    flag
    for flag in KNOWN.values()
    if flag.name in options.CommandLine(
        options.Driver(), (), {}, "quickstart", options.preset_of("quickstart"), KNOWN
    ).setup({}).flags or flag.path[0] in specs(options.Driver)
]  # fmt: skip

NUMBERS = [
    *("0", "1", "2", "7", "0.5", "-1", "-0", "1e-50", "1e39", "1e400", "-1e400", "nan", "inf"),
    *("-inf", "+3", "1_0", "１２", "½", "0x10", "1e", "1.", ".", "--", "3.7", "1,5", "0:3", "3:0"),
    *(str(2**31 - 1), str(2**31), str(-(2**31)), str(2**63), "9" * 400, "9" * 5000),
]
WORDS = [
    *("", " ", "none", "None", "auto", "true", "TRUE", "f", "all", "first", "last", "few", "m"),
    *("m/2", "4m", "m/0", "999999999999m", "2+3", "1+1", "(", "[a-", "conv.*", "(a+)+$", "m\n",
    "'"),
    *("\0", "\udcff", "\u2028", "naïve", "\x1b[31m", "%s", "{}", "=", "+", "a+b+c",
    "warmup+warmup"),
]  # fmt: skip
# In a folder that `lay_out` makes. None begins with a slash where something could be made.
PATHS = [
    *("", ".", "..", "file", "folder", "file/below", "folder/below/below", "loop", "dangling"),
    *("pipe", "mine.flags", "other.flags", "bytes.flags", "itself.flags", "run", "sweep", "~"),
    *(
        "/dev/null",
        "/dev/null/below",
        "/proc/1/below",
        "~no_such_user/below",
        "a" * 300,
        "b/" * 3000,
    ),
    *("nul\0", "\udcff", "spaced name", "new\nline", "$HOME", "-", "x.npz", "./x", "done"),
]
RESULTS = {  # of drivers that a folder may hold
    "run/config.json": '{"options": {"rounds": 4}, "runs": {"fedavg": {}, "noise": {}}}',
    "sweep/sweep.json": '{"grid": {}, "options": {}, "runs": {}}',
}
# Presets that can be imported; some return no experiment, or cannot be called as they are.
FUNCTIONS = [
    *("noisefl.presets:quickstart", "noisefl:Experiment", "noisefl:fedavg", "noisefl.presets:"),
    *("json:dumps", "math:pi", "math:sqrt", ":x", ".:x", "..a:x", "a.:x", "no.such:x", "json:a.b"),
    *("broken:experiment", "broken_too:experiment", "file:experiment", "noisefl.presets:Cohort"),
]
MODULES = {
    "broken.py": "def experiment(:\n",
    "broken_too.py": "import math\nmath.nothing\n",
}


def lay_out(folder: Path, flag_files: dict[str, str]) -> Path:
    """The folder to stand in, beside others; `PATHS` are in it."""
    here = folder / "here"
    (here / "folder").mkdir(parents=True)
    (here / "file").write_text("kept\n")
    (folder / "beside").write_text("kept as well\n")
    (here / "loop").symlink_to("loop")
    (here / "dangling").symlink_to("nowhere")
    os.mkfifo(here / "pipe")
    (here / "bytes.flags").write_bytes(b"--cap=0.5\xff\n")
    (here / "itself.flags").write_text("--flagfile=itself.flags\n")
    owner = summary(0.8, baseline_accuracy_final=0.9, baseline_failed=None)
    single_run(here / "done", [fedavg_row(1, 0.9), noise_row(1, 0.8, 0.3, 0.4)], owner)
    for name, text in {**RESULTS, **MODULES, **flag_files}.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(text, "utf-8", "surrogateescape")
    return here


# Without a slash: what is written into the file system stays in the folder of the case.
texts = st.text(st.characters(exclude_characters="/\\", codec="utf-8"), max_size=12)


@st.composite
def mutated(draw: st.DrawFn, words: st.SearchStrategy[str]) -> str:
    """A word with one slip of the pen."""
    word = draw(words)
    at = draw(st.integers(0, max(len(word) - 1, 0)))
    slip = draw(st.sampled_from(["out", "twice", "swapped", "other", "upper", "dash", "space"]))
    return {
        "out": word[:at] + word[at + 1 :],
        "twice": word[: at + 1] + word[at:],
        "swapped": word[:at] + word[at + 1 : at + 2] + word[at : at + 1] + word[at + 2 :],
        "other": word[:at] + draw(st.sampled_from("aez0._=+ü")) + word[at + 1 :],
        "upper": word.upper(),
        "dash": word.replace("_", "-"),
        "space": f" {word} ",
    }[slip]


def right(flag: Flag) -> st.SearchStrategy[str]:
    """Values that it may have, as far as the flag alone says."""
    spec = flag.spec
    if flag.kinds:
        around = [name for name, cls in flag.classes.items() if is_wrapper(cls)]
        last = st.sampled_from(flag.choices or ("none",))
        return st.tuples(st.lists(st.sampled_from(around), max_size=2), last).map(
            lambda chain: "+".join([*chain[0], chain[1]])
        ) if around else last  # fmt: skip
    if spec.choices:
        return st.sampled_from(spec.choices)
    if spec.kind == "switch":
        return st.sampled_from(["true", "false"])
    if flag.whole:
        low = int(max(spec.low, -5))
        return st.integers(low, int(min(spec.high, low + 6))).map(str)
    if spec.kind == "number":
        low, high = max(spec.low, -3.0), min(spec.high, 3.0)
        return st.floats(low, max(low, high), width=32).map(str)
    return st.sampled_from({
        "dataset": ["mnist", "x.npz"], "preset": ["quickstart", "literal", *FUNCTIONS],
        "out": ["out", "out/below"], "attacks": ["few", "all", "scratch+bare_copy"],
        "coalitions": ["2", "2+5", ""], "noise_layers": ["first", "last", "all", "dense.*"],
        "server_clients": ["m", "4m", "m/2", "3"], "coordinator": ["here:1", ""],
    }.get(flag.name, ["", "auto", "off"]))  # fmt: skip


def near_bounds(flag: Flag) -> list[str]:
    spec, found = flag.spec, []
    for bound in (spec.low, spec.high):
        if np.isfinite(bound):
            around = [bound, bound - 1, bound + 1]
            if not flag.whole:
                around += [np.nextafter(np.float32(bound), np.float32(way)) for way in (-9e9, 9e9)]
            found += [str(int(one) if flag.whole else float(one)) for one in around]
    return found


def wrong(flag: Flag) -> st.SearchStrategy[str]:
    """Values that it may hardly have."""
    strange = [*NUMBERS, *WORDS, *PATHS, *near_bounds(flag)]
    kinds = [st.sampled_from(strange), mutated(right(flag)), texts]
    if flag.choices:
        chain = st.lists(st.sampled_from([*flag.choices, "none", "x"]), min_size=2, max_size=4)
        kinds.append(chain.map("+".join))
    return st.one_of(kinds)


any_flag = st.integers(0, 4).flatmap(
    lambda n: st.sampled_from(THERE if n else list(KNOWN.values()))
)


@st.composite
def axes(draw: st.DrawFn) -> str:
    """Of --grid."""
    flag = draw(any_flag)
    name = draw(st.sampled_from([flag.name, ".".join(flag.path)]))
    if draw(st.integers(0, 9)) == 0:
        name = draw(mutated(st.just(name)) | texts)
    ends = st.integers(-3, 12) | st.sampled_from([2**31, -(2**31), 10**30, 20_001, 10**6])
    ranges = st.lists(ends.map(str), min_size=2, max_size=4).map(":".join)
    value = right(flag) | (ranges if flag.whole else right(flag))
    if draw(st.integers(0, 3)) == 0:
        value |= wrong(flag)
    listed = ",".join(draw(st.lists(value, min_size=1, max_size=4, unique=True)))
    return draw(st.sampled_from([f"{name}={listed}"] * 9 + [name, f"{name}=", f"={listed}", ""]))


@st.composite
def words(draw: st.DrawFn) -> list[str]:
    """One flag as the words of a command line; of six one is hardly right."""
    flag = draw(any_flag)
    if flag.name == "grid" or draw(st.integers(0, 5)) == 0:
        return [f"--grid={draw(axes())}"]
    name = draw(st.sampled_from([flag.name, ".".join(flag.path)]))
    if draw(st.integers(0, 5)):
        return [f"--{name}={draw(right(flag))}"]
    value = draw(wrong(flag))
    if draw(st.integers(0, 2)) == 0:
        name = draw(mutated(st.just(name)) | texts | st.sampled_from(["flagfile", "undefok"]))
    forms = [
        [f"--{name}={value}"], [f"--{name}={value}"], [f"--{name}={value}"], [f"-{name}={value}"],
        [f"--{name}", value], [f"--{name}"], [f"--no{name}"], [f"--no{name}={value}"], [value],
        [f"---{name}={value}"], ["--", f"--{name}={value}"], [f"--{name}={value}"] * 2, ["-"],
    ]  # fmt: skip
    return draw(st.sampled_from(forms))


@st.composite
def flag_files(draw: st.DrawFn) -> dict[str, str]:
    """Two files of flags, by name."""
    lines = st.lists(words().map(" ".join) | texts | st.sampled_from(["# mine", "", "'", "\\"]))
    names = ("mine.flags", "other.flags")
    found = {name: "\n".join(draw(lines)) for name in names}
    if draw(st.booleans()):
        found["mine.flags"] += "\n--flagfile=other.flags"
    return found


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[list[str], dict[str, str]]:
    """Of experiments.run, and the flag files beside."""
    args = [word for some in draw(st.lists(words(), max_size=5)) for word in some]
    if draw(st.booleans()):
        args.append(f"--out={draw(st.sampled_from(PATHS))}")
    if draw(st.integers(0, 2)):
        return args, {}
    files = draw(flag_files())
    named = draw(st.sampled_from([*files, *files, *options.file_names(), *PATHS]))
    form = draw(st.sampled_from([[f"--flagfile={named}"], ["--flagfile", named], ["--flagfile"]]))
    at = draw(st.integers(0, len(args)))
    return [*args[:at], *form, *args[at:]], files


# The frontier's own flags: numbers, and lists of words or of numbers.
LISTS = {
    "schemes": list(frontier.CURVES), "partitions": list(frontier.PARTITIONS),
    "datasets": ["mnist", "x.npz"], "models": list(MODELS), "clients": ["6", "8"],
    "server_images": ["60", "90"], "seeds": ["0", "1:3", "3", "5:2"],
}  # fmt: skip
OWN = [*frontier.FULL, "json", "merge", "out", "quick", "help"]


@st.composite
def frontier_lines(draw: st.DrawFn) -> list[str]:
    """Of experiments.frontier."""
    args = ["--quick"] if draw(st.integers(0, 3)) else []
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.integers(0, 2)) == 0:
            # Its flag files are absl's own, which warns where one names itself.
            args += [word for word in draw(words()) if "flagfile" not in word]
            continue
        name = draw(st.sampled_from(OWN))
        strange = st.sampled_from([*NUMBERS, *WORDS, *PATHS]) | texts
        if name in LISTS:
            strange |= mutated(st.sampled_from(LISTS[name]))
            some = st.sampled_from(LISTS[name])
            value = ",".join(draw(st.lists(some | some | some | strange, max_size=3)))
        else:
            value = draw(st.sampled_from(["1", "2", "3", "few", "2+5"]) | strange)
        if draw(st.integers(0, 9)) == 0:
            name = draw(mutated(st.just(name)))
        args += draw(st.sampled_from([[f"--{name}={value}"]] * 5 + [[f"--{name}", value]]))
    return args


@st.composite
def folder_lines(draw: st.DrawFn, flag: str) -> list[str]:
    """Of the two drivers that read folders, and have one flag."""
    args = draw(st.sampled_from([["done"]] * 4 + [["done", "done"], []]))
    if draw(st.booleans()):
        args = draw(st.lists(st.sampled_from([*PATHS, "done", "done"]) | texts, max_size=3))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        name = draw(st.sampled_from([flag] * 5) | mutated(st.just(flag)))
        value = draw(st.sampled_from(["new.png", "new", *PATHS, *WORDS]) | texts)
        forms = [[f"--{name}={value}"]] * 4 + [[f"--{name}", value], [f"--{name}"], ["--", value]]
        args += draw(st.sampled_from(forms))
    return args
