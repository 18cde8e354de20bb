"""How each operation of a model is evaluated: as `Lowering` says, or as XLA has it."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from noisefl.models.convolution import Geometry, convolve
from noisefl.models.lowering import Lowering
from noisefl.models.pooling import max_pool, over_windows
from noisefl.models.product import product

POOLED = "pooled convolution"  # of `program.joined`


class LeftToXla(Exception):
    """Why an operation cannot be lowered."""


def evaluate(operation: Any, values: Sequence[Any], lowering: Lowering) -> list[Any]:
    """What an operation of a `Program` makes of these values."""
    rule = RULES.get(operation.name)
    if rule is not None:
        try:
            return [rule(operation.params, values, lowering)]
        except LeftToXla as reason:
            said = f"{operation.name}: {reason}; it is XLA's own, which may be slow in a round"
            warnings.warn(said, stacklevel=2)
    if is_relu(operation):  # of any shape: it may have moved behind a pooling
        return [jax.nn.relu(values[0])]
    return as_traced(operation.equation, values)


def as_traced(equation: Any, values: Sequence[Any]) -> list[Any]:
    """What JAX itself makes of an equation of a trace."""
    found = equation.primitive.get_bind_params(equation.params)
    functions, params = found if isinstance(found, tuple) else ((), found)  # before jax 0.10
    made = equation.primitive.bind(*functions, *values, **params)
    return list(made) if equation.primitive.multiple_results else [made]


def is_relu(operation: Any) -> bool:
    """`jax.nn.relu`, which has a gradient of its own, and so is one operation."""
    if operation.name != "custom_jvp_call":
        return False
    inside = operation.params["call_jaxpr"].eqns
    if len(inside) != 1 or inside[0].params.get("name") != "relu":
        return False
    return [each.primitive.name for each in inside[0].params["jaxpr"].eqns] == ["max"]


def pools_two_by_two(operation: Any) -> bool:
    return operation.name == "reduce_window_max" and _window(operation.params) == (
        (2, 2), (2, 2), ((0, 0), (0, 0)),
    )  # fmt: skip


def can_be_pooled(operation: Any, shapes: Sequence[tuple[int, ...]]) -> bool:
    """A convolution whose lowering can pool as well."""
    if operation.name != "conv_general_dilated" or len(shapes) != 2 or len(shapes[1]) != 4:
        return False
    if any(read.aval.dtype != jnp.float32 for read in operation.equation.invars):
        return False
    kernel = tuple(shapes[1][axis] for axis in _axes(operation.params)[1])
    return _why_not(operation.params) is None and _geometry(operation.params).plain(kernel)


def _axes(params: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Of images, kernel and outputs: where [N, H, W, Ch], [h, w, Ch, O] and [N, H, W, O] lie."""
    spec = params["dimension_numbers"]
    image, kernel, out = spec.lhs_spec, spec.rhs_spec, spec.out_spec
    return (
        (image[0], *image[2:], image[1]), (*kernel[2:], kernel[1], kernel[0]),
        (out[0], *out[2:], out[1]),
    )  # fmt: skip


def _why_not(params: dict[str, Any]) -> str | None:
    """Why a convolution cannot be lowered."""
    if len(params["window_strides"]) != 2:
        return f"{len(params['window_strides'])} spatial axes"
    if any(by != 1 for by in params["lhs_dilation"]):
        return "transposed"
    if params["batch_group_count"] != 1:
        return "groups of the batch"
    if any(side < 0 for sides in params["padding"] for side in sides):
        return "a negative padding"
    return None


def _geometry(params: dict[str, Any]) -> Geometry:
    groups = params["feature_group_count"]
    return Geometry(tuple(params["window_strides"]), tuple(params["rhs_dilation"]), groups)


def _only_float32(values: Sequence[Any]) -> None:
    for value in values:
        if value.dtype != jnp.float32:
            raise LeftToXla(f"numbers are {value.dtype}")


def _conv(params: dict[str, Any], values: Sequence[Any], lowering: Lowering) -> Any:
    return _convolved(params, values, lowering, False)


def _pooled(params: dict[str, Any], values: Sequence[Any], lowering: Lowering) -> Any:
    return _convolved(params, values, lowering, True)


def _convolved(
    params: dict[str, Any], values: Sequence[Any], lowering: Lowering, pool: bool
) -> Any:
    why = _why_not(params)
    if why:
        raise LeftToXla(why)
    _only_float32(values)
    image, kernel, out = _axes(params)
    made = convolve(
        values[0].transpose(image), values[1].transpose(kernel), tuple(params["padding"]),
        _as_precise(params, lowering), _geometry(params), pool,
    )  # fmt: skip
    return made.transpose(np.argsort(out))


def _as_precise(params: dict[str, Any], lowering: Lowering) -> Lowering:
    """The model's own wish for the highest precision is heard."""
    asked = params.get("precision")
    highest = asked is not None and lax.Precision.HIGHEST in tuple(np.atleast_1d(asked))
    if highest and lowering.precision == "default":
        return lowering.with_precision("float32")
    return lowering


def _dot(params: dict[str, Any], values: Sequence[Any], lowering: Lowering) -> Any:
    """A dense layer, over one axis or several, is one matrix product; any other, such as that of
    attention between places of one image, is left as it is."""
    a, b = values
    (over_a, over_b), batch = params["dimension_numbers"]
    lowering, axes = _as_precise(params, lowering), len(over_a)
    dense = (
        batch == ((), ())
        and a.dtype == b.dtype == jnp.float32
        and tuple(over_a) == tuple(range(a.ndim - axes, a.ndim))
        and tuple(over_b) == tuple(range(axes))
        and 0 < axes < min(a.ndim, b.ndim)
    )
    if not dense:
        given = dict(params)
        if lowering.precision == "float32":
            given["precision"] = (lax.Precision.HIGHEST,) * 2
        return lax.dot_general_p.bind(a, b, **given)
    rows, columns = a.shape[: a.ndim - axes], b.shape[axes:]
    outer, inside = math.prod(rows), math.prod(b.shape[:axes])
    flat = a.reshape(outer, inside), b.reshape(inside, math.prod(columns))
    out: Any = product(*flat, lowering.precision, lowering.dense_of(outer))
    return out.reshape(*rows, *columns)


def _window(params: dict[str, Any]) -> tuple[Any, ...] | None:
    """(window, strides, padding) along H and W of [B, H, W, Ch]; None of any other window."""
    sizes, strides = params["window_dimensions"], params["window_strides"]
    padding = params["padding"]
    other = [sizes[0], sizes[-1], *params["base_dilation"], *params["window_dilation"]]
    if len(sizes) != 4 or any(n != 1 for n in other) or any(sum(padding[i]) for i in (0, 3)):
        return None
    return tuple(sizes[1:3]), tuple(strides[1:3]), tuple(map(tuple, padding[1:3]))


def _pooling(join: Callable[..., jax.Array], filling: float) -> Callable[..., Any]:
    def pool(params: dict[str, Any], values: Sequence[Any], lowering: Lowering) -> Any:
        found, x = _window(params), values[0]
        if found is None:
            raise LeftToXla("its windows are not those of images [B, H, W, Ch]")
        _only_float32(values)
        window, strides, padding = found
        if join is jnp.maximum and found == ((2, 2), (2, 2), ((0, 0), (0, 0))):
            return max_pool(x, lowering)
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=filling)
        return over_windows(x, window, strides, join)

    return pool


RULES: dict[str, Callable[[dict[str, Any], Sequence[Any], Lowering], Any]] = {
    "conv_general_dilated": _conv,
    POOLED: _pooled,
    "dot_general": _dot,
    "reduce_window_max": _pooling(jnp.maximum, -np.inf),
    "reduce_window_sum": _pooling(jnp.add, 0.0),
}
