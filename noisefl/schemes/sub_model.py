"""A part of the network's units instead of a degraded whole."""

import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from noisefl import keys
from noisefl.cohort import Cohort, Members
from noisefl.errors import refuse
from noisefl.models import Functions, Layer
from noisefl.noise import Path
from noisefl.parts import choice, part
from noisefl.probing import Judge
from noisefl.schemes.base import Calibrated, Carry, Issue, Slot

Params = Any


@struct.dataclass
class Units:
    """Which hidden units are held, as keys and numbers."""

    key: jax.Array  # of the order of the units
    clients: jax.Array  # int32 [V], whose order it is: of "sticky"
    round: jax.Array  # int32 [], t: of "rolling"
    chain: tuple[Layer, ...] = struct.field(pytree_node=False)  # the layers in call order


@part
class SubModel(Calibrated):
    """A client holds ⌈units / (1 + strength)⌉ units of each hidden layer; the rest of W is 0.

    A unit is an output channel of a convolution or a dense layer; the outputs of the last layer
    are all held. With a unit go its column of the kernel [..., units], its bias, and the rows of
    the next layer that read it: rows of a dense layer above an image [H, W, units] are
    reshaped (H W, units). Where activations f have f(0) = 0 the copy *is* the smaller network, in
    training too; nothing is scaled up in return (HeteroFL's scaler). Each coordinate of W moves by
    the mean over the clients that held it, and one that nobody held keeps W.

    *sticky*: each client its own random units, the same in every round, as in HeteroFL with fixed
    capacities and Split-Mix; less of them where the strength is larger, so that a client with more
    rounds has the largest of its shares. V = M. *rolling*: one window for all, which moves by a
    unit a round from a secret start (FedRolex), so that whoever stays sees all units: V = 1.

    Nothing is left for a calibrator to draw again: the strength alone helps.

    Attributes:
      units: see above.

    Raises:
      ValueError: in `fit`, a layer does not read the outputs of the one called before it, as told
        by shapes. Parameters outside of layers, such as a normalisation's, are all held; with
        them the copy computes something else than the smaller network would.

    References:
      HeteroFL, arXiv 2010.01264. Split-Mix, arXiv 2203.09747. FedRolex, arXiv 2212.01548.
    """

    source: ClassVar[str] = "Split-Mix, arXiv 2203.09747; FedRolex, arXiv 2212.01548"
    promise: ClassVar[str] = (
        "a sticky client never receives a unit outside of its largest share; clients together, and "
        "one client's rounds if rolling, hold every unit in the end"
    )
    moves: ClassVar[str] = "discrete"
    partial: ClassVar[bool] = True

    units: str = choice(
        "sticky", ("sticky", "rolling"), "a client's own units for ever, or one window that moves"
    )

    def fit(self, model: Functions, image_shape: tuple[int, int, int], cohort: Cohort) -> None:
        flat: dict[Path, Any] = flatten_dict(model.shapes(image_shape))  # pyright: ignore
        for below, above in itertools.pairwise(model.layers(image_shape)):
            made, read = (flat[layer.kernel].shape for layer in (below, above))
            flattened = len(made) > 2 and len(read) == 2  # an image becomes rows
            if read[-2] % made[-1] if flattened else read[-2] != made[-1]:
                names = "/".join(below.path), "/".join(above.path)
                allowed = f"{names[1]} {read} does not read the outputs of {names[0]} {made}"
                raise refuse("model", "/".join(names), allowed)

    def slots(self, cohort: Cohort) -> dict[str, int]:
        return {"copy0": 0} if self.units == "rolling" else super().slots(cohort)

    def variants(self, members: Members) -> int:
        return 1 if self.units == "rolling" else super().variants(members)

    def init(self, key: jax.Array, base: Params) -> Carry:
        """(key of who holds what, the calibrator's carry)."""
        return keys.stream(key, "units"), self.calibrator.init()

    def issue(
        self, key: jax.Array, round: jax.Array, base: Params, owner: Params, members: Members,
        judge: Judge, carry: Carry,
    ) -> tuple[Issue, Carry]:  # fmt: skip
        sticky, carry = carry
        layers = judge.model.layers(judge.image_shape)
        drawn = Units(sticky, members.clients, round, layers)
        issue, carry = self.calibrated(lambda key: drawn, key, base, members, judge, carry)
        return issue, (sticky, carry)

    def held(self, base: Params, draw: Units, strength: jax.Array, variant: jax.Array) -> Params:
        """float32 [...] of the shapes of W: 1 where copy v, int32 [], holds it, else 0."""
        flat: dict[Path, jax.Array] = flatten_dict(base)  # pyright: ignore
        masks = {path: jnp.ones_like(leaf) for path, leaf in flat.items()}
        for place, (layer, above) in enumerate(itertools.pairwise(draw.chain)):
            units = flat[layer.kernel].shape[-1]
            order = self._order(keys.stream(draw.key, "layer", place), units, draw, variant)
            mine = jnp.float32(order < jnp.ceil(units / (1 + strength)))
            for path in layer.parameters:
                masks[path] *= mine
            rows = above.kernel
            masks[rows] *= jnp.tile(mine, flat[rows].shape[-2] // units)[:, None]
        return unflatten_dict(masks)

    def _order(self, key: jax.Array, units: int, draw: Units, variant: jax.Array) -> jax.Array:
        """int32 [units]: the units with the smallest are held."""
        if self.units == "rolling":
            start = jax.random.randint(key, (), 0, units) + draw.round
            return (jnp.arange(units) - start) % units
        return jax.random.permutation(keys.stream(key, "client", draw.clients[variant]), units)

    def variant(self, base: Params, draw: Units, strength: jax.Array, variant: jax.Array) -> Params:
        held = self.held(base, draw, strength, variant)
        return jax.tree.map(lambda w, mask: jnp.where(mask > 0, w, 0), base, held)

    def recover(
        self, returned: Params, copy: Params, base: Params, issue: Issue, slot: Slot
    ) -> tuple[Params, Params | None]:
        mask = self.held(base, issue.secret.draw, issue.secret.strength, slot.index)
        return jax.tree.map(jnp.subtract, returned, copy), mask

    def bytes_sent(self, base: Params, issue: Issue) -> jax.Array:
        """Four for each parameter that is held: as many in every copy."""
        held = self.held(base, issue.secret.draw, issue.secret.strength, jnp.int32(0))
        return 4 * sum((jnp.sum(mask) for mask in jax.tree.leaves(held)), jnp.float32(0))
