"""What a round needs of a model, whatever it is written in: init, evaluation, training, layers."""

import functools
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from noisefl.errors import refuse
from noisefl.models.lowering import Lowering
from noisefl.models.program import Layer, Path, Program, trace
from noisefl.models.written import Shape, Written, written

Params = Any
Channels = tuple[tuple[float, ...], tuple[float, ...]]  # means and deviations, each [Ch]
Model = Any  # a Flax module of linen or of nnx, or a pair (init, apply)


class Functions(NamedTuple):
    """A model as pure functions.

    Its parameters are one tree of nested dicts, running statistics among them: whatever is done to
    a model, such as averaging, is done to them too.

    Attributes:
      written: the model's own functions.
      lowering: how operations are evaluated in a round.
      program: (params, images) → what evaluation is, for arrays of these shapes.
      training_program: (params, images, key) → what training is.
      shapes: image_shape → those of the parameters, `jax.ShapeDtypeStruct` leaves.
    """

    written: Written
    lowering: Lowering
    program: Callable[[Params, Any], Program]
    training_program: Callable[[Params, Any, Any], Program]
    shapes: Callable[[Shape], Params]

    @property
    def name(self) -> str:
        return self.written.name

    @property
    def has_modes(self) -> bool:
        """Training differs from evaluation."""
        return self.written.train is not None

    def init(self, key: jax.Array, image_shape: Shape) -> Params:
        return self.written.init(key, image_shape)

    def apply(self, params: Params, images: jax.Array) -> jax.Array:
        """Logits [B, C] of images float32 [B, H, W, Ch] in [0, 1], as evaluated."""
        program = self.program(params, images)
        if len(program.outs) != 1:
            returns = f"returns {len(program.outs)} arrays"
            raise refuse("model", self.name, f"must return logits alone, and {returns}")
        return program.run(params, [images], self.lowering)[0]

    def train(
        self, params: Params, images: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[Path, jax.Array]]:
        """Logits [B, C] in training, and the running statistics after that batch by path.

        Args:
          params, images: as of `apply`.
          key: of what is random in training, such as dropout.
        """
        if not self.has_modes:
            return self.apply(params, images), {}
        program = self.training_program(params, images, key)
        logits, *state = program.run(params, [images, key], self.lowering)
        return logits, dict(zip(self.state_of(params), state, strict=True))

    def state_of(self, params: Params) -> tuple[Path, ...]:
        """Paths of the running statistics, which no gradient moves."""
        return self.written.state_of(params)

    def state(self, image_shape: Shape) -> tuple[Path, ...]:
        """The same, of the model on such images."""
        return self.state_of(self.shapes(image_shape))

    def classes(self, image_shape: Shape) -> int:
        """C, the logits of an image."""
        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        return jax.eval_shape(self.apply, self.shapes(image_shape), images).shape[-1]

    def layers(self, image_shape: Shape) -> tuple[Layer, ...]:
        """The layers that multiply by parameters, in the order of their first use."""
        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        return self.program(self.shapes(image_shape), images).layers()


def with_leaves(params: Params, others: dict[Path, jax.Array]) -> Params:
    """The parameters with others, [...] of the same shapes, in some places."""
    return unflatten_dict({**flatten_dict(params), **others}) if others else params


def functions(
    model: Model, lowering: Lowering | None = None, channels: Channels | None = None
) -> Functions:
    """A model as pure functions.

    Args:
      model: a linen module; a class of nnx modules that is made with `rngs` alone, or a
        `functools.partial` of one; an nnx module, whose weights every run then begins with; or a
        pair `(init(key, images) → params, apply(params, images) → logits)`.
      lowering: of its operations.
      channels: what a pixel in [0, 1] is less of, and then divided by, before the model sees it.

    Raises:
      ValueError: it is none of them, or has state that is no running statistics.
    """
    if not isinstance(lowering, Lowering | None):
        raise refuse("lowering", lowering, "must be a noisefl.models.Lowering, or None")
    if channels is not None:
        check_channels(channels)
    try:
        return _functions(model, lowering or Lowering(), channels)
    except TypeError as error:  # a module with a field that is
        if "unhashable" not in str(error):
            raise
        return _functions.__wrapped__(model, lowering or Lowering(), channels)


@functools.lru_cache(maxsize=64)
def _functions(model: Model, lowering: Lowering, channels: Channels | None) -> Functions:
    own = written(model) if channels is None else _normalised(written(model), channels)

    @functools.lru_cache(maxsize=64)
    def traced(function: Any, tree: Any, leaves: tuple[Any, ...], *inputs: Any) -> Program:
        return trace(function, jax.tree.unflatten(tree, leaves), *inputs)

    def program_of(function: Any) -> Callable[..., Program]:
        def program(params: Params, *inputs: Any) -> Program:
            leaves, tree = jax.tree.flatten(params)
            return traced(function, tree, tuple(map(_shape, leaves)), *map(_shape, inputs))

        return program

    @functools.lru_cache(maxsize=8)
    def shapes(image_shape: Shape) -> Params:
        return _checked(own, image_shape)

    return Functions(own, lowering, program_of(own.apply), program_of(own.train), shapes)


def check_channels(channels: Any) -> None:
    """Raises ValueError where it is not means and deviations, of as many channels."""
    both = isinstance(channels, tuple) and len(channels) == 2
    if not both or not all(isinstance(numbers, tuple) for numbers in channels):
        raise refuse("channels", channels, "must be means and deviations, a tuple of each")
    means, deviations = channels
    finite = all(isinstance(n, Real) and np.isfinite(float(n)) for n in (*means, *deviations))
    if not (finite and len(means) == len(deviations) > 0 and min(deviations) > 0):
        allowed = "must be finite, as many means as deviations, and these above 0"
        raise refuse("channels", channels, allowed)


def _checked(model: Written, image_shape: Shape) -> Params:
    """The shapes of a model's parameters.

    Raises:
      ValueError: it does not take such images, or what it holds or returns is no parameters and no
        logits.
    """
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    try:
        model.check(image_shape)
        params = jax.eval_shape(lambda key: model.init(key, image_shape), jax.random.key(0))
        logits = jax.eval_shape(model.apply, params, images)
        statistics = set(model.state_of(params)) if isinstance(params, dict) else set()
    except Exception as error:  # a model of yours may raise anything
        said = str(error).strip().partition("\n")[0]
        if isinstance(error, ValueError) and said.startswith("model="):
            raise
        said = f"{type(error).__name__}: {said}"[:200]
        allowed = f"does not take images of shape {image_shape} ({said})"
        raise refuse("model", model.name, allowed) from error
    flat: Any = flatten_dict(params) if isinstance(params, dict) else {}
    named = all(isinstance(name, str) for path in flat for name in path)
    if not flat or not named or not all(
        isinstance(leaf, jax.ShapeDtypeStruct)
        and (jnp.issubdtype(leaf.dtype, jnp.floating) or path in statistics)
        for path, leaf in flat.items()
    ):  # fmt: skip
        allowed = "must have parameters: a dict of dicts, by names, of arrays of floats"
        raise refuse("model", model.name, allowed)
    for path, leaf in flat.items():
        if 0 in leaf.shape:  # nothing is left of the images where that layer looks
            said = f"{'/'.join(path)} is of shape {leaf.shape}"
            allowed = f"does not take images of shape {image_shape} ({said})"
            raise refuse("model", model.name, allowed)
    array = isinstance(logits, jax.ShapeDtypeStruct) and jnp.issubdtype(logits.dtype, jnp.floating)
    if not array or len(logits.shape) != 2 or logits.shape[0] != 2 or not logits.shape[1]:
        found = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", logits)
        allowed = f"must return logits alone, floats [B, C], and returns {found} of two images"
        raise refuse("model", model.name, allowed)
    return params


def _normalised(model: Written, channels: Channels) -> Written:
    means, deviations = (np.array(numbers, np.float32) for numbers in channels)

    def apply(params: Params, images: jax.Array) -> jax.Array:
        return model.apply(params, (images - means) / deviations)

    def train(params: Params, images: jax.Array, key: jax.Array) -> Any:
        assert model.train is not None
        return model.train(params, (images - means) / deviations, key)

    return model._replace(apply=apply, train=model.train and train)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
