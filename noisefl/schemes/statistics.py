"""Nothing that was trained is handed out: clients send statistics of fixed random features."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from noisefl.cohort import Cohort, Members
from noisefl.errors import refuse
from noisefl.local import Own
from noisefl.models import Functions
from noisefl.noise import Path
from noisefl.parts import Number, number, part, size
from noisefl.probing import Judge
from noisefl.schemes.base import Carry, Issue, Scheme, Slot, uncalibrated
from noisefl.split import Split

Params = Any
Sums = dict[str, jax.Array]  # "gram" float32 [F + 1, F + 1], "cross" float32 [F + 1, C]


@part
class Statistics(Scheme):
    """Clients compute features φ of their images, and return Σ φ φᵀ and Σ φ yᵀ.

    φ is what enters the last dense layer, F numbers and a constant 1, under the layers below it as
    they were initialised: these are never trained. y is one-hot, [C]. The server adds up the sums
    of all rounds, and the head of W is the ridge regression on them,

        H = (Σ φ φᵀ / n + ridge · I)⁻¹ Σ φ yᵀ / n,   [F + 1, C], the bias in its last row,

    which does not know how images lie among clients. A client that takes part in J rounds is
    counted J times: the sampling of the cohort evens that out. The copy is W with its head 0.

    Attributes:
      ridge: on the mean of φ φᵀ, the constant's included.
      at_once: images whose features are computed in one pass, for speed alone.

    Raises:
      ValueError: in `fit`, a model whose last layer is not dense with parameters `kernel` and
        `bias`, reads another thing than [B, F], or has as many outputs as another dense layer reads
        inputs (it is told by that: `init` and `combine` see parameters alone).

    References:
      AFL, arXiv 2405.16240. Fed3R, arXiv 2406.01116.
    """

    untrained: ClassVar[str] = "none"
    wrappable: ClassVar[bool] = False
    source: ClassVar[str] = "AFL, arXiv 2405.16240; Fed3R, arXiv 2406.01116"
    promise: ClassVar[str] = (
        "clients receive random numbers that no data have touched, so that a thief has what it "
        "would have from scratch"
    )

    ridge: Number = number(1e-3, "λ, on the mean of φ φᵀ", low=0, inside="()")
    at_once: int = size(100, "images whose features are computed in one pass", unit="images")

    def fit(self, model: Functions, image_shape: tuple[int, int, int], cohort: Cohort) -> None:
        params: Any = model.shapes(image_shape)
        last, name = model.layers(image_shape)[-1].path, model.name
        if _head(params) != last or set(_of(params, last)) != {"kernel", "bias"}:
            allowed = (
                "must end in a dense layer with a bias, of another size than any layer's input"
            )
            raise refuse("model", name, allowed)
        images = jax.ShapeDtypeStruct((2, *image_shape), jnp.uint8)
        split = Split(model, ((*last, "kernel"),))
        found = jax.eval_shape(lambda p, x: split.below(p, x, 2), params, images)
        if found.shape != (2, _of(params, last)["kernel"].shape[0]):
            allowed = f"its last layer must read [B, F], and reads {list(found.shape)}"
            raise refuse("model", name, allowed)

    def touched(self, model: Functions, image_shape: tuple[int, int, int]) -> tuple[Path, ...]:
        last = model.layers(image_shape)[-1].path
        return tuple(p for p in super().touched(model, image_shape) if p[:-1] == last)

    def slots(self, cohort: Cohort) -> dict[str, int]:
        return {"copy0": 0}

    def init(self, key: jax.Array, base: Params) -> Carry:
        """(the sums, how many images stand behind them)."""
        return _nothing(base), jnp.float32(0)

    def issue(
        self, key: jax.Array, round: jax.Array, base: Params, owner: Params, members: Members,
        judge: Judge, carry: Carry,
    ) -> tuple[Issue, Carry]:  # fmt: skip
        """The server keeps no secret, but n of the round's mean, float32 []."""
        return uncalibrated(jnp.sum(members.counts, dtype=jnp.float32), members), carry

    def copy(self, base: Params, issue: Issue, slot: Slot) -> Params:
        head = _of(base, _head(base))
        return _with_head(base, jax.tree.map(jnp.zeros_like, head))

    def work(
        self, train: Callable[[Params], Params], copy: Params, issue: Issue, slot: Slot, own: Own,
        model: Functions,
    ) -> Sums:  # fmt: skip
        """Means over the client's own images, "gram" [F + 1, F + 1] and "cross" [F + 1, C]."""
        last = _head(copy)
        classes = _of(copy, last)["kernel"].shape[-1]
        split, padded = Split(model, ((*last, "kernel"),)), own.rows.shape[0]
        batch = min(self.at_once, padded)
        short = -padded % batch
        rows = jnp.pad(own.rows, (0, short)).reshape(-1, batch)
        valid = (jnp.arange(padded + short) < own.count).reshape(-1, batch)

        def add(sums: Sums, some: tuple[jax.Array, jax.Array]) -> tuple[Sums, None]:
            rows, valid = some
            features = split.below(copy, own.images[rows], batch)
            features = jnp.pad(features, ((0, 0), (0, 1)), constant_values=1)
            features = jnp.where(valid[:, None], features, 0)
            classes_of = jax.nn.one_hot(own.labels[rows], classes)
            exact = lax.Precision.HIGHEST  # sums of products are inverted later
            new = {
                "gram": jnp.matmul(features.T, features, precision=exact),
                "cross": jnp.matmul(features.T, classes_of, precision=exact),
            }
            return jax.tree.map(jnp.add, sums, new), None

        sums = lax.scan(add, _nothing(copy), (rows, valid))[0]
        return jax.tree.map(lambda total: total / jnp.maximum(own.count, 1), sums)

    def kept(self, returned: Sums, copy: Params, issue: Issue) -> Params:
        """The random layers: there is nothing else."""
        return copy

    def recover(
        self, returned: Any, copy: Params, base: Params, issue: Issue, slot: Slot
    ) -> tuple[Any, Params | None]:
        return returned, None

    def combine(
        self, averaged: Sums, base: Params, issue: Issue, carry: Carry
    ) -> tuple[Params, Carry]:
        """The ridge on all sums so far, as an update of the head; that of all else is 0."""
        sums, images = carry
        sums = jax.tree.map(lambda total, mean: total + issue.secret * mean, sums, averaged)
        images += issue.secret
        gram, cross = (sums[name] / jnp.maximum(images, 1) for name in ("gram", "cross"))
        penalty = self.ridge * jnp.eye(gram.shape[0])
        solved = jax.scipy.linalg.solve(gram + penalty, cross, assume_a="pos")
        change = {
            name: new - _of(base, _head(base))[name]
            for name, new in (("kernel", solved[:-1]), ("bias", solved[-1]))
        }
        return _with_head(jax.tree.map(jnp.zeros_like, base), change), (sums, images)


def _head(params: Params) -> tuple[str, ...]:
    """The one dense layer whose outputs no other reads, told by shapes; () if it is not one."""
    flat: dict[Path, Any] = flatten_dict(params)  # pyright: ignore
    dense = {
        path[:-1]: leaf.shape
        for path, leaf in flat.items()
        if path[-1] == "kernel" and len(leaf.shape) == 2
    }
    found = [
        layer
        for layer, (_, made) in dense.items()
        if not any(read == made for other, (read, _) in dense.items() if other != layer)
    ]
    return found[0] if len(found) == 1 else ()


def _of(params: Params, layer: tuple[str, ...]) -> dict[str, Any]:
    """The parameters of a layer by name."""
    flat: dict[Path, Any] = flatten_dict(params)  # pyright: ignore
    return {path[-1]: leaf for path, leaf in flat.items() if path[:-1] == layer}


def _with_head(params: Params, head: dict[str, jax.Array]) -> Params:
    last = _head(params)
    new = {(*last, name): leaf for name, leaf in head.items()}
    return unflatten_dict({**flatten_dict(params), **new})


def _nothing(params: Params) -> Sums:
    """The sums of no images."""
    features, classes = _of(params, _head(params))["kernel"].shape
    wide = features + 1
    return {"gram": jnp.zeros((wide, wide)), "cross": jnp.zeros((wide, classes))}
