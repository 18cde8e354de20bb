"""The help page of the driver: what each flag means, its unit, range and default, in groups."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.flags.fields import Flag, Path, is_wrapper, plain, shown
from noisefl.parts import LARGEST, Part, Spec, defaults, name_of, specs

WIDTH, LEAST = 100, 60
COLUMN = 34


def page(
    known: Mapping[str, Flag], roots: Sequence[tuple[Path, Part]], tree: Mapping[Path, Any],
    files: Sequence[str], read: Sequence[str], width: int = WIDTH,
) -> str:  # fmt: skip
    """The page, as wide as a terminal, but at least `LEAST` and at most `WIDTH` columns.

    Args:
      known: all flags by name.
      roots: the trees of parts, each with the path of its root.
      tree: what they hold, by path: the values without another flag.
      files: names of the flag files.
      read: names of those that were read.
      width: of the terminal.
    """
    width = min(max(width, LEAST), WIDTH)
    titles = {
        **{path[0]: _sentence(root) for path, root in roots if path},
        **{
            name: spec.help
            for path, root in roots
            for name, spec in specs(type(root)).items()
            if not path and spec.kind == "child"
        },
    }
    groups: dict[str, list[str]] = {}
    for flag in known.values():
        first = flag.path[0]
        whole = f"{first}: {titles[first]}" if first in titles else name_of(flag.owners[0])
        groups.setdefault(whole, []).extend(_entry(flag, known, tree, width))
    paragraphs = [
        "python -m experiments.run [--flagfile=FILE] [--FLAG=VALUE …] [--grid=FLAG=VALUE,VALUE …]",
        "Trains FedAvg and a scheme that protects the model, side by side; with --grid many runs.",
        "",
        f"Flag files, read first: {', '.join(files)}, or one of yours. "
        f"Values are those of {', '.join(read)}.",
        "A flag is called by its path as well: --scheme.calibrator.cap=0.5 is --cap=0.5.",
        "A part named where others are goes around them if it can (+), else it takes their place; "
        "a+b+c names all of them, the outermost first.",
    ]
    lines = [line for one in paragraphs for line in textwrap.wrap(one, width) or [""]]
    for title, entries in groups.items():
        lines += ["", *textwrap.wrap(title, width), *entries]
    return "\n".join(lines)


def _entry(
    flag: Flag, known: Mapping[str, Flag], tree: Mapping[Path, Any], width: int
) -> list[str]:
    spec, inside = flag.spec, [*_range(flag.spec)]
    if flag.kinds:
        wraps = {name: is_wrapper(cls) for name, cls in flag.classes.items()}
        inside = [" | ".join(name for name in wraps if not wraps[name])]
        inside += [" | ".join(f"{name}+" for name in wraps if wraps[name])] * any(wraps.values())
        inside = [", ".join(inside)]
    elif spec.choices:
        inside = [" | ".join(spec.choices)]
    if spec.optional:
        inside.append(f"none: {spec.none}")
    text = spec.help + (f" [{spec.unit}]" if spec.unit else "")
    text += f"; {', '.join(inside)}" if inside else ""
    text += _owners(flag, known)
    default = tree[flag.path] if flag.path in tree else _initial(flag)
    if spec.kind == "switch":
        head = f"  --[no]{flag.name}"
        text += f" (default {'on' if default else 'off'})"
    else:
        head = f"  --{flag.name}={shown(default)}"
    wrapped = textwrap.wrap(text, width - COLUMN, break_on_hyphens=False)
    if len(head) >= COLUMN:
        return [head, *(" " * COLUMN + line for line in wrapped)]
    first, *rest = wrapped
    return [f"{head:<{COLUMN}}{first}", *(" " * COLUMN + line for line in rest)]


def _sentence(part: Part) -> str:
    """The first of its documentation, without its period."""
    summary = " ".join(str(type(part).__doc__).split("\n\n")[0].split())
    return summary.split(". ")[0].rstrip(".")


def _initial(flag: Flag) -> Any:
    """The default of the first class that has it."""
    initial = defaults(flag.owners[0])
    if flag.path[-1] in initial:
        return None if flag.kinds else plain(initial[flag.path[-1]])
    return plain(initial[flag.path[-2]]()[flag.path[-1]])


def _range(spec: Spec) -> list[str]:
    """`> 0`, `≤ 1`."""
    sign = {"(": ">", "[": "≥", ")": "<", "]": "≤"}
    low = [f"{sign[spec.inside[0]]} {spec.low:g}"] if math.isfinite(spec.low) else []
    return low + [f"{sign[spec.inside[1]]} {spec.high:g}"] * (spec.high < LARGEST)


def _owners(flag: Flag, known: Mapping[str, Flag]) -> str:
    """Which of the parts that can stand there have it, if not all."""
    above = [one for one in known.values() if one.kinds and one.path == flag.path[: len(one.path)]]
    above = [one for one in above if one is not flag]
    if not above:
        return ""
    parent = max(above, key=lambda one: len(one.path))
    plain_ones = [name for name, cls in parent.classes.items() if not is_wrapper(cls)]
    have = [name_of(cls) for cls in flag.owners]
    lack = [name for name in plain_ones if name not in have]
    if not lack:
        return ""
    short = f"not of {', '.join(lack)}" if len(lack) < len(have) else f"of {', '.join(have)}"
    return f" ({short})"
