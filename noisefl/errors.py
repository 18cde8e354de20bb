"""The one form of every complaint about input: the name, the value, what is allowed."""

import difflib
import operator
from collections.abc import Sequence
from typing import Any


def refuse(name: str, value: Any, allowed: str) -> ValueError:
    """`name=value: allowed`, in the words of whoever is complained to; one line, even of a value or
    an error that is written over several."""
    try:
        shown = repr(value)
    except Exception:  # NumPy's of a date without a unit, Python's of a number of 5000 digits
        shown = f"({type(value).__name__})"
    return ValueError(" ".join(map(str.strip, f"{name}={shown}: {allowed}".splitlines())))


def whole(name: str, value: Any, low: float, high: float, allowed: str) -> int:
    """A whole number of a range, of Python or of NumPy, as Python's.

    Raises:
      ValueError: it is none; True and False are not.
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or not low <= found <= high:
        raise refuse(name, value, allowed)
    return found


def nearest(value: str, choices: Sequence[str]) -> str:
    """`"must be one of a, b, c"`, with the closest of them where `value` looks like a typo of
    it."""
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(value.lower(), list(by_lower), n=1)
    hint = f" (did you mean {by_lower[close[0]]}?)" if close else ""
    return f"must be one of {', '.join(choices)}{hint}"
