"""The head stays with the server: split learning."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from noisefl.cohort import Cohort, Members
from noisefl.errors import refuse
from noisefl.local import Own
from noisefl.models import Functions, with_leaves
from noisefl.noise import Path
from noisefl.parts import part, size
from noisefl.probing import Judge
from noisefl.schemes.base import Carry, Issue, Scheme, Slot, uncalibrated

Params = Any


@part
class Withheld(Scheme):
    """Clients receive the trunk of W; its last layers stay with the server.

    In the copy those layers are 0, which everybody can put there. Training goes on jointly: the
    client computes the trunk, the server what lies above, and the gradient comes back through it.
    That is training from W itself, as it is here, with a model at the server for each client
    while it works; both parts are averaged in the end. What a client keeps is the trunk
    that it trained. What passes between the two in a step is not in a thief's view; answers of the
    server's part are what SFL-MEA steals from. A warm-up round would give the head away: layers
    below learn to be read by it as it was initialised (`Warmup(…, warmup_rounds=0)`).

    Attributes:
      withheld_layers: how many layers, from the last one called.

    Raises:
      ValueError: in `fit`, a model that has no more layers than that.

    References:
      Gupta & Raskar 2018, arXiv 1810.06060: split learning. SFL-MEA, arXiv 2303.08581: thieves.
    """

    source: ClassVar[str] = "split learning, arXiv 1810.06060; attacked in SFL-MEA, 2303.08581"
    promise: ClassVar[str] = (
        "no client holds a parameter of the withheld layers; a trunk is there to be taken, and a "
        "head is fitted to it from own data"
    )

    withheld_layers: int = size(1, "last layers that stay with the server", unit="layers")

    def fit(self, model: Functions, image_shape: tuple[int, int, int], cohort: Cohort) -> None:
        there = len(model.layers(image_shape))
        if self.withheld_layers >= there:
            allowed = f"must leave one of the model's {there} layers"
            raise refuse("withheld_layers", self.withheld_layers, allowed)

    def touched(self, model: Functions, image_shape: tuple[int, int, int]) -> tuple[Path, ...]:
        last = model.layers(image_shape)[-self.withheld_layers :]
        return tuple(sorted(path for layer in last for path in layer.parameters))

    def slots(self, cohort: Cohort) -> dict[str, int]:
        return {"copy0": 0}

    def issue(
        self, key: jax.Array, round: jax.Array, base: Params, owner: Params, members: Members,
        judge: Judge, carry: Carry,
    ) -> tuple[Issue, Carry]:  # fmt: skip
        flat: dict[Path, jax.Array] = flatten_dict(base)  # pyright: ignore
        secret = {path: flat[path] for path in self.touched(judge.model, judge.image_shape)}
        return uncalibrated(secret, members), carry

    def copy(self, base: Params, issue: Issue, slot: Slot) -> Params:
        return with_leaves(base, jax.tree.map(jnp.zeros_like, issue.secret))

    def work(
        self, train: Callable[[Params], Params], copy: Params, issue: Issue, slot: Slot, own: Own,
        model: Functions,
    ) -> Params:  # fmt: skip
        return train(with_leaves(copy, issue.secret))

    def kept(self, returned: Params, copy: Params, issue: Issue) -> Params:
        """What was withheld the client never had."""
        blank: dict[Path, jax.Array] = flatten_dict(copy)  # pyright: ignore
        own: dict[Path, jax.Array] = flatten_dict(returned)  # pyright: ignore
        return with_leaves(
            returned,
            {p: jnp.where(issue.protected, blank[p], own[p]) for p in issue.secret},
        )

    def recover(
        self, returned: Params, copy: Params, base: Params, issue: Issue, slot: Slot
    ) -> tuple[Params, Params | None]:
        return jax.tree.map(jnp.subtract, returned, base), None

    def bytes_sent(self, base: Params, issue: Issue) -> jax.Array:
        """Four for each parameter of the trunk; activations and gradients are not counted."""
        here = sum(leaf.size for leaf in issue.secret.values())
        return super().bytes_sent(base, issue) - jnp.where(issue.protected, 4 * here, 0)
