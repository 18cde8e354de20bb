"""Parts: what an experiment is built of.

A part is a small frozen dataclass and a pytree. Its numbers are leaves, so that a new value
compiles nothing and a leading axis makes lanes; its choices, sizes and functions are static:
another one is another program. Each field is declared once, by one of the functions below, with its
default, range, unit and meaning; checks, help pages, flags and the axes of sweeps are read off
these declarations::

    @part
    class Fixed(Calibrator):
        strength: Number = number(1.0, "strength of every round", unit="σ or r", low=0)
"""

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
import numpy as np
from jax.core import Tracer

from noisefl.errors import nearest, refuse

# A Python number when given; a float32 or int32 array [] or, of lanes, [L] from then on.
Number = Any
SUBTREES = ("child", "children", "numbers")  # kinds of fields that hold pytrees
LARGEST = 2**31 - 1  # rounds, clients and images are counted in int32


class Spec(NamedTuple):
    """How one field is declared.

    Attributes:
      kind: "number" (float32 leaf), "count" (int32 leaf), "numbers" (float32 leaves by name);
        "size" (whole number), "choice", "text", "switch", all static; "child" (a part), "children"
        (a tuple of parts); or "static" (anything hashable).
      help: its meaning, in a line.
      unit: of its values; empty without.
      low, high: smallest and largest value.
      inside: whether low and high themselves are excluded, as "()", "(]", "[)" or "[]".
      choices: of "choice".
      optional: None is allowed, and means what `none` says.
      none: e.g. "no clipping".
    """

    kind: str
    help: str
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf
    inside: str = "[]"
    choices: tuple[str, ...] = ()
    optional: bool = False
    none: str = ""

    @property
    def traced(self) -> bool:
        return self.kind in ("number", "count")

    @property
    def allowed(self) -> str:
        """The range in words."""
        what = "a number" if self.kind == "number" else "a whole number"
        below = "greater than" if self.inside[0] == "(" else "at least"
        above = "less than" if self.inside[1] == ")" else "at most"
        high = self.high if self.kind == "number" or self.high < LARGEST else math.inf
        bounds = [f"{below} {self.low:g}"] if math.isfinite(self.low) else []
        bounds += [f"{above} {high:g}"] if math.isfinite(high) else []
        finite = ["finite in float32"] if self.kind == "number" and not math.isfinite(high) else []
        return f"must be {what}{', ' if bounds or finite else ''}{' and '.join(bounds + finite)}"


def _field(spec: Spec, default: Any) -> Any:
    metadata = {"spec": spec}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def number(
    default: float | None, help: str, *, unit: str = "", low: float = -math.inf,
    high: float = math.inf, inside: str = "[]", none: str = "",
) -> Any:  # fmt: skip
    """A float32 leaf. With `none`, None is allowed and is another structure."""
    return _field(Spec("number", help, unit, low, high, inside, (), bool(none), none), default)


def count(default: int, help: str, *, unit: str = "", low: int = 0, high: int = LARGEST) -> Any:
    """An int32 leaf."""
    return _field(Spec("count", help, unit, low, high), default)


def size(
    default: int | None, help: str, *, unit: str = "", low: int = 1, high: int = LARGEST,
    none: str = "",
) -> Any:  # fmt: skip
    """A static whole number, such as an axis of an array."""
    return _field(Spec("size", help, unit, low, high, "[]", (), bool(none), none), default)


def choice(default: str, choices: Sequence[str], help: str) -> Any:
    """One of several static words."""
    return _field(Spec("choice", help, choices=tuple(choices)), default)


def text(default: str, help: str) -> Any:
    """A static text that the part itself reads, such as a regular expression."""
    return _field(Spec("text", help), default)


def switch(default: bool, help: str) -> Any:
    """A static yes or no."""
    return _field(Spec("switch", help), default)


def child(default: Any, help: str, none: str = "") -> Any:
    """Another part; `default` is its class, or an instance."""
    return _field(Spec("child", help, optional=bool(none), none=none), default)


def numbers(default: Mapping[str, float], help: str) -> Any:
    """Float32 leaves by name, of a part that takes any number of them."""
    spec = Spec("numbers", help)
    return dataclasses.field(default_factory=lambda: dict(default), metadata={"spec": spec})


def children(default: Sequence[Any], help: str) -> Any:
    """A tuple of other parts, of any length."""
    return _field(Spec("children", help), tuple(default))


def static(default: Any, help: str) -> Any:
    """Anything hashable that a program is compiled for: a module, a function."""
    return _field(Spec("static", help), default)


_Class = TypeVar("_Class", bound=type)


class Part:
    """Base of all parts."""

    def check(self) -> None:
        """Raises ValueError about fields that do not go together; sees concrete numbers only."""

    def replace(self, **changes: Any) -> Any:
        """A copy with other values, checked like a new one."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]

    def __post_init__(self) -> None:
        concrete = True
        for name, spec in specs(type(self)).items():
            value = _taken(type(self), name, getattr(self, name), spec)
            concrete &= not any(isinstance(x, Tracer) for x in jax.tree.leaves(value))
            object.__setattr__(self, name, value)
        if concrete:
            self.check()


@dataclass_transform(frozen_default=True)
def part(cls: _Class) -> _Class:
    """Makes a class with declared fields a part: a frozen dataclass, and a pytree.

    Raises:
      TypeError: a field that none of the functions above declared.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    for field in dataclasses.fields(cls):
        if "spec" not in field.metadata:
            raise TypeError(f"{cls.__name__}.{field.name}: declare it by number(), choice(), …")
    found = specs(cls)
    leaves = [name for name, spec in found.items() if spec.traced or spec.kind in SUBTREES]
    others = [name for name in found if name not in leaves]

    def flatten_with_keys(self: Any) -> Any:
        children = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in leaves]
        return children, tuple(getattr(self, name) for name in others)

    def flatten(self: Any) -> Any:
        return [getattr(self, n) for n in leaves], tuple(getattr(self, n) for n in others)

    def unflatten(aux: Any, children: Any) -> Any:
        self = object.__new__(cls)  # whatever JAX puts there is not for us to check
        for name, value in (*zip(leaves, children, strict=True), *zip(others, aux, strict=True)):
            object.__setattr__(self, name, value)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def specs(cls: type) -> dict[str, Spec]:
    """The declared fields of a part's class, in order."""
    return {field.name: field.metadata["spec"] for field in dataclasses.fields(cls)}


def defaults(cls: type) -> dict[str, Any]:
    """The default of each field; of a child that is a class, the class."""
    missing = dataclasses.MISSING
    return {
        field.name: field.default if field.default is not missing else field.default_factory
        for field in dataclasses.fields(cls)
    }


def _taken(owner: type, name: str, given: Any, spec: Spec) -> Any:
    """The value as the part holds it; raises ValueError if it is not allowed."""
    value: Any = given
    if given is None and spec.optional:
        return None
    if spec.traced:
        return _as_array(name, value, spec)
    if spec.kind == "numbers":
        if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
            raise refuse(name, value, "must be numbers by name")
        each = Spec("number", spec.help)
        return {key: _as_array(f"{name}[{key!r}]", one, each) for key, one in value.items()}
    if spec.kind == "children":
        if not isinstance(given, Sequence) or isinstance(given, str | bytes):
            raise refuse(name, value, "must be several parts")
        for one in value:
            _check_kind(owner, name, one)
        return tuple(value)
    if spec.kind == "child":
        _check_kind(owner, name, given)
    if spec.kind == "choice" and not (isinstance(given, str) and given in spec.choices):
        raise refuse(name, value, nearest(str(value), spec.choices))
    if spec.kind == "switch" and not isinstance(given, bool):
        raise refuse(name, value, "must be True or False")
    if spec.kind == "text" and not isinstance(given, str):
        raise refuse(name, value, "must be a text")
    if spec.kind == "size":
        whole = isinstance(given, int | np.integer) and not isinstance(given, bool)
        if not whole or not spec.low <= value <= spec.high:
            none = f", or None: {spec.none}" if spec.optional else ""
            raise refuse(name, value, spec.allowed + none)
        return int(value)
    return value


def _check_kind(owner: type, name: str, given: Any) -> None:
    """Raises ValueError where a field would hold no part, or one of another kind.

    What stands in for a part that is no base, as a cohort of your own, needs what its docstring
    says and not the base; but a part of this package is of its own kind.
    """
    if not isinstance(given, Part):
        raise refuse(name, given, "must be a part (a class made by noisefl.part)")
    kind = kind_of(owner, name)
    ours = (cls for cls in type(given).__mro__ if cls is not Part)
    mistaken = "abstract" in vars(kind) or any(c.__module__.startswith("noisefl.") for c in ours)
    if not isinstance(given, kind) and mistaken:
        raise refuse(name, name_of(type(given)), f"must be a part of the kind {kind.__name__}")


@functools.cache
def kind_of(owner: type, name: str) -> type:
    """The base class of what a child field, or each of its children, may hold, by its
    annotation."""
    hint = typing.get_type_hints(owner)[name]
    while typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    for cls in hint.__mro__:  # `optimizer: SGD` still means any optimizer
        if cls.__dict__.get("abstract", False):
            return cls
    return hint


def _as_array(name: str, value: Any, spec: Spec) -> Any:
    """float32 or int32: a Python number and an array would else be two signatures to JAX."""
    kind = np.float32 if spec.kind == "number" else np.int32
    if isinstance(value, Tracer):
        return value.astype(kind)
    try:
        given = np.asarray(value)
    except (TypeError, ValueError):  # keys; lists of lists of several lengths
        raise refuse(name, value, spec.allowed) from None
    if given.dtype.kind not in "iuf" or not given.size:
        raise refuse(name, value, spec.allowed)
    wide = given.astype(np.float64)
    if spec.kind == "count" and np.any(wide != np.floor(wide)):
        raise refuse(name, value, spec.allowed)
    # Judged as the round will see it: 1e-50 is 0 in float32, and 1e39 infinite.
    with np.errstate(over="ignore"):
        seen = wide.astype(np.float32).astype(np.float64) if spec.kind == "number" else wide
    low, high = (np.float64(np.float32(bound)) for bound in (spec.low, spec.high))
    if spec.kind == "count":
        low, high = spec.low, spec.high
    above = seen > low if spec.inside[0] == "(" else seen >= low
    below = seen < high if spec.inside[1] == ")" else seen <= high
    if not np.all(above & below & np.isfinite(seen)):
        raise refuse(name, value, spec.allowed)
    # A weakly typed array would be a signature of its own.
    kept = isinstance(value, jax.Array) and value.dtype == kind and not value.weak_type
    return value if kept else wide.astype(kind)


class Place(NamedTuple):
    """One field of one part of a tree of parts.

    Attributes:
      path: names from the root down, without those of wrapped parts ("inner").
      owner: the part that has it.
      name: of the field.
      spec: its declaration.
      value: what it holds.
    """

    path: tuple[str, ...]
    owner: Part
    name: str
    spec: Spec
    value: Any


def walk(root: Part, path: tuple[str, ...] = ()) -> Iterator[Place]:
    """Every field of a part and of the parts in it, from the outside in.

    A wrapper holds what it wraps in a field `inner`, which adds nothing to the path: what a
    scheme's calibrator is called does not depend on how often the scheme is wrapped.
    """
    for name, spec in specs(type(root)).items():
        value = getattr(root, name)
        here = path if name == "inner" else (*path, name)
        yield Place(here, root, name, spec, value)
        if spec.kind == "child" and value is not None:
            yield from walk(value, here)


def changed(root: Part, cls: type, **changes: Any) -> Any:
    """`root` with other values in every part of that class in it."""
    of_children = {
        name: changed(getattr(root, name), cls, **changes)
        for name, spec in specs(type(root)).items()
        if spec.kind == "child" and getattr(root, name) is not None
    }
    return root.replace(**{**of_children, **(changes if isinstance(root, cls) else {})})


def lanes(parts: Sequence[Any]) -> Any:
    """Parts of one structure as one part whose numbers have a leading axis [L].

    Raises:
      ValueError: none, or parts that differ in more than numbers.
    """
    if not isinstance(parts, Sequence) or not all(isinstance(one, Part) for one in parts):
        raise refuse("lanes", parts, "must be several parts, such as experiments")
    if not parts:
        raise refuse("lanes", [], "must be at least one experiment")
    first = jax.tree.structure(parts[0])
    for number, other in enumerate(parts):
        if jax.tree.structure(other) != first:
            raise refuse("lanes", number, "differs from lane 0 in more than numbers")
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *parts)


def implementations(base: type) -> list[type]:
    """Every concrete part below a base class, in order of name; a new one is found by itself.

    A base that is no part to be used says `abstract: ClassVar[bool] = True` in its own body. Of a
    class that was defined again, as in a notebook, the newest counts.

    Raises:
      ValueError: two classes have one name.
    """
    found: dict[str, type] = {}
    waiting = [base]
    for cls in waiting:
        waiting += [one for one in cls.__subclasses__() if one not in waiting]
        if cls.__dict__.get("abstract", False):
            continue
        other = found.get(name := name_of(cls), cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            both = " and ".join(f"{one.__module__}.{one.__qualname__}" for one in (other, cls))
            raise refuse("name", name, f"is that of two parts, {both}: one needs another")
        found[name] = cls
    return [found[name] for name in sorted(found)]


def name_of(cls: type) -> str:
    """What flags call a part: ServerClients is "server_clients", SNR is "snr"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
