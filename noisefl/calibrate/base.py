"""The contract of a calibrator: what it may ask, what it decides, what that cost."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from noisefl.errors import refuse
from noisefl.parts import Number, Part, count, number, part

Draw = Any  # a pytree of the scheme's: unit noise, or the keys of it
Carry = Any


@struct.dataclass
class Bill:
    """What was asked, so that the cost of a rule is measured and not guessed."""

    tries: jax.Array  # int32 []: draws at a strength that were put forward to be shipped
    evaluations: jax.Array  # int32 []: models that were looked at, on however many images
    samples: jax.Array  # int32 []: forward passes of single images

    @classmethod
    def empty(cls) -> "Bill":
        return cls(*(jnp.int32(0),) * 3)

    def plus(self, tries: Any = 0, evaluations: Any = 0, samples: Any = 0) -> "Bill":
        return Bill(
            jnp.int32(self.tries + tries),
            jnp.int32(self.evaluations + evaluations),
            jnp.int32(self.samples + samples),
        )


@dataclasses.dataclass(frozen=True, eq=False)  # arrays cannot be compared: JAX would do so
class Questions:
    """What a probe can be asked about one base W and its V copies. Pure functions; see `Probe`."""

    variants: int  # V
    moves: str  # how copies move with the strength: "linear", "smooth" or "discrete"
    labels: jax.Array  # int32 [N], of the judging split
    draw: Callable[[jax.Array], Draw]
    accuracy: Callable[[Draw, jax.Array], jax.Array]  # float32 [V]
    bare: Callable[[], jax.Array]  # float32 []
    logits: Callable[[Draw, jax.Array, jax.Array, jax.Array, Any], jax.Array]  # [n, C]
    clean: Callable[[jax.Array, Any], jax.Array]  # [n, C]
    below: Callable[[jax.Array], jax.Array] | None = None  # [n, …]


@struct.dataclass
class Probe:
    """All that a calibrator may ask about the base W. It keeps the bill.

    Each question gives its answer and the probe with what it cost added to the bill; whoever goes
    on asks that one. A copy is W moved by `draw` at a strength, as variant v = 0 … V − 1 of the
    scheme: W + ξ and W − ξ of the source's pair. It is a pytree: loops may carry it.
    """

    bill: Bill
    questions: Questions = struct.field(pytree_node=False)

    @property
    def variants(self) -> int:
        """V, copies that differ."""
        return self.questions.variants

    @property
    def labels(self) -> jax.Array:
        """int32 [N], of the judging split."""
        return self.questions.labels

    @property
    def size(self) -> int:
        """N, images of the judging split."""
        return self.questions.labels.shape[0]

    @property
    def num_classes(self) -> int:
        """C, from the shape of the logits."""
        some = jax.ShapeDtypeStruct((1,), jnp.int32)
        return jax.eval_shape(lambda x: self.questions.clean(x, None), some).shape[-1]

    def draw(self, key: jax.Array) -> Draw:
        """A new draw; costs nothing."""
        return self.questions.draw(key)

    def _paid(self, **cost: Any) -> "Probe":
        return self.replace(bill=self.bill.plus(**cost))  # pyright: ignore[reportAttributeAccessIssue]

    def accuracy(self, draw: Draw, strength: jax.Array) -> tuple[jax.Array, "Probe"]:
        """Accuracies float32 [V] of all copies on all N images, NaN for one that is not finite.

        One try, V models, V · N images.
        """
        found = self.questions.accuracy(draw, strength)
        return found, self._paid(
            tries=1, evaluations=self.variants, samples=self.variants * self.size
        )

    def accuracies(self, draws: Draw, strengths: jax.Array) -> tuple[jax.Array, "Probe"]:
        """`accuracy` of all draws [D, …] at all strengths [S], side by side: float32 [D, S, V]."""
        of_draw = jax.vmap(self.questions.accuracy, (None, 0))
        found = jax.vmap(of_draw, (0, None))(draws, strengths)
        models = found.size
        return found, self._paid(
            tries=models // self.variants, evaluations=models, samples=models * self.size
        )

    def bare(self) -> tuple[jax.Array, "Probe"]:
        """Accuracy float32 [] of W itself on all N images. One try, one model, N images."""
        return self.questions.bare(), self._paid(tries=1, evaluations=1, samples=self.size)

    def below(self, images: jax.Array) -> Any:
        """What all copies share of images int32 [n]: [n, …], or None where nothing is shared.

        Given to `clean`, `logits` and `look` of the same images it saves seconds, and no forward
        passes: these are counted as if nothing were shared.
        """
        return None if self.questions.below is None else self.questions.below(images)

    def clean(self, images: jax.Array, shared: Any = None) -> tuple[jax.Array, "Probe"]:
        """Logits [n, C] of W on images int32 [n], indices into the split. One model, n images."""
        found = self.questions.clean(images, shared)
        return found, self._paid(evaluations=1, samples=images.size)

    def _logits(self, draw: Draw, strength: jax.Array, images: jax.Array, shared: Any) -> jax.Array:
        def of(variant: Any) -> jax.Array:
            return self.questions.logits(draw, strength, jnp.int32(variant), images, shared)

        if self.variants <= 2:  # a loop of its own costs more than it saves
            return jnp.stack([of(variant) for variant in range(self.variants)])
        return lax.map(of, jnp.arange(self.variants, dtype=jnp.int32))

    def logits(
        self, draw: Draw, strength: jax.Array, images: jax.Array, shared: Any = None
    ) -> tuple[jax.Array, "Probe"]:
        """Logits [V, n, C] of all copies on a few images. V models, V · n images, and no try."""
        found = self._logits(draw, strength, images, shared)
        return found, self._paid(evaluations=self.variants, samples=self.variants * images.size)

    def logits_of(
        self, draws: Draw, strength: jax.Array, images: jax.Array, shared: Any = None
    ) -> tuple[jax.Array, "Probe"]:
        """`logits` of several draws [D, …] side by side: [D, V, n, C], for D times the price."""
        found = jax.vmap(lambda draw: self._logits(draw, strength, images, shared))(draws)
        models = found.shape[0] * self.variants
        return found, self._paid(evaluations=models, samples=models * images.size)

    def look(
        self, draw: Draw, strength: jax.Array, variant: jax.Array, images: jax.Array,
        first: jax.Array, shared: Any = None,
    ) -> tuple[jax.Array, "Probe"]:  # fmt: skip
        """Logits [n, C] of one copy, for rules that read on until they know enough.

        n images; a model where it is the `first` look (bool []) at this copy; a try where besides
        it is variant 0, with which a pair begins.
        """
        found = self.questions.logits(draw, strength, variant, images, shared)
        begins = jnp.int32(first)
        return found, self._paid(
            tries=begins * (variant == 0), evaluations=begins, samples=images.size
        )


@struct.dataclass
class Decision:
    """The noise of a round."""

    draw: Draw  # what ships
    strength: jax.Array  # float32 []: at what strength; 0 hands out W bare
    feasible: jax.Array  # bool []: the rule vouches for all V copies, as its `guarantee` says


@struct.dataclass
class Evidence:
    """What is known of the copies that ship."""

    accuracy: jax.Array  # float32 [V], on the judging split; NaN if not seen on all N images


@part
class Calibrator(Part):
    """Base of all rules: chooses the draw and the strength of a protected round.

    A rule overrides `calibrate`, and `init` if it remembers something. It must end on all inputs, a
    NaN base and an unreachable cap included. ALGORITHM.md, "One round", the while loop.
    """

    abstract: ClassVar[bool] = True
    guarantee: ClassVar[str] = "none"  # of a round that calls itself feasible
    judges: ClassVar[tuple[str, ...]] = ("linear", "smooth", "discrete")  # movements of copies

    cap: Number = number(
        0.6, "largest accuracy a shared copy may have", unit="share of 1", low=0, high=1,
        inside="()",
    )  # fmt: skip
    cap_margin: Number = number(
        0.0, "calibration aims at cap − margin", unit="share of 1", low=0, high=1, inside="[)"
    )

    def check(self) -> None:
        below(self, "cap_margin", "cap", strictly=True)

    @property
    def aim(self) -> jax.Array:
        """float32 []: what the accuracy of a copy is held to, cap − cap_margin."""
        return jnp.float32(self.cap) - self.cap_margin

    def holds(self, accuracy: jax.Array) -> jax.Array:
        """bool [...]: no copy of float32 [..., V] exceeds the aim. A NaN accuracy does not hold."""
        return jnp.all(accuracy <= self.aim, axis=-1)

    def init(self) -> Carry:
        """What the rule remembers before the first protected round."""
        return ()

    def calibrate(
        self, key: jax.Array, probe: Probe, carry: Carry
    ) -> tuple[Decision, Evidence, Probe, Carry]:
        """Called once a protected round; the probe it returns holds the bill.

        Args:
          key: of this round's calibration.
          probe: of this round's base, its bill empty.
          carry: of `init`, or of the protected round before.
        """
        raise NotImplementedError


@part
class Search(Calibrator):
    """Base of the rules that look for a strength."""

    abstract: ClassVar[bool] = True

    strength: Number = number(
        1.0, "of the first try, where nothing better is known", unit="σ, or r", low=0, inside="()"
    )
    strength_max: Number = number(
        50.0, "σ_max, the largest strength", unit="σ, or r", low=0, inside="()"
    )
    max_tries: Number = count(100, "bound on a round's tries", unit="tries", low=1)

    def check(self) -> None:
        super().check()
        below(self, "strength", "strength_max")

    def init(self) -> Carry:
        """float32 []: the strength that shipped last; NaN before."""
        return jnp.float32(jnp.nan)

    def warm_start(self, carry: jax.Array, factor: float = 1.0) -> jax.Array:
        """`factor` times the strength of the round before, at most σ_max; σ0 before the first.

        Float32 [], as the carry is.
        """
        before = jnp.minimum(factor * carry, self.strength_max)
        return jnp.where(carry > 0, before, jnp.float32(self.strength))


def below(rule: Part, name: str, most: str, strictly: bool = False) -> None:
    """Raises ValueError where one number of a part exceeds another."""
    small, large = np.asarray(getattr(rule, name)), np.asarray(getattr(rule, most))
    if np.any(small >= large if strictly else small > large):
        word = "less than" if strictly else "at most"
        given = small if small.ndim else float(str(small))
        raise refuse(name, given, f"must be {word} {most}, {large}")


def unseen(variants: int) -> Evidence:
    """Of copies that were not seen on all N images."""
    return Evidence(jnp.full(variants, jnp.nan, jnp.float32))
