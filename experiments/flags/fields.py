"""Parts ↔ flags. A flag is a path into the trees of parts, or its last name where that is unique.

Nothing here knows a part: names, types, ranges and meanings are read off the fields, and the
classes that a field can hold are those of its kind (`parts.implementations`), a user's own
included.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from noisefl.errors import nearest, refuse
from noisefl.models import MODELS
from noisefl.parts import (
    LARGEST,
    Part,
    Spec,
    defaults,
    implementations,
    kind_of,
    name_of,
    specs,
    walk,
)  # fmt: skip

Path = tuple[str, ...]
VALUES = ("number", "count", "size", "choice", "text", "switch")  # kinds of fields that are flags
SWITCH = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}  # as absl's


@dataclasses.dataclass
class Flag:
    """One flag.

    Attributes:
      path: where it lies in the trees of parts.
      spec: how the field is declared, by the first class that has it.
      owners: classes that have it.
      kinds: of a flag that chooses a class: the base classes of all that it can hold.
      name: short if that is unique, else the whole path.
    """

    path: Path
    spec: Spec
    owners: list[type]
    kinds: list[type] = dataclasses.field(default_factory=list)
    name: str = ""

    @property
    def classes(self) -> dict[str, type]:
        """What may be chosen, by name; empty of a flag that chooses no class."""
        return {name_of(cls): cls for kind in self.kinds for cls in implementations(kind)}

    @property
    def choices(self) -> tuple[str, ...]:
        """Names of what may be chosen; empty where any value may."""
        return tuple(self.classes) or self.spec.choices

    @property
    def whole(self) -> bool:
        """Its values are whole numbers."""
        return self.spec.kind in ("size", "count")

    def parse(self, text: str) -> Any:
        """The value that a text means: of the field's type; of a class, its names joined by +.

        Whether a number is in its range is for the part to say, which may depend on its others.

        Raises:
          ValueError: one line with the flag, the text and what is allowed.
        """
        spec, word = self.spec, text.strip()
        none = {"none", "auto"} if spec.kind == "size" else {"none"}
        if spec.optional and word.lower() in none:
            return None
        or_none = f", or none: {spec.none}" if spec.optional else ""
        if self.kinds:
            for name in (names := word.split("+")):
                if name not in self.classes:
                    allowed = [*self.choices, *(["none"] if spec.optional else [])]
                    raise refuse(self.name, text, nearest(name, allowed))
            for name in names[:-1]:
                if not is_wrapper(self.classes[name]):
                    raise refuse(self.name, text, f"{name} goes around nothing: name it last")
            return word
        if spec.kind == "choice" and word not in spec.choices:
            raise refuse(self.name, text, nearest(word, spec.choices))
        if spec.kind in ("choice", "text"):
            return word
        if spec.kind == "switch":
            if word.lower() not in SWITCH:
                raise refuse(self.name, text, "must be true or false")
            return SWITCH[word.lower()]
        try:
            value = int(word) if self.whole else float(word)
        except ValueError:
            raise refuse(self.name, text, f"must be {self.noun}{or_none}") from None
        if self.whole and abs(value) > LARGEST:
            raise refuse(self.name, text, f"must be less than {LARGEST + 1}")
        if not math.isfinite(value):
            raise refuse(self.name, text, f"must be {self.noun}{or_none}")
        return value + 0  # −0 becomes 0

    @property
    def noun(self) -> str:
        return "a whole number" if self.whole else "a finite number"


def is_wrapper(cls: type) -> bool:
    """It holds another part of its own kind."""
    return "inner" in specs(cls)


def catalogue(roots: Sequence[tuple[Path, Part]]) -> dict[str, Flag]:
    """Every flag that any choice of parts can have, by name.

    Args:
      roots: the trees to begin from, each with the path of its root. They matter for the numbers
        that a part takes by name (`numbers`) alone.
    """
    found: dict[Path, Flag] = {}

    def add(cls: type, here: Path, spec: Spec) -> Flag:
        flag = found.setdefault(here, Flag(here, spec, []))
        if cls not in flag.owners:
            flag.owners.append(cls)
        return flag

    def add_numbers(cls: type, here: Path, spec: Spec, names: Mapping[str, Any]) -> None:
        for name in names:
            add(cls, (*here, name), Spec("number", spec.help)).name = ".".join((*here, name))

    def visit(cls: type, path: Path) -> None:
        for name, spec in specs(cls).items():
            here = (*path, name)
            if spec.kind == "child" and name != "inner":
                kind, flag = kind_of(cls, name), add(cls, here, spec)
                if kind not in flag.kinds:
                    flag.kinds.append(kind)
                    for one in implementations(kind):
                        visit(one, here)
            elif spec.kind == "numbers":
                add_numbers(cls, here, spec, defaults(cls)[name]())
            elif spec.kind in VALUES:
                add(cls, here, spec)

    for path, root in roots:
        visit(type(root), path)
        for place in walk(root, path):
            if place.spec.kind == "numbers":
                add_numbers(type(place.owner), place.path, place.spec, place.value)
    last = [flag.path[-1] for flag in found.values() if not flag.name]
    for flag in found.values():
        short = flag.path[-1] if last.count(flag.path[-1]) == 1 else ".".join(flag.path)
        flag.name = flag.name or short
    # What only one class could fill is no choice, unless it may be left empty.
    return {
        f.name: f for f in found.values() if not f.kinds or len(f.choices) > 1 or f.spec.optional
    }


def applied(
    root: Part, path: Path, given: Mapping[Path, Any], names: Mapping[Path, str], read: set[Path]
) -> Any:
    """The tree with the given values, by path; adds to `read` the paths that it has.

    Parts are made anew from the inside out, so that only values that stay together are checked.
    A part of another class has what both have and was set before, i.e. is not the old default.

    Args:
      root: the tree to begin from.
      path: of its root.
      given: values as `Flag.parse` returns them.
      names: of flags, where the field's own name is not enough to say what is refused.
      read: paths.

    Raises:
      ValueError: a value that its field refuses, or values that do not go together.
    """

    below = {given_path[:end] for given_path in given for end in range(len(given_path) + 1)}

    def taken(here: Path) -> bool:
        if here in given:
            read.add(here)
        return here in given

    def child(kind: type, there: Any, here: Path) -> Any:
        if here not in below:
            return there
        before = _chain(there)
        classes = [type(one) for one in before]
        if taken(here):
            if given[here] is None:
                return None
            classes = _chosen(given[here], kind, classes, names.get(here, here[-1]))
        made = None
        for cls in reversed(classes):
            made = anew(cls, _carried(cls, before), here, made)
        return made

    def anew(cls: type, values: dict[str, Any], here: Path, inside: Any = None) -> Any:
        initial = defaults(cls)
        for name, spec in specs(cls).items():
            place = (*here, name)
            value = values.get(name, initial[name])
            if name not in values and (isinstance(value, type) or spec.kind == "numbers"):
                value = value()
            if name == "inner":
                value = value if inside is None else inside
            elif spec.kind == "child":
                value = child(kind_of(cls, name), value, place)
            elif spec.kind == "numbers":
                value = {
                    key: given[(*place, key)] if taken((*place, key)) else one
                    for key, one in value.items()
                }
            elif spec.kind in VALUES and taken(place):
                value = given[place]
            values[name] = value
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(_in_flags(str(error), here, names)) from None

    return anew(type(root), _fields(root), path) if path in below else root


def _fields(part: Part) -> dict[str, Any]:
    return {name: getattr(part, name) for name in specs(type(part))}


def _chain(part: Any) -> list[Any]:
    """A part and those inside, outermost first."""
    found = []
    while part is not None:
        found.append(part)
        part = getattr(part, "inner", None)
    return found


def _chosen(text: str, kind: type, there: list[type], flag: str) -> list[type]:
    """Classes of these names, outermost first.

    A wrapper at the end goes around what is there; one other name goes inside the wrappers there;
    `a+b` is all that is wanted. What says `wrappable = False` goes inside none.
    """
    known = {name_of(cls): cls for cls in implementations(kind)}
    for name in text.split("+"):
        if name not in known:
            raise refuse(flag, text, nearest(name, list(known)))
    named = [known[name] for name in text.split("+")]
    if is_wrapper(named[-1]):
        return [cls for cls in named if cls not in there] + there
    inside = len(named) == 1 and getattr(named[0], "wrappable", True)
    return [cls for cls in there if inside and is_wrapper(cls)] + named


def _carried(cls: type, before: list[Any]) -> dict[str, Any]:
    """What a part of a class has from those that were in its place."""
    values: dict[str, Any] = {}
    own = specs(cls)
    for part in before:
        if type(part) is cls:
            return _fields(part)
        initial = defaults(type(part))
        for name, spec in specs(type(part)).items():
            value = getattr(part, name)
            if name == "inner" or name not in own or own[name].kind != spec.kind:
                continue
            if spec.kind == "child":
                keep = isinstance(value, kind_of(cls, name))
            else:
                was = initial[name]() if spec.kind == "numbers" else initial[name]
                keep = plain(value) != plain(was)
            if keep:
                values[name] = value
    return values


def _in_flags(said: str, path: Path, names: Mapping[Path, str]) -> str:
    """A complaint of the library about a field, with the flag's name."""
    match = re.match(r"(\w+)(?:\['(\w+)'\])?(?==)", said)
    if match is not None:
        name = names.get((*path, *(word for word in match.groups() if word)))
        said = said.replace(match[0], name or match[0], 1)
    return said


def described(root: Part, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every field of a tree as a JSON value, by path; classes by their names, joined by +."""
    for name, spec in specs(type(root)).items():
        value, here = getattr(root, name), (*path, name)
        if name == "inner":
            yield from described(value, path)
        elif spec.kind == "child":
            if value is None or type(value) is not kind_of(type(root), name):  # else: as it must
                yield here, "+".join(name_of(type(one)) for one in _chain(value)) or None
            if value is not None:
                yield from described(value, here)
        elif spec.kind == "numbers":
            yield from (((*here, key), plain(one)) for key, one in value.items())
        elif spec.kind in VALUES or value not in ((), ""):
            yield here, plain(value)


def plain(value: Any) -> Any:
    """As JSON: floats are the shortest decimals of their float32; functions and models by name.

    What differs in a result differs in this text, except for functions of one name, such as those
    inside two optax transformations.
    """
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, Part):
        fields = {".".join(path): one for path, one in described(value)}
        return {name_of(type(value)): fields} if fields else name_of(type(value))
    if isinstance(value, nn.Module):
        return _of_module(value)
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(value)[()]
        return float(str(value)) if value.dtype == np.float32 else value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def _of_module(model: nn.Module) -> str:
    """`lenet5`, or `Mine(width=32)` with what is not the class's default."""
    names = {cls: name for name, cls in MODELS.items()}
    changed = [
        f"{field.name}={' '.join(repr(getattr(model, field.name)).split())}"
        for field in dataclasses.fields(model)
        if field.name not in ("parent", "name") and getattr(model, field.name) != field.default
    ]
    name = names.get(type(model), type(model).__qualname__)
    return f"{name}({', '.join(changed)})" if changed else name


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def listed(values: Mapping[str, Any]) -> str:
    """`cap=0.4, calibrator=sequential`."""
    return ", ".join(f"{flag}={shown(value)}" for flag, value in values.items())


def find(name: str, known: Mapping[str, Flag]) -> Flag | None:
    """The flag of this short name or path."""
    by_path = (flag for flag in known.values() if ".".join(flag.path) == name)
    return known.get(name) or next(by_path, None)


def hint(name: str, known: Iterable[Flag], dashes: str = "", beside: Iterable[str] = ()) -> str:
    """What to do about a flag that there is not; a name that several have must be spelled out.
    `beside`: names of other flags."""
    names = [".".join(flag.path) if "." in name else flag.name for flag in known]
    names += beside
    several = [one for one in names if one.endswith(f".{name}")]
    if several:
        return f"spell it out: {', '.join(dashes + one for one in several)}"
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {dashes}{close[0]}?" if close else "see --helpshort"
