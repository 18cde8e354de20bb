"""A differentially private release of W in every round."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from noisefl.cohort import Cohort
from noisefl.errors import refuse
from noisefl.models import Functions
from noisefl.noise import Path
from noisefl.parts import Number, number, part
from noisefl.schemes.base import Issue, OneCopy, Slot

Params = Any


@part
class Released(OneCopy):
    """All clients receive clip(W) + N, and nothing is taken out of what comes back.

    Each layer l is scaled down to the L2 norm C_l = clip · √O where it is longer; O are its
    outputs, and √O the norm that the usual initialisation (LeCun) gives it, which is public. To
    each of its n_l parameters N adds a normal of deviation strength · C_l / √n_l: at strength 1
    the noise of a layer is as long as the longest layer that passes the clip. Nothing is exempt,
    since a parameter that is released as it is would void what follows.

    *What one release promises.* Any two W differ by at most 2 C_l in a layer, hence by
    μ = 2 √n / strength deviations of the noise, n = Σ n_l: the Gaussian mechanism of that μ, which
    is (ε, δ)-differentially private with

        δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ)        (Balle & Wang 2018, theorem 8)

    and at least with ε = μ √(2 ln(1.25 / δ)) where that is below 1 (Dwork & Roth 2014, A.1). n is
    large: strengths at which something can be trained have an ε in the hundreds.

    *What it does not promise.* J rounds compose: to √J μ, if they have one strength. A calibrator
    that looks at W makes strength and draw depend on it, and voids the promise (`Unverified` does
    not look). It is of W and so of any client's data, but not of what clients return.

    At strength 0 the copy is W, without the clip. Noise has mean 0; a clip that acts has not, and
    pulls the base towards it: W' = clip(W) + mean of N + mean of what was learnt. The update of
    untrained copies has mean 0 where no layer is longer than its C_l.

    Attributes:
      clip: C_l in units of √O.

    Raises:
      ValueError: in `fit`, a model with running statistics.

    References:
      Dwork & Roth 2014, The algorithmic foundations of differential privacy, appendix A.
      Balle & Wang 2018, Improving the Gaussian mechanism, arXiv 1805.06530.
    """

    untrained: ClassVar[str] = "expected"
    source: ClassVar[str] = 'PROTECTION.md, "Rivals", DP downlink; Balle & Wang 2018, 1805.06530'
    promise: ClassVar[str] = (
        "one release at a strength that was not chosen by looking is the Gaussian mechanism of "
        "μ = 2 √n / strength on the n parameters of W"
    )

    clip: Number = number(
        3.0, "longest L2 norm that a layer of O outputs may have", unit="√O", low=0, inside="()"
    )

    def fit(self, model: Functions, image_shape: tuple[int, int, int], cohort: Cohort) -> None:
        if model.state(image_shape):
            allowed = "has running statistics, and noise would make variances of them negative"
            raise refuse("model", model.name, allowed)

    def bound(self, base: Params) -> dict[tuple[str, ...], jax.Array]:
        """C_l of each layer, float32 []."""
        return {
            layer: self.clip * max(leaf.shape[-1] if leaf.ndim else 1 for leaf in leaves) ** 0.5
            for layer, leaves in _layers(base).items()
        }

    def deviation(self, base: Params, strength: jax.Array) -> dict[Path, jax.Array]:
        """Of the noise on each parameter, float32 []; shapes of W alone are read."""
        size = {layer: sum(x.size for x in leaves) for layer, leaves in _layers(base).items()}
        bound = self.bound(base)
        each = {layer: strength * bound[layer] / size[layer] ** 0.5 for layer in bound}
        return {path: each[path[:-1]] for path in flatten_dict(base)}  # pyright: ignore

    def variant(
        self, base: Params, draw: jax.Array, strength: jax.Array, variant: jax.Array
    ) -> Params:
        flat: dict[Path, jax.Array] = flatten_dict(base)  # pyright: ignore
        bound, deviation, kept = self.bound(base), self.deviation(base, strength), {}
        for layer, leaves in _layers(base).items():
            norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in leaves))
            # A comparison, so that what is not clipped is not multiplied, nor a NaN hidden.
            kept[layer] = jnp.where(norm > bound[layer], bound[layer] / norm, 1)
        of_path = dict(zip(sorted(flat), jax.random.split(draw, len(flat)), strict=True))

        def released(path: Path) -> jax.Array:
            unit = jax.random.normal(of_path[path], flat[path].shape)
            noisy = kept[path[:-1]] * flat[path] + deviation[path] * unit
            return jnp.where(strength > 0, noisy, flat[path])

        return unflatten_dict({path: released(path) for path in flat})

    def recover(
        self, returned: Params, copy: Params, base: Params, issue: Issue, slot: Slot
    ) -> tuple[Params, Params | None]:
        return jax.tree.map(jnp.subtract, returned, base), None

    def spread(
        self, copy: Params, strength: jax.Array, model: Functions, image_shape: tuple[int, int, int]
    ) -> dict[Path, jax.Array]:
        return self.deviation(copy, strength)


def _layers(base: Params) -> dict[tuple[str, ...], list[jax.Array]]:
    """The parameters of each module."""
    found: dict[tuple[str, ...], list[jax.Array]] = {}
    for path, leaf in sorted(flatten_dict(base).items()):
        found.setdefault(path[:-1], []).append(leaf)  # pyright: ignore
    return found
