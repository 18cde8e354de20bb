"""The one form of every complaint about input: the name, the value, what is allowed."""

import difflib
from collections.abc import Sequence
from typing import Any


def refuse(name: str, value: Any, allowed: str) -> ValueError:
    """`name=value: allowed`, in the words of whoever is complained to."""
    return ValueError(f"{name}={value!r}: {allowed}")


def nearest(value: str, choices: Sequence[str]) -> str:
    """`"must be one of a, b, c"`, with the closest of them where `value` looks like a typo of
    it."""
    close = difflib.get_close_matches(value, choices, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"must be one of {', '.join(choices)}{hint}"
