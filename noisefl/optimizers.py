"""Optimizers as parts: their numbers are traced, and the optax transformation is built inside.

An optax transformation is made of functions, so that it can be no leaf, and two equal ones are two
programs. A part keeps the factory, which is static, and its numbers, which are not.
"""

from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import jax
import optax

from noisefl.errors import refuse
from noisefl.parts import Number, Part, number, numbers, part, static


@part
class Optimizer(Part):
    """Base: what local training makes of a gradient, begun afresh by every client in every
    round."""

    abstract: ClassVar[bool] = True

    def transformation(self, round: jax.Array) -> optax.GradientTransformation:
        """The optax transformation of round t, int32 [] from 1."""
        raise NotImplementedError


@part
class SGD(Optimizer):
    """Stochastic gradient descent (McMahan et al. 2017, ClientUpdate; ALGORITHM.md, "One
    round")."""

    learning_rate: Number = number(
        0.1, "η of local SGD", unit="step per unit of gradient", low=0, inside="()"
    )
    learning_rate_decay: Number = number(
        1.0, "η of round t is η · decay^(t − 1)", unit="factor a round", low=0, high=1, inside="(]"
    )
    momentum: Number | None = number(
        None, "of local SGD", low=0, high=1, inside="[)", none="plain SGD"
    )
    clip_norm: Number | None = number(
        None, "largest global norm of a local gradient", low=0, inside="()", none="no clipping"
    )

    def transformation(self, round: jax.Array) -> optax.GradientTransformation:
        rate = self.learning_rate * self.learning_rate_decay ** (round - 1)
        sgd = optax.sgd(rate, self.momentum)
        if self.clip_norm is None:
            return sgd
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), sgd)  # pyright: ignore


@part
class Optax(Optimizer):
    """Any optax optimizer: `Optax(optax.adam, {"learning_rate": 1e-3})`."""

    factory: Callable[..., optax.GradientTransformation] = static(
        optax.adam, "module-level function that builds the transformation"
    )
    numbers: dict[str, Any] = numbers({"learning_rate": 1e-3}, "its numbers by name")

    def check(self) -> None:
        check_factory(self.factory)

    def transformation(self, round: jax.Array) -> optax.GradientTransformation:
        del round
        return self.factory(**self.numbers)


@part
class Opaque(Optimizer):
    """An optax transformation as it is. Compiles once an instance; none of its numbers is
    traced."""

    given: optax.GradientTransformation = static(optax.identity(), "an optax transformation")

    def check(self) -> None:
        if not isinstance(self.given, optax.GradientTransformation):
            raise refuse("given", self.given, "must be an optax transformation")

    def transformation(self, round: jax.Array) -> optax.GradientTransformation:
        del round
        return self.given


def check_factory(factory: Any) -> None:
    """Raises ValueError where it cannot be called, or be what a program is compiled for."""
    if not (callable(factory) and isinstance(factory, Hashable)):
        raise refuse("factory", factory, "must be a function that returns an optax transformation")


def taken(given: Any) -> Optimizer:
    """A part as it is, and an optax transformation as `Opaque`.

    Raises:
      ValueError: it is neither.
    """
    if isinstance(given, Optimizer):
        return given
    if isinstance(given, optax.GradientTransformation):
        return Opaque(given)
    allowed = "must be a part of noisefl.optimizers, or an optax transformation"
    raise refuse("optimizer", type(given).__name__, allowed)
