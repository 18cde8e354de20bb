"""A model as it was written, in linen, in nnx or as two functions: one form for all of them."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from noisefl import keys
from noisefl.errors import refuse
from noisefl.models.program import Path

Params = Any
Shape = tuple[int, int, int]
STATISTICS = "batch_stats"  # linen's collection, and its place among the parameters
# Arguments of a linen module's call that say which mode it is in, and their value in training.
MODES = {
    "train": True, "training": True, "is_training": True,
    "deterministic": False, "use_running_average": False, "eval": False,
}  # fmt: skip


class Written(NamedTuple):
    """The functions of a model, none of them lowered.

    Attributes:
      name: for an error.
      check: image_shape → None; raises ValueError about state of another kind.
      init: (key, image_shape) → params, a tree of nested dicts.
      apply: (params, images) → logits, as evaluated.
      train: (params, images, key) → (logits, the leaves of `state_of` after the batch). None of a
        model that is the same in training.
      state_of: params → paths of the running statistics.
    """

    name: str
    check: Callable[[Shape], None]
    init: Callable[[jax.Array, Shape], Params]
    apply: Callable[[Params, jax.Array], jax.Array]
    train: Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, Sequence[jax.Array]]] | None
    state_of: Callable[[Params], tuple[Path, ...]]


def written(model: Any) -> Written:
    """Of any model that `functions` takes.

    Raises:
      ValueError: it is none.
    """
    if isinstance(model, nn.Module):
        return _of_linen(model)
    made = model.func if isinstance(model, functools.partial) else model
    if isinstance(made, nnx.Module) or (isinstance(made, type) and issubclass(made, nnx.Module)):
        return _of_nnx(model, getattr(made, "__name__", type(made).__name__))
    if isinstance(model, tuple) and len(model) == 2 and all(map(callable, model)):
        init, apply = model
        return Written(
            "(init, apply)", lambda shape: None,
            lambda key, shape: init(key, jnp.zeros((1, *shape))), apply, None, lambda params: (),
        )  # fmt: skip
    allowed = "must be a Flax module of linen or nnx, or a pair of functions (init, apply)"
    raise refuse("model", type(model).__name__, allowed)


def _of_linen(model: nn.Module) -> Written:
    """Running statistics lie in the tree under "batch_stats", beside the modules."""
    name = type(model).__name__
    modes = [each for each in inspect.signature(model.__call__).parameters if each in MODES]
    training: dict[str, Any] = {each: MODES[each] for each in modes}
    evaluation: dict[str, Any] = {each: not value for each, value in training.items()}

    def made(key: jax.Array, shape: Shape) -> dict[str, Any]:
        return dict(model.init(key, jnp.zeros((1, *shape)), **evaluation))

    def check(shape: Shape) -> None:
        found = jax.eval_shape(lambda key: made(key, shape), jax.random.key(0))
        _refuse_state(name, set(found) - {"params", STATISTICS})
        if STATISTICS in found and not modes:
            allowed = f"normalises by batch, and its call must take one of {', '.join(MODES)}"
            raise refuse("model", name, allowed)
        if STATISTICS in found["params"]:
            raise refuse("model", name, f"must not have a module called {STATISTICS}")

    def init(key: jax.Array, shape: Shape) -> Params:
        found = made(key, shape)
        state = {STATISTICS: found[STATISTICS]} if STATISTICS in found else {}
        return {**found["params"], **state}

    def variables(params: Params) -> dict[str, Any]:
        own = {each: leaf for each, leaf in params.items() if each != STATISTICS}
        state = {STATISTICS: params[STATISTICS]} if STATISTICS in params else {}
        return {"params": own, **state}

    def apply(params: Params, images: jax.Array) -> Any:
        return model.apply(variables(params), images, **evaluation)

    def train(params: Params, images: jax.Array, key: jax.Array) -> Any:
        logits, changed = model.apply(
            variables(params), images, **training, rngs={"params": key, "dropout": key},
            mutable=[STATISTICS],
        )  # fmt: skip
        flat = flatten_dict(dict(changed))
        return logits, [flat[path] for path in state_of(params)]

    def state_of(params: Params) -> tuple[Path, ...]:
        return tuple(path for path in flatten_dict(params) if path[0] == STATISTICS)  # pyright: ignore

    return Written(name, check, init, apply, train if modes else None, state_of)


def _refuse_state(name: str, kinds: set[str]) -> None:
    if kinds:
        allowed = f"has state that is neither parameters nor statistics: {', '.join(sorted(kinds))}"
        raise refuse("model", name, allowed)


def _of_nnx(model: Any, name: str) -> Written:
    """The graph of the module is static; its variables become a tree of dicts, by names alone."""

    def made(key: jax.Array) -> tuple[Any, Any]:
        return nnx.split(model if isinstance(model, nnx.Module) else model(rngs=nnx.Rngs(key)))

    try:
        graph, state = jax.eval_shape(made, jax.random.key(0))
    except Exception as error:  # a model of yours may raise anything
        said = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise refuse("model", name, f"cannot be made with rngs alone ({said})") from error
    variables = list(nnx.to_flat_state(state))
    names = {path: tuple(map(str, path)) for path, _ in variables}
    statistics = {names[path] for path, each in variables if isinstance(each, nnx.BatchStat)}
    random = (nnx.RngKey, nnx.RngCount)

    def check(shape: Shape) -> None:
        known = (nnx.Param, nnx.BatchStat, *random)
        others = {type(each).__name__ for _, each in variables if not isinstance(each, known)}
        _refuse_state(name, others)

    def init(key: jax.Array, shape: Shape) -> Params:
        flat = nnx.to_flat_state(made(key)[1])
        return unflatten_dict(
            {names[path]: each[...] for path, each in flat if not isinstance(each, random)}
        )

    def module_of(params: Params, key: jax.Array) -> Any:
        flat, new = flatten_dict(params), []
        for number, (path, each) in enumerate(variables):
            if isinstance(each, nnx.RngKey):
                value = keys.stream(key, "model", number)
            elif isinstance(each, nnx.RngCount):
                value = jnp.uint32(0)
            else:
                value = flat[names[path]]
            new.append((path, each.replace(value)))
        return nnx.merge(graph, nnx.from_flat_state(new))

    def apply(params: Params, images: jax.Array) -> Any:
        module = module_of(params, keys.root(0))  # nothing is random in evaluation
        module.eval()
        return module(images)

    def train(params: Params, images: jax.Array, key: jax.Array) -> Any:
        module = module_of(params, key)
        module.train()
        logits = module(images)
        after = {names[path]: each[...] for path, each in nnx.to_flat_state(nnx.state(module))}
        return logits, [after[path] for path in state_of(params)]

    def state_of(params: Params) -> tuple[Path, ...]:
        return tuple(path for path in flatten_dict(params) if path in statistics)  # pyright: ignore

    modes = any(
        hasattr(each, mode)
        for _, each in nnx.iter_modules(nnx.merge(graph, state))
        for mode in MODES
    )
    return Written(name, check, init, apply, train if modes else None, state_of)
