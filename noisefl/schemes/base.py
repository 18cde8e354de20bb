"""The contract of a scheme: what clients get instead of W, and how what returns is read back."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict

from noisefl import keys
from noisefl.calibrate import Additive, Bill, Calibrator, Draw
from noisefl.cohort import Cohort, Members
from noisefl.errors import refuse
from noisefl.local import Own
from noisefl.models import Functions
from noisefl.noise import Path
from noisefl.parts import Number, Part, child, name_of, part
from noisefl.probing import Copies, Judge

Params = Any
Carry = Any


@struct.dataclass
class Slot:
    """One client's place in a round. int32 []."""

    index: jax.Array  # 0 … M − 1
    group: jax.Array  # 0 in a, 1 in b
    client: jax.Array  # 0 … K − 1


@struct.dataclass
class Issue:
    """What a round hands out. The server's own record: no thief's view holds any of `secret`."""

    secret: Any  # what copies are made of: draws or their keys, strengths
    protected: jax.Array  # bool []: clients do not get W itself; the cap applies
    shipped: jax.Array  # bool []: models are distributed at all
    weights: jax.Array  # float32 [M]: what multiplies n_k in the average
    strength: jax.Array  # float32 []: σ, or r; 0 where clients get W
    relative_strength: jax.Array  # float32 []: RMS of what was added over that of the parameters
    feasible: jax.Array  # bool []: the calibrator vouches for the copies, as its guarantee says
    accuracy: jax.Array  # float32 [V]: of the copies on the judging split; NaN if not seen there
    bill: Bill  # what the calibration cost


class Secret(NamedTuple):
    """Of a scheme with a strength."""

    draw: Draw
    strength: jax.Array  # float32 []


def bare(like: Issue) -> Issue:
    """The issue of a round that hands out W: nothing drawn, nothing asked.

    Args:
      like: shapes of the scheme's own issue.
    """

    def nothing(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.zeros((*leaf.shape, 2), jnp.uint32))
        return jnp.zeros(leaf.shape, leaf.dtype)

    zero = jax.tree.map(nothing, like)
    yes = jnp.bool_(True)
    return zero.replace(
        shipped=yes,
        feasible=yes,
        weights=jnp.ones(like.weights.shape, jnp.float32),
        accuracy=jnp.full(like.accuracy.shape, jnp.nan, jnp.float32),
    )


def uncalibrated(secret: Any, members: Members) -> Issue:
    """The issue of a protected round of a scheme that has no strength and hands out one copy, in
    which the touched parameters are 0."""
    one, yes = jnp.float32(1), jnp.bool_(True)
    return Issue(
        secret=secret,
        protected=yes,
        shipped=yes,
        weights=jnp.ones(members.counts.shape, jnp.float32),
        strength=one,
        relative_strength=one,  # what was added is −W
        feasible=yes,
        accuracy=jnp.full(1, jnp.nan, jnp.float32),
        bill=Bill.empty(),
    )


@part
class Scheme(Part):
    """Base. A scheme overrides issue, copy and recover, and init if it remembers something.

    Attributes:
      untrained: in what sense the update of a copy that nobody trained is 0: "bitwise" (what was
        put in is taken out exactly), "weighted" (in the mean over equal shares, up to rounding),
        "expected" (what is not taken out has mean 0), or "none" (clients do not train the copy).
      source: where it is from: a paper, or the line of ALGORITHM.md.
      promise: what it guarantees of a thief, whatever a calibrator adds; "nothing" is an answer.
      wrappable: rounds of plain FedAvg may go before it.
      partial: a parameter that is exactly 0 in a copy is one that the copy does not hold.
      declares: it must know which classes the members of a round own: `Members.classes`.
    """

    abstract: ClassVar[bool] = True
    untrained: ClassVar[str] = "bitwise"
    source: ClassVar[str] = ""
    promise: ClassVar[str] = "nothing"
    wrappable: ClassVar[bool] = True
    partial: ClassVar[bool] = False
    declares: ClassVar[bool] = False

    @property
    def cap(self) -> Number | None:
        """float32 []: largest accuracy of a copy; None of a scheme that has none."""
        return None

    @property
    def vouches(self) -> bool:
        """Some rounds call themselves feasible."""
        return True

    def fit(self, model: Functions, image_shape: tuple[int, int, int], cohort: Cohort) -> None:
        """Raises ValueError about a model or cohort that the scheme cannot serve."""

    def touched(self, model: Functions, image_shape: tuple[int, int, int]) -> tuple[Path, ...]:
        """Paths of the parameters in which copies may differ from W; default all."""
        shapes = model.shapes(image_shape)
        return tuple(sorted(flatten_dict(shapes)))

    def slots(self, cohort: Cohort) -> dict[str, int]:
        """The copies that differ, by name, each by a slot that gets it; default all M slots."""
        return {f"copy{slot}": slot for slot in range(sum(cohort.sizes))}

    def init(self, key: jax.Array, base: Params) -> Carry:
        """What the scheme remembers before the first round; sticky keys come from this key."""
        return ()

    def issue(
        self, key: jax.Array, round: jax.Array, base: Params, owner: Params, members: Members,
        judge: Judge, carry: Carry,
    ) -> tuple[Issue, Carry]:  # fmt: skip
        """What round t hands out, before anyone trains.

        Args:
          key: of the round.
          round: int32 [], t.
          base: W.
          owner: G.
          members: a_t and b_t.
          judge: of the server's split.
          carry: of `init`, or of the round before.
        """
        raise NotImplementedError

    def copy(self, base: Params, issue: Issue, slot: Slot) -> Params:
        """What the client in this slot receives."""
        raise NotImplementedError

    def rate(self, issue: Issue) -> jax.Array | None:
        """What multiplies every step of local training, float32 []; None: they are what they are.
        1 where W is handed out bare."""
        return None

    def work(
        self, train: Callable[[Params], Params], copy: Params, issue: Issue, slot: Slot, own: Own,
        model: Functions,
    ) -> Any:  # fmt: skip
        """What it returns: its model after local training, unless the scheme says otherwise."""
        return train(copy)

    def kept(self, returned: Any, copy: Params, issue: Issue) -> Params:
        """The model that the client itself has in the end; default all that it returned."""
        return returned

    def recover(
        self, returned: Params, copy: Params, base: Params, issue: Issue, slot: Slot
    ) -> tuple[Params, Params | None]:
        """The client's update of W, and the mask of what it held (None: everything).

        Default: exact removal, returned − copy.
        """
        return jax.tree.map(jnp.subtract, returned, copy), None

    def combine(
        self, averaged: Any, base: Params, issue: Issue, carry: Carry
    ) -> tuple[Params, Carry]:
        """The update of W from the average of what was recovered; default that average."""
        return averaged, carry

    def spread(
        self, copy: Params, strength: jax.Array, model: Functions, image_shape: tuple[int, int, int]
    ) -> dict[Path, jax.Array]:
        """What everybody knows of how far a copy is from W: the standard deviation of the
        difference, float32 [] for each touched path; default nothing."""
        return {}

    def bytes_sent(self, base: Params, issue: Issue) -> jax.Array:
        """Of one copy, float32 []; default four for each parameter."""
        return jnp.float32(4 * sum(leaf.size for leaf in jax.tree.leaves(base)))


@part
class Calibrated(Scheme):
    """Base of the schemes whose copies are worse the larger a strength is; a calibrator sets it.

    Overrides `variants`, `draw` and `variant`; says in `moves` how copies move with the strength,
    so that a calibrator can refuse what it cannot judge.
    """

    abstract: ClassVar[bool] = True
    moves: ClassVar[str] = "linear"

    calibrator: Calibrator = child(Additive, "rule that sets the strength")

    def check(self) -> None:
        if self.moves not in self.calibrator.judges:
            allowed = f"cannot judge {name_of(type(self))}, whose copies are {self.moves}"
            raise refuse("calibrator", name_of(type(self.calibrator)), allowed)

    @property
    def cap(self) -> Number | None:
        return self.calibrator.cap

    @property
    def vouches(self) -> bool:
        return self.calibrator.guarantee != "none"

    def variants(self, members: Members) -> int:
        """V, copies that differ; default one for each of the M slots."""
        return members.clients.shape[0]

    def draw(self, key: jax.Array, base: Params, judge: Judge) -> Draw:
        """What is random about the copies of a round; default the key alone."""
        return key

    def variant(self, base: Params, draw: Draw, strength: jax.Array, variant: jax.Array) -> Params:
        """Copy v = 0 … V − 1, int32 []. At strength 0 it is the base."""
        raise NotImplementedError

    def weights(self, members: Members) -> jax.Array:
        """float32 [M]: what multiplies n_k in the average of a protected round."""
        return jnp.ones(members.counts.shape, jnp.float32)

    def relative_strength(
        self, base: Params, draw: Draw, strength: jax.Array, judge: Judge
    ) -> jax.Array:
        """RMS of what copy 0 adds over the RMS of the touched parameters, float32 []."""
        paths = self.touched(judge.model, judge.image_shape)
        flat: dict[Path, jax.Array] = flatten_dict(base)  # pyright: ignore
        moved: Any = flatten_dict(self.variant(base, draw, strength, jnp.int32(0)))
        added = sum(jnp.sum(jnp.square(moved[path] - flat[path])) for path in paths)
        return jnp.sqrt(added / sum(jnp.sum(jnp.square(flat[path])) for path in paths))

    def init(self, key: jax.Array, base: Params) -> Carry:
        return self.calibrator.init()

    def issue(
        self, key: jax.Array, round: jax.Array, base: Params, owner: Params, members: Members,
        judge: Judge, carry: Carry,
    ) -> tuple[Issue, Carry]:  # fmt: skip
        def draw(key: jax.Array) -> Draw:
            return self.draw(key, base, judge)

        return self.calibrated(draw, key, base, members, judge, carry)

    def calibrated(
        self, draw: Callable[[jax.Array], Draw], key: jax.Array, base: Params, members: Members,
        judge: Judge, carry: Carry,
    ) -> tuple[Issue, Carry]:  # fmt: skip
        """`issue` with draws of key → draw, for a scheme whose draws hang on more than `draw` is
        told: on the round, on who takes part, or on what it remembers.

        Args:
          draw: of a key [].
          carry: of the calibrator.
        """
        copies = Copies(
            variants=self.variants(members),
            moves=self.moves,
            touched=self.touched(judge.model, judge.image_shape),
            draw=draw,
            copy=lambda draw, strength, variant: self.variant(base, draw, strength, variant),
        )
        decision, evidence, probe, carry = self.calibrator.calibrate(
            keys.stream(key, "calibration"), judge.probe(base, copies), carry
        )
        drawn, strength = decision.draw, decision.strength
        return Issue(
            secret=Secret(drawn, strength),
            protected=jnp.bool_(True),
            shipped=jnp.bool_(True),
            weights=self.weights(members),
            strength=strength,
            relative_strength=self.relative_strength(base, drawn, strength, judge),
            feasible=decision.feasible,
            accuracy=evidence.accuracy,
            bill=probe.bill,
        ), carry

    def copy(self, base: Params, issue: Issue, slot: Slot) -> Params:
        return self.variant(base, issue.secret.draw, issue.secret.strength, slot.index)


@part
class OneCopy(Calibrated):
    """Base of those that hand out the same copy to every client: V = 1, whatever the variant."""

    abstract: ClassVar[bool] = True

    def slots(self, cohort: Cohort) -> dict[str, int]:
        return {"copy0": 0}

    def variants(self, members: Members) -> int:
        return 1
