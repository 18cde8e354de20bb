"""Server optimizers: from the clients' averaged update to the new base W (Reddi et al. 2021)."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from noisefl.optimizers import check_factory
from noisefl.parts import Number, Part, number, numbers, part, static

Params = Any


@part
class Server(Part):
    """Base: treats the averaged update, negated, as a gradient of W (arXiv 2003.00295, alg. 1)."""

    abstract: ClassVar[bool] = True

    def transformation(self) -> optax.GradientTransformation:
        """The optax transformation."""
        raise NotImplementedError

    def init(self, base: Params) -> Any:
        """Its state before the first round."""
        return self.transformation().init(base)

    def step(self, base: Params, update: Params, state: Any) -> tuple[Params, Any]:
        """(new W, new state)."""
        gradient = jax.tree.map(jnp.negative, update)
        change, state = self.transformation().update(gradient, state, base)
        return optax.apply_updates(base, change), state


@part
class SGD(Server):
    """W ← W + rate · update; at rate 1 that is W ← Σ (n_k / n) w_k, the source's."""

    server_learning_rate: Number = number(
        1.0, "of the server's step along the averaged update", low=0, inside="()"
    )

    def transformation(self) -> optax.GradientTransformation:
        return optax.sgd(self.server_learning_rate)


@part
class Optax(Server):
    """Any optax optimizer: FedAdam is `Optax(optax.adam, {"learning_rate": 0.01})`."""

    factory: Callable[..., optax.GradientTransformation] = static(
        optax.adam, "module-level function that builds the transformation"
    )
    numbers: dict[str, Any] = numbers({"learning_rate": 0.01}, "its numbers by name")

    def check(self) -> None:
        check_factory(self.factory)

    def transformation(self) -> optax.GradientTransformation:
        return self.factory(**self.numbers)
