"""A model's forward pass as the list of operations that JAX traces: whatever it was written in.

Here is found what a federated round must know of any model: which parameters are the layers', in
the order of their use, and where it can be cut below some of them. And here every operation is
evaluated, so that `rules` may lower it otherwise than XLA does.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from noisefl.models import rules
from noisefl.models.lowering import Lowering

Path = tuple[str, ...]  # of a parameter
Value = int | core.Literal  # a number that stands for an array, or a constant of the trace
Params = Any
PRODUCTS = ("conv_general_dilated", "dot_general")
CALLS = {"jit", "closed_call", "core_call", "remat2", "checkpoint"}  # part of what calls them
MOVES = {"reshape", "convert_element_type", "transpose", "squeeze", "broadcast_in_dim", "copy"}


class Layer(NamedTuple):
    """A product of what comes from the images with parameters, by its largest parameter.

    Attributes:
      path: of the module that owns the kernel.
      convolution: whether it is a convolution.
      kernel: path of the largest parameter that is multiplied.
      bias: path of what is added to the product, a number for each feature. None without.
    """

    path: Path
    convolution: bool
    kernel: Path
    bias: Path | None

    @property
    def parameters(self) -> tuple[Path, ...]:
        return (self.kernel,) if self.bias is None else (self.bias, self.kernel)


class Operation(NamedTuple):
    """One primitive of JAX, or `rules.POOLED`."""

    name: str
    scope: tuple[str, ...]  # the modules that it is in, which profiles show
    equation: Any  # of JAX
    params: dict[str, Any]
    reads: tuple[Value, ...]
    makes: tuple[int, ...]


class Program(NamedTuple):
    """The operations of a function of parameters, images and perhaps a key, in traced order.

    Values are numbers: first the parameters in the order of their leaves, then the other inputs.

    Attributes:
      operations: none of them a call of others.
      shapes: number → shape.
      constants: number → array that the model closes over.
      outs: what it returns; the logits first.
      paths: of the parameters.
      inputs: how many values are inputs.
    """

    operations: tuple[Operation, ...]
    shapes: dict[int, tuple[int, ...]]
    constants: dict[int, Any]
    outs: tuple[Value, ...]
    paths: tuple[Path, ...]
    inputs: int

    def layers(self) -> tuple[Layer, ...]:
        """In the order of their first use."""
        behind, found = self._behind(), {}
        for operation in self.operations:
            if operation.name not in PRODUCTS:
                continue
            of_params = [leaves for v in _numbers(operation.reads) if (leaves := behind[v])]
            if len(of_params) != 1 or self._of_images(operation, behind) != 1:
                continue
            kernel = max(of_params[0], key=lambda leaf: (np.prod(self.shapes[leaf]), -leaf))
            if kernel not in found:
                convolution = operation.name == "conv_general_dilated"
                bias, path = self._bias(operation, behind), self.paths[kernel]
                found[kernel] = Layer(path[:-1], convolution, path, bias)
        return tuple(found.values())

    def products(self) -> list[int]:
        """Operations of each product of the images with parameters, a multiplication and an
        addition being two."""
        behind, found = self._behind(), []
        for operation in self.operations:
            read = _numbers(operation.reads)
            if operation.name in PRODUCTS and self._of_images(operation, behind) == 1:
                (kernel,) = (v for v in read if behind[v] is not None)
                size, out = math.prod(self.shapes[kernel]), self.shapes[operation.makes[0]]
                axes = operation.params["dimension_numbers"]
                if operation.name == "dot_general":
                    free = len(self.shapes[kernel]) - len(axes[0][1])
                    features = math.prod(out[len(out) - free :])
                else:
                    features = out[axes.out_spec[1]]
                found.append(2 * size * math.prod(out) // features)
        return found

    def _behind(self) -> dict[int, frozenset[int] | None]:
        """The parameters that a value is made of, if of nothing else; None where an input is."""
        own = len(self.paths)
        behind: dict[int, frozenset[int] | None] = {n: frozenset((n,)) for n in range(own)}
        behind.update(dict.fromkeys(range(own, self.inputs)))
        behind.update(dict.fromkeys(self.constants, frozenset()))
        for operation in self.operations:
            read = [behind[value] for value in _numbers(operation.reads)]
            mixed = None if None in read else frozenset().union(*(r for r in read if r))
            behind.update(dict.fromkeys(operation.makes, mixed))
        return behind

    def _of_images(self, operation: Operation, behind: dict[int, frozenset[int] | None]) -> int:
        return sum(behind[value] is None for value in _numbers(operation.reads))

    def _bias(self, product: Operation, behind: dict[int, frozenset[int] | None]) -> Path | None:
        value = product.makes[0]
        shape = self.shapes[value]
        if product.name == "dot_general":  # features may have two axes, as those of attention
            features = {math.prod(shape[-axes:]) for axes in (1, 2)}
        else:
            features = {shape[product.params["dimension_numbers"].out_spec[1]]}
        users = self._users()
        while len(users.get(value, ())) == 1:
            user = users[value][0]
            if user.name == "add":
                for other in _numbers(user.reads):
                    leaves = behind[other] or ()
                    if len(leaves) == 1 and np.prod(self.shapes[min(leaves)]) in features:
                        return self.paths[min(leaves)]
                return None
            if user.name not in MOVES:
                return None
            value = user.makes[0]
        return None

    def _users(self) -> dict[int, list[Operation]]:
        users: dict[int, list[Operation]] = {}
        for operation in self.operations:
            for value in _numbers(operation.reads):
                users.setdefault(value, []).append(operation)
        return users

    def met(self, touched: Sequence[Path]) -> int | None:
        """The value from the images that the first of these parameters meet, if it is one alone:
        all up to there is the same, whatever they are."""
        behind, wanted = self._behind(), set(touched)
        ours = {n for n, path in enumerate(self.paths) if path in wanted}
        for operation in self.operations:
            read = _numbers(operation.reads)
            of_images = [v for v in read if behind[v] is None]
            if of_images and any(ours & (behind[v] or frozenset()) for v in read):
                return of_images[0] if len(of_images) == 1 else None
        return None

    def saves(self, value: int) -> bool:
        """Fewer layers lead to the logits from this value than from the images."""
        behind = self._behind()

        def layers(given: frozenset[int]) -> int:
            needed = self._needed(self.outs[:1], given)
            return sum(o.name in PRODUCTS and self._of_images(o, behind) > 0 for o in needed)

        return layers(frozenset((value,))) < layers(frozenset())

    def _needed(
        self, values: Sequence[Value], given: frozenset[int], said: bool = False
    ) -> list[Operation]:
        """The operations that lead to these values from others that are given; with `said` also
        those that do something, such as `jax.debug.print`."""
        wanted, needed = set(_numbers(values)) - given, []
        for operation in reversed(self.operations):
            does = said and operation.equation.effects
            if does or wanted.intersection(operation.makes):
                needed.append(operation)
                wanted.update(set(_numbers(operation.reads)) - given)
        return needed[::-1]

    def run(
        self, params: Params, inputs: Sequence[jax.Array], lowering: Lowering,
        values: Sequence[Value] | None = None, given: dict[int, jax.Array] | None = None,
    ) -> list[jax.Array]:  # fmt: skip
        """What it returns, or other values; from the inputs, or from values that are given.

        Arrays [...] of any shapes, those that it was traced for.
        """
        known: dict[int, Any] = dict(enumerate([*jax.tree.leaves(params), *inputs]))
        known = {**self.constants, **known, **(given or {})}
        outs = list(self.outs if values is None else values)

        def read(value: Value) -> Any:
            return known[value] if isinstance(value, int) else value.val

        needed = self._needed(outs, frozenset(given or {}), values is None and given is None)
        for operation in joined(needed, self.shapes, _numbers([*outs, *(given or {})])):
            with contextlib.ExitStack() as scopes:
                for name in operation.scope:
                    scopes.enter_context(jax.named_scope(name))
                made = rules.evaluate(operation, [read(v) for v in operation.reads], lowering)
            known.update(zip(operation.makes, made, strict=True))
        return [read(out) for out in outs]


def _numbers(values: Sequence[Value]) -> list[int]:
    return [value for value in values if isinstance(value, int)]


def trace(function: Callable[..., Any], params: Params, *inputs: Any) -> Program:
    """The program of `function(params, *inputs)` for arrays of these shapes."""
    closed: Any = jax.make_jaxpr(function)(params, *inputs)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = tuple(tuple(str(getattr(k, "key", k)) for k in path) for path, _ in leaves)
    operations: list[Operation] = []
    shapes: dict[int, tuple[int, ...]] = {}
    constants: dict[int, Any] = {}

    def number(shape: tuple[int, ...]) -> int:
        shapes[len(shapes)] = shape
        return len(shapes) - 1

    def inline(
        jaxpr: Any, reads: Sequence[Value], consts: Sequence[Value], within: tuple[str, ...] = ()
    ) -> list[Value]:
        values: dict[Any, Value] = dict(zip(jaxpr.invars, reads, strict=True))
        values.update(zip(jaxpr.constvars, consts, strict=True))

        def value(of: Any) -> Value:
            return of if isinstance(of, core.Literal) else values[of]

        for equation in jaxpr.eqns:
            read = [value(v) for v in equation.invars]
            name = equation.primitive.name
            own = filter(None, str(equation.source_info.name_stack).split("/"))
            scope = (*within, *own)
            inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
            if name in CALLS and inner is not None:
                closes = [constant(c) for c in getattr(inner, "consts", ())]
                made = inline(getattr(inner, "jaxpr", inner), read, closes, scope)
            else:
                made = [number(tuple(v.aval.shape)) for v in equation.outvars]
                operations.append(
                    Operation(name, scope, equation, equation.params, tuple(read), tuple(made))
                )
            values.update(zip(equation.outvars, made, strict=True))
        return [value(v) for v in jaxpr.outvars]

    def constant(array: Any) -> int:
        at = number(tuple(np.shape(array)))
        constants[at] = array
        return at

    begin = [number(tuple(v.aval.shape)) for v in closed.jaxpr.invars]
    outs = inline(closed.jaxpr, begin, [constant(c) for c in closed.consts])
    return Program(tuple(operations), shapes, constants, tuple(outs), paths, len(begin))


def joined(
    operations: Sequence[Operation], shapes: dict[int, tuple[int, ...]], kept: Sequence[int]
) -> Iterator[Operation]:
    """A convolution whose maxima alone are read becomes one operation with its pooling.

    What stands between, a number for each channel that is added and ReLU, never turns the order of
    two numbers round, so that it may as well come after the maximum: the same numbers, bit by bit.
    """
    makers = {made: operation for operation in operations for made in operation.makes}
    uses: dict[int, int] = dict.fromkeys(kept, 2)
    for operation in operations:
        for value in _numbers(operation.reads):
            uses[value] = uses.get(value, 0) + 1
    pooled: dict[int, Operation] = {}  # first value of the convolution → with the pooling
    renamed: dict[int, int] = {}  # last value before the pooling → that after it
    gone: set[int] = set()
    for operation in operations:
        chain = functools.partial(_channelwise, makers, shapes, uses)
        if rules.pools_two_by_two(operation) and (begin := chain(operation.reads[0])):
            pooled[begin.makes[0]] = begin._replace(name=rules.POOLED)
            renamed[operation.reads[0]] = operation.makes[0]  # pyright: ignore
            gone.add(operation.makes[0])
    for operation in operations:
        if operation.makes and operation.makes[0] in gone:
            continue
        new = pooled.get(operation.makes[0], operation) if operation.makes else operation
        yield new._replace(makes=tuple(renamed.get(value, value) for value in new.makes))


def _channelwise(
    makers: dict[int, Operation], shapes: dict[int, tuple[int, ...]], uses: dict[int, int],
    value: Value,
) -> Operation | None:  # fmt: skip
    """The convolution behind a value that is read once, if what came in between keeps order."""
    while isinstance(value, int) and uses.get(value) == 1 and value in makers:
        operation = makers[value]
        if rules.can_be_pooled(operation, [shapes.get(v, ()) for v in _numbers(operation.reads)]):
            return operation
        full = [v for v in _numbers(operation.reads) if shapes[v] == shapes[value]]
        rest = [v for v in operation.reads if v not in full]
        small = all(
            isinstance(v, core.Literal) or np.prod(shapes[v][:-1], initial=1) == 1 for v in rest
        )
        keeps = operation.name in ("add", "max") or rules.is_relu(operation)
        if len(full) != 1 or not small or not keeps:
            return None
        value = full[0]
    return None
