"""Clients get the trunk, and of the head the rows of their own classes alone."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from noisefl.cohort import Cohort, Members
from noisefl.errors import refuse
from noisefl.local import Own
from noisefl.models import Functions, with_leaves
from noisefl.noise import Path
from noisefl.parts import Number, number, part
from noisefl.probing import Judge
from noisefl.schemes.base import Carry, Issue, Scheme, Slot, uncalibrated

Params = Any
NEVER = -1e4  # a logit that much lower is a probability of exactly 0, and so is its gradient


class Rows(NamedTuple):
    """Of the head of each client, float32 [M, C] for each touched parameter: 1 or 0."""

    given: dict[Path, jax.Array]  # W's row is handed out
    owned: dict[Path, jax.Array]  # the client owns an image of the class


@part
class OwnClasses(Scheme):
    """Client k receives W without the head's rows of classes that it does not own: they are 0.

    It trains by a softmax over the classes of its images (other logits count as −∞), so that no
    row moves that it was not given, and none is pushed down by who never sees its class, which is
    what label skew does to FedAvg. Rows of classes that it owns too few images of are 0 in the copy
    as well: it learns them for itself, and they are thrown away. Each row of W moves by the
    mean over the clients that held it, and one that nobody held stays. A round costs what FedAvg's
    does.

    It protects where clients lack classes, and nothing where each owns all of them. The *initial*
    head must stay with the server too: layers below learn to be read by it, and it reads them until
    the end. So no rounds without protection before (`Warmup(…, warmup_rounds=0)`). The server
    learns which classes a client owns; one that lies about them gets what it asked for.

    Attributes:
      least_share: of its images must be of a class, that a client be given its row. 0: one image is
        enough.

    Raises:
      ValueError: in `fit`, a model whose last layer has no bias, or not one output for each class.

    References:
      FedRS (Li & Zhan, KDD 2021): softmax restricted to own classes, there against label skew.
      FedAwS, arXiv 2004.10342: clients that are given their own class's embedding alone.
    """

    source: ClassVar[str] = "ours; restricted softmax as in FedRS (KDD 2021), rows as in 2004.10342"
    promise: ClassVar[str] = (
        "no client receives what tells a class of which it owns no image from the others, and a "
        "coalition holds the rows of its members' classes alone; the trunk is there to be taken"
    )
    partial: ClassVar[bool] = True
    declares: ClassVar[bool] = True

    least_share: Number = number(
        0.0, "of its images are of a class whose row a client is given", low=0, high=1
    )

    def fit(self, model: Functions, image_shape: tuple[int, int, int], cohort: Cohort) -> None:
        last = model.layers(image_shape)[-1]
        shapes: dict[Path, Any] = flatten_dict(model.shapes(image_shape))  # pyright: ignore
        classes = model.classes(image_shape)
        bias = () if last.bias is None else shapes[last.bias].shape
        if bias != (classes,) or shapes[last.kernel].shape[-1] != classes:
            allowed = f"must end in a layer with a kernel [..., {classes}] and a bias [{classes}]"
            raise refuse("model", model.name, allowed)

    def touched(self, model: Functions, image_shape: tuple[int, int, int]) -> tuple[Path, ...]:
        return tuple(sorted(model.layers(image_shape)[-1].parameters))

    def issue(
        self, key: jax.Array, round: jax.Array, base: Params, owner: Params, members: Members,
        judge: Judge, carry: Carry,
    ) -> tuple[Issue, Carry]:  # fmt: skip
        assert members.classes is not None, "declared"
        least = jnp.maximum(self.least_share * members.counts, 1)[:, None]
        paths = self.touched(judge.model, judge.image_shape)
        given, owned = (
            {path: jnp.float32(members.classes >= bound) for path in paths} for bound in (least, 1)
        )
        flat: dict[Path, Any] = flatten_dict(base)  # pyright: ignore
        away = sum(jnp.sum(jnp.square(flat[path] * (1 - mask[0]))) for path, mask in given.items())
        there = sum(jnp.sum(jnp.square(flat[path])) for path in paths)
        issue: Any = uncalibrated(Rows(given, owned), members)
        unseen = jnp.full(members.counts.shape, jnp.nan, jnp.float32)
        strength = jnp.sqrt(away / there)
        return issue.replace(relative_strength=strength, accuracy=unseen), carry

    def copy(self, base: Params, issue: Issue, slot: Slot) -> Params:
        flat: dict[Path, Any] = flatten_dict(base)  # pyright: ignore
        rows = {path: flat[path] * mask[slot.index] for path, mask in issue.secret.given.items()}
        return with_leaves(base, rows)

    def work(
        self, train: Callable[[Params], Params], copy: Params, issue: Issue, slot: Slot, own: Own,
        model: Functions,
    ) -> Params:  # fmt: skip
        flat: dict[Path, Any] = flatten_dict(copy)  # pyright: ignore
        # The bias is told from the kernel by its shape: one number for each class.
        barred = {path: jnp.where(mask[slot.index] > 0, flat[path], NEVER)
                  for path, mask in issue.secret.owned.items() if flat[path].ndim == 1}  # fmt: skip
        trained: dict[Path, Any] = flatten_dict(train(with_leaves(copy, barred)))  # pyright: ignore
        rows = {path: jnp.where(mask[slot.index] > 0, trained[path], 0)
                for path, mask in issue.secret.owned.items()}  # fmt: skip
        return unflatten_dict({**trained, **rows})

    def recover(
        self, returned: Params, copy: Params, base: Params, issue: Issue, slot: Slot
    ) -> tuple[Params, Params | None]:
        masks: dict[Path, Any] = flatten_dict(jax.tree.map(jnp.ones_like, base))  # pyright: ignore
        for path, mask in issue.secret.given.items():
            masks[path] *= mask[slot.index]
        return jax.tree.map(jnp.subtract, returned, copy), unflatten_dict(masks)

    def bytes_sent(self, base: Params, issue: Issue) -> jax.Array:
        """Of the copy in slot 0: four for each parameter, less the rows it is not given."""
        flat: dict[Path, Any] = flatten_dict(base)  # pyright: ignore
        absent = sum(jnp.sum(jnp.ones_like(flat[path]) * (1 - mask[0]))
                     for path, mask in issue.secret.given.items())  # fmt: skip
        return super().bytes_sent(base, issue) - 4 * absent
