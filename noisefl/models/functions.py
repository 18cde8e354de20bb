"""What a round needs of a model, whatever it is written in: init, apply, its layers."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from noisefl.errors import refuse
from noisefl.models.lowering import Lowering
from noisefl.models.program import Layer, Program, trace

Params = Any
Model = Any  # a Flax module of linen or of nnx, or a pair (init, apply)
Shape = tuple[int, int, int]


class Functions(NamedTuple):
    """A model as pure functions.

    Attributes:
      init: (key, image_shape) → params, a tree of nested dicts.
      plain: (params, images float32 [B, H, W, Ch] in [0, 1]) → logits [B, C], as it was written.
      lowering: how its operations are evaluated in a round.
      name: of the model, for an error.
      program: (params, images) → what `plain` is for arrays of these shapes.
      shapes: image_shape → those of the parameters, `jax.ShapeDtypeStruct` leaves.
    """

    init: Callable[[jax.Array, Shape], Params]
    plain: Callable[[Params, jax.Array], jax.Array]
    lowering: Lowering
    name: str
    program: Callable[[Params, Any], Program]
    shapes: Callable[[Shape], Params]

    def apply(self, params: Params, images: jax.Array) -> jax.Array:
        """Logits [B, C] of images float32 [B, H, W, Ch], lowered."""
        return self.program(params, images).run(params, images, self.lowering)

    def layers(self, image_shape: Shape) -> tuple[Layer, ...]:
        """The layers that multiply by parameters, in the order of their first use."""
        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        return self.program(self.shapes(image_shape), images).layers()


def functions(model: Model, lowering: Lowering | None = None) -> Functions:
    """A model as pure functions.

    Args:
      model: a linen module; a class of nnx modules that is made with `rngs` alone, or a
        `functools.partial` of one; an nnx module, whose weights every run then begins with; or a
        pair `(init(key, images) → params, apply(params, images) → logits)`.
      lowering: of its operations.

    Raises:
      ValueError: it is none of them.
    """
    try:
        return _functions(model, lowering or Lowering())
    except TypeError as error:  # a module with a field that is
        if "unhashable" not in str(error):
            raise
        return _functions.__wrapped__(model, lowering or Lowering())


@functools.lru_cache(maxsize=64)
def _functions(model: Model, lowering: Lowering) -> Functions:
    init, plain, name = _written_in(model)

    @functools.lru_cache(maxsize=64)
    def traced(tree: Any, leaves: tuple[Any, ...], images: Any) -> Program:
        return trace(plain, jax.tree.unflatten(tree, leaves), images)

    def program(params: Params, images: Any) -> Program:
        leaves, tree = jax.tree.flatten(params)
        return traced(tree, tuple(map(_shape, leaves)), _shape(images))

    @functools.lru_cache(maxsize=8)
    def shapes(image_shape: Shape) -> Params:
        return jax.eval_shape(lambda key: init(key, image_shape), jax.random.key(0))

    return Functions(init, plain, lowering, name, program, shapes)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _written_in(model: Model) -> tuple[Callable[..., Params], Callable[..., Any], str]:
    """(init, apply, name) of any model."""
    if isinstance(model, nn.Module):
        return *_of_linen(model), type(model).__name__
    made = model.func if isinstance(model, functools.partial) else model
    if isinstance(made, nnx.Module) or (isinstance(made, type) and issubclass(made, nnx.Module)):
        return *_of_nnx(model), getattr(made, "__name__", type(made).__name__)
    if isinstance(model, tuple) and len(model) == 2 and all(map(callable, model)):
        init, apply = model
        return lambda key, shape: init(key, jnp.zeros((1, *shape))), apply, "(init, apply)"
    allowed = "must be a Flax module of linen or nnx, or a pair of functions (init, apply)"
    raise refuse("model", type(model).__name__, allowed)


def _of_linen(model: nn.Module) -> tuple[Callable[..., Params], Callable[..., Any]]:
    def init(key: jax.Array, shape: Shape) -> Params:
        made = model.init(key, jnp.zeros((1, *shape)))
        _refuse_state(type(model).__name__, set(made) - {"params"})
        return made["params"]

    return init, lambda params, images: model.apply({"params": params}, images)


def _refuse_state(name: str, kinds: set[str]) -> None:
    if kinds:
        allowed = f"has state beside its parameters ({', '.join(sorted(kinds))})"
        raise refuse("model", name, allowed)


def _of_nnx(model: Any) -> tuple[Callable[..., Params], Callable[..., Any]]:
    """The graph of the module is static; its parameters become a tree of dicts with names alone."""

    def made(key: jax.Array) -> nnx.Module:
        return model if isinstance(model, nnx.Module) else model(rngs=nnx.Rngs(key))

    def split(module: nnx.Module) -> tuple[Any, Any]:
        graph, params, others = nnx.split(module, nnx.Param, ...)
        kinds = {type(variable).__name__ for _, variable in nnx.to_flat_state(others)}
        _refuse_state(type(module).__name__, kinds - {"RngKey", "RngCount"})
        return graph, (nnx.to_flat_state(params), others)

    def init(key: jax.Array, shape: Shape) -> Params:
        params = split(made(key))[1][0]
        return unflatten_dict({tuple(map(str, path)): leaf[...] for path, leaf in params})

    def apply(params: Params, images: jax.Array) -> jax.Array:
        # Its own numbers, drawn anew here, are replaced: they are dead code to XLA.
        graph, (own, others) = split(made(jax.random.key(0)))
        flat = flatten_dict(params)
        new = [(path, leaf.replace(flat[tuple(map(str, path))])) for path, leaf in own]
        module: Any = nnx.merge(graph, nnx.from_flat_state(new), others)
        return module(images)

    return init, apply
