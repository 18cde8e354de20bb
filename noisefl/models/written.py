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

    def made(key: jax.Array) -> Any:
        return model if isinstance(model, nnx.Module) else model(rngs=nnx.Rngs(key))

    def split(module: Any) -> tuple[Any, Any, Any, Any]:
        graph, *states = nnx.split(module, nnx.Param, nnx.BatchStat, ...)
        params, statistics, others = (list(nnx.to_flat_state(state)) for state in states)
        return graph, params, statistics, others

    def names(path: Any) -> Path:
        return tuple(map(str, path))

    def init(key: jax.Array, shape: Shape) -> Params:
        _, params, statistics, _ = split(made(key))
        return unflatten_dict({names(path): leaf[...] for path, leaf in [*params, *statistics]})

    def module_of(params: Params, key: jax.Array | None) -> Any:
        # Its own numbers, drawn anew here, are replaced: nothing asks for them.
        graph, *states, others = split(made(jax.random.key(0)))
        flat = flatten_dict(params)
        new = [(path, leaf.replace(flat[names(path)])) for state in states for path, leaf in state]
        if key is not None:
            others = [
                (path, leaf.replace(jax.random.fold_in(key, number)))
                if isinstance(leaf, nnx.RngKey)
                else (path, leaf.replace(jnp.zeros_like(leaf[...])))
                for number, (path, leaf) in enumerate(others)
            ]
        module = nnx.merge(graph, nnx.from_flat_state([*new, *others]))
        module.train() if key is not None else module.eval()
        return module

    def apply(params: Params, images: jax.Array) -> Any:
        return module_of(params, None)(images)

    def train(params: Params, images: jax.Array, key: jax.Array) -> Any:
        module = module_of(params, key)
        logits = module(images)
        flat = {names(path): leaf[...] for path, leaf in split(module)[2]}
        return logits, [flat[path] for path in state_of(params)]

    def state_of(params: Params) -> tuple[Path, ...]:
        known = {names(path) for path, _ in split(abstract)[2]}
        return tuple(path for path in flatten_dict(params) if path in known)  # pyright: ignore

    def check(shape: Shape) -> None:
        kinds = {type(variable) for _, variable in split(abstract)[3]}
        _refuse_state(name, {kind.__name__ for kind in kinds - {nnx.RngKey, nnx.RngCount}})

    is_made = isinstance(model, nnx.Module)
    abstract: Any = model if is_made else nnx.eval_shape(lambda: made(jax.random.key(0)))
    modes = any(hasattr(each, mode) for _, each in nnx.iter_modules(abstract) for mode in MODES)
    return Written(name, check, init, apply, train if modes else None, state_of)
