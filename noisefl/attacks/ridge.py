"""A head in closed form: ridge regression on the copy's features (PROTECTION.md, "Thieves")."""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.scipy.linalg import lu_factor, lu_solve

from noisefl.attacks.base import Attack, Params, Public, View, newest
from noisefl.errors import refuse
from noisefl.local import Own
from noisefl.models import Functions
from noisefl.parts import Number, number, part
from noisefl.split import Split

FACTORS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)  # times `ridge`: the candidates
CORRECTIONS = 2  # of the solution


@part
class Ridge(Attack):
    """The last layer is replaced by ridge regression of the labels, one-hot and less 1 / C, on its
    inputs. Of the newest copy; all that lies below stays as it is."""

    ridge: Number = number(0.1, "λ, in mean variances of a feature; middle of those tried", low=0)

    def fit(self, model: Functions, image_shape: tuple[int, int, int]) -> None:
        layers = model.layers(image_shape)
        if not layers or layers[-1].convolution or layers[-1].bias is None:
            raise refuse("model", model.name, "its last layer must be dense, with a bias")
        images = jax.ShapeDtypeStruct((2, *image_shape), jnp.uint8)
        below, shapes = Split(model, (layers[-1].kernel,)).below, model.shapes(image_shape)
        found = jax.eval_shape(lambda p, x: below(p, x, 2), shapes, images)
        if found.ndim != 2:
            raise refuse("model", model.name, "its last layer must take features [N, F]")

    def candidates(self) -> list[Attack]:
        return [self.replace(ridge=self.ridge * factor) for factor in FACTORS]

    def steal(self, key: jax.Array, view: View, own: Own, public: Public) -> Params:
        model = public.functions
        copy, last = newest(view, view.copies), model.layers(public.image_shape)[-1]
        below = Split(model, (last.kernel,)).below
        features = below(copy, own.images[own.rows], public.batch)
        flat: dict = flatten_dict(copy)  # pyright: ignore[reportAssignmentType]
        classes = flat[last.kernel].shape[-1]
        targets = jax.nn.one_hot(own.labels[own.rows], classes) - 1 / classes
        valid = jnp.arange(own.rows.shape[0]) < own.count
        kernel, bias = head(features, targets, valid, self.ridge)
        return unflatten_dict({**flat, last.kernel: kernel, last.bias: bias})


def head(
    features: jax.Array, targets: jax.Array, valid: jax.Array, ridge: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Minimises mean ‖V x + b − y‖² + λ ‖V‖², b free.

    With x and y less their means this is (X'X / n + λ I) V = X'Y / n. The equations are scaled to
    a diagonal of 1, and what float32 made of them is corrected by the residuals Y − X V of the data
    (corrected seminormal equations; Björck, Linear Algebra Appl. 88, 1987).

    Args:
      features: float32 [N, F], x.
      targets: float32 [N, C], y.
      valid: bool [N]: rows that count.
      ridge: λ over the mean variance of a feature, float32 []. At 0 an affine map of features of
        full rank is found exactly; a feature that never changes gets the weight 0.

    Returns:
      kernel [F, C] and bias [C].
    """
    count = jnp.maximum(jnp.sum(valid), 1)

    def centred(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = jnp.sum(jnp.where(valid[:, None], rows, 0), axis=0) / count
        return jnp.where(valid[:, None], rows - mean, 0), mean

    def times(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(left, right, precision="highest")

    x, mean_x = centred(features)
    y, mean_y = centred(targets)
    gram = times(x.T, x) / count
    penalty = ridge * jnp.mean(jnp.diagonal(gram))
    gram = gram + penalty * jnp.eye(gram.shape[0])
    diagonal = jnp.diagonal(gram)
    some = diagonal > 0
    scale = jnp.where(some, jax.lax.rsqrt(jnp.where(some, diagonal, 1)), 0)
    gram = gram * scale[:, None] * scale + jnp.diag(jnp.where(some, 0.0, 1.0))
    factors = lu_factor(gram)
    kernel = jnp.zeros((x.shape[1], y.shape[1]))
    for _ in range(1 + CORRECTIONS):
        left = times(x.T, y - times(x, kernel)) / count - penalty * kernel
        kernel = kernel + scale[:, None] * lu_solve(factors, scale[:, None] * left)
    return kernel, mean_y - times(mean_x, kernel)
