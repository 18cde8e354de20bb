"""`--grid='cap=0.4,0.5' --grid='seed=0:10'` → the combinations of flag values of a sweep."""

import dataclasses
import difflib
import itertools
import math
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import helppage, options
from noisefl.config import nearest, refuse

MOST = 1_000_000  # values on an axis, and combinations: more is a slip of the pen

# Flags that a run has and a sweep has only once, and why.
WHOLE_SWEEP = {
    "out": "one folder holds all runs",
    "resume": "a sweep goes on as a whole",
    "compilation_cache": "all runs share it",
    "checkpoint_every": "no result depends on it",
    "rounds_per_chunk": "no result depends on it",
    "data_dir": "all runs read the same folder",
    "rounds": "runs are compared at equal length",
}

_KINDS = {
    "bool": "true or false",
    "int": "a whole number, start:stop or start:stop:step",
    "float": "a finite number",
}


@dataclasses.dataclass(frozen=True)
class Axis:
    """One flag and the values it takes in a sweep.

    Attributes:
      flag: its name.
      values: distinct, in the order given; of the type that the flag has in `options.define`.
    """

    flag: str
    values: tuple[Any, ...]


def parse_axis(text: str) -> Axis:
    """Reads `flag=value,value`; a whole number may also be `start:stop` or `start:stop:step`.

    A value is read as the command line of a run would read it, so its spelling does not matter:
    0.50 is 0.5. A string with a comma in it cannot be written. Whether values are in range is for
    `options.from_flags` to say: some ranges depend on the values of other flags.

    Raises:
      ValueError: one line that repeats `text` and says what is allowed.
    """
    name, equals, listed = text.partition("=")
    flag = name.strip()
    if not (flag and equals):
        raise refuse("grid", text, "must be like cap=0.4,0.5 or seed=0:10")
    _check_name(flag, text)
    parser = options.define()[flag].parser
    values: dict[Any, None] = {}  # a set that keeps its order
    for word in map(str.strip, listed.split(",")):
        if not word:
            raise refuse("grid", text, f"{flag} has an empty value")
        is_range = parser.flag_type() == "int" and ":" in word
        found = _range(word, text) if is_range else [_value(flag, parser, word, text)]
        if found[MOST - len(values) :]:  # len() of a range fails above 2⁶³
            raise refuse("grid", text, f"{flag} has more than {MOST} values")
        for value in found:
            if value in values:
                raise refuse("grid", text, f"{word!r} repeats a value of {flag}")
            values[value] = None
    return Axis(flag, tuple(values))


def parse_grid(texts: Sequence[str]) -> tuple[Axis, ...]:
    """Reads one axis from each text.

    Raises:
      ValueError: one line about the first text that is no axis, or whose flag has one already.
    """
    axes: dict[str, Axis] = {}
    for text in texts:
        axis = parse_axis(text)
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


def _check_name(flag: str, text: str) -> None:
    if flag in WHOLE_SWEEP:
        raise refuse("grid", text, f"--{flag} is one for the whole sweep: {WHOLE_SWEEP[flag]}")
    known = [name for name in options.defaults() if name not in WHOLE_SWEEP]
    if flag not in known:
        close = difflib.get_close_matches(flag, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see --helpshort"
        raise refuse("grid", text, f"{flag!r} is no flag of a run ({hint})")


def _value(flag: str, parser: flags.ArgumentParser, word: str, text: str) -> Any:
    choices = helppage._CHOICES.get(flag)
    if choices is not None and word not in choices:
        raise refuse("grid", text, f"{word!r} {nearest(word, choices)}")
    refusal = refuse("grid", text, f"{word!r} must be {_KINDS.get(parser.flag_type(), 'text')}")
    try:
        value = parser.parse(word)
    except ValueError:
        raise refusal from None
    if isinstance(value, float):
        if not math.isfinite(value):
            raise refusal
        value += 0.0  # −0 becomes 0
    return value


def _range(word: str, text: str) -> range:
    try:
        numbers = [flags.IntegerParser().parse(part) for part in word.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 3):
        raise refuse("grid", text, f"{word!r} must be {_KINDS['int']}")
    if numbers[2:] == [0]:
        raise refuse("grid", text, f"{word!r} has a step of 0")
    span = range(*numbers)
    if not span:
        raise refuse("grid", text, f"{word!r} is an empty range")
    return span
