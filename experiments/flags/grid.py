"""`--grid='cap=0.4,0.5' --grid='seed=0:10'` → the combinations of flag values of a sweep."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.flags.fields import Flag, find, hint
from noisefl.errors import refuse
from noisefl.parts import LARGEST

MOST = 20_000  # values on an axis, and combinations: more take minutes to plan; a slip of the pen
RANGE = "a whole number, start:stop or start:stop:step"


@dataclasses.dataclass(frozen=True)
class Axis:
    """One flag and the values it takes in a sweep.

    Attributes:
      flag: its name.
      values: distinct, in the order given; as the flag parses them.
    """

    flag: str
    values: tuple[Any, ...]


def parse_axis(text: str, known: Mapping[str, Flag], whole: Mapping[str, str]) -> Axis:
    """Reads `flag=value,value`; a whole number may also be `start:stop` or `start:stop:step`.

    A value is read as the command line of a run would read it, so its spelling does not matter:
    0.50 is 0.5. A string with a comma in it cannot be written.

    Args:
      text: what was given.
      known: flags by name.
      whole: flags that a run has and a sweep has only once, and why.

    Raises:
      ValueError: one line that repeats `text` and says what is allowed.
    """
    name, equals, listed = text.partition("=")
    name = name.strip()
    if not (name and equals):
        raise refuse("grid", text, "must be like cap=0.4,0.5 or seed=0:10")
    flag = _flag(name, text, known, whole)
    values: dict[Any, None] = {}  # a set that keeps its order
    for word in map(str.strip, listed.split(",")):
        if not word:
            raise refuse("grid", text, f"{flag.name} has an empty value")
        if flag.whole and ":" in word:
            found: Sequence[Any] = _range(word, text)
        else:
            try:
                found = [flag.parse(word)]
            except ValueError as error:
                allowed = str(error).removeprefix(f"{flag.name}={word!r}: ")
                allowed = allowed.replace("a whole number", RANGE)
                raise refuse("grid", text, f"{word!r} {allowed}") from None
        if found[MOST - len(values) :]:  # len() of a range fails above 2⁶³
            raise refuse("grid", text, f"{flag.name} has more than {MOST} values")
        for value in found:
            if value in values:
                raise refuse("grid", text, f"{word!r} repeats a value of {flag.name}")
            values[value] = None
    return Axis(flag.name, tuple(values))


def parse_grid(
    texts: Sequence[str], known: Mapping[str, Flag], whole: Mapping[str, str]
) -> tuple[Axis, ...]:
    """Reads one axis from each text.

    Raises:
      ValueError: one line about the first text that is no axis, or whose flag has one already.
    """
    axes: dict[str, Axis] = {}
    for text in texts:
        axis = parse_axis(text, known, whole)
        if axis.flag in axes:
            raise refuse("grid", text, f"{axis.flag} has an axis already: list all values in one")
        axes[axis.flag] = axis
    return tuple(axes.values())


def combinations(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Every choice of one value an axis, by flag. The last axis varies fastest.

    Without axes that is one empty choice.

    Raises:
      ValueError: one line, if there are more than `MOST`.
    """
    if math.prod(len(axis.values) for axis in axes) > MOST:
        sizes = " × ".join(f"{axis.flag}[{len(axis.values)}]" for axis in axes)
        raise refuse("grid", sizes, f"has more than {MOST} combinations")
    names = [axis.flag for axis in axes]
    chosen = itertools.product(*(axis.values for axis in axes))
    return [dict(zip(names, values, strict=True)) for values in chosen]


def _flag(name: str, text: str, known: Mapping[str, Flag], whole: Mapping[str, str]) -> Flag:
    if name in whole:
        raise refuse("grid", text, f"--{name} is one for the whole sweep: {whole[name]}")
    flag = find(name, known)
    if flag is None:
        what = hint(name, [one for one in known.values() if one.name not in whole])
        raise refuse("grid", text, f"{name!r} is no flag of a run ({what})")
    return flag


def _range(word: str, text: str) -> range:
    try:
        numbers = [int(part) for part in word.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 3):
        raise refuse("grid", text, f"{word!r} must be {RANGE}")
    if numbers[2:] == [0]:
        raise refuse("grid", text, f"{word!r} has a step of 0")
    span = range(*numbers)
    if not span:
        raise refuse("grid", text, f"{word!r} is an empty range")
    if max(abs(numbers[0]), abs(span[-1])) > LARGEST and not span[MOST:]:
        raise refuse("grid", text, f"{word!r} must be less than {LARGEST + 1}")
    return span
