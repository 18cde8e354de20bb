"""A ladder of strengths, each put to the sequential test until one passes."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import evaluate, keys
from noisefl.calibrate import wager
from noisefl.calibrate.base import Decision, Draw, Evidence, Probe, Search, unseen
from noisefl.calibrate.blocks import Blocks, deal
from noisefl.parts import Number, number, part, size, switch


@part
class Tested(Search):
    """Base of the rules that ship what has passed a sequential test.

    Guarantee: the chance, over the images and their order, that a round ships as feasible copies of
    which one's accuracy exceeds cap − cap_margin is at most δ = `error_rate`, whatever the draw,
    for a base and a first strength that do not depend on the judging split. That is so in the first
    protected round. Later ones know the split through the strengths that shipped before (and
    through accuracies, with `KeepBest`, `UntilCap` or `SkipInfeasible`).

    Accuracy is that on new images with classes as frequent as in the judging split. Where the
    split's labels are themselves a small sample, their frequencies are off by chance, which δ does
    not cover (BUILD_NOTES.md): a few thousand are too few for δ = 1 %. Without `stratified` it is
    the accuracy on new images and labels, for any N, and twice the images are needed.
    """

    abstract: ClassVar[bool] = True
    guarantee: ClassVar[str] = (
        "with probability 1 - error_rate a round, over the images and their order, no copy that "
        "ships as feasible exceeds the aim on new images with classes as frequent as in the "
        "judging split, for a base and a first strength not chosen on it"
    )

    error_rate: Number = number(
        0.01, "δ, chance a round over the cap", unit="share of 1", low=0, high=1, inside="()"
    )
    chunk: int = size(50, "images between two looks of the test", unit="images")
    limit: int = size(
        1500, "images that one copy is judged on at most; undecided then, it does not hold",
        unit="images",
    )  # fmt: skip
    stratified: bool = switch(True, "each look takes the classes in their proportions")
    scouts: int = size(
        120, "images that are looked at first, at most a quarter of all dealt", unit="images"
    )
    step: Number = number(1.1, "factor between two tries of the test", low=1, inside="()")

    def seat(self, key: jax.Array, probe: Probe) -> tuple[Blocks, Blocks]:
        """Scouts, on whom choices may rest, and the jury of the test: no image is in both."""
        stream = keys.stream(key, "images")
        dealt = deal(stream, probe, self.scouts + self.limit, self.stratified)
        most, strata = dealt.images.shape
        number = max(1, min(self.scouts // strata, most // 4))
        return dealt.slice(0, number), dealt.slice(number)

    def remembered(self, decision: Decision, carry: jax.Array) -> jax.Array:
        """The carry after a round, float32 []: the strength that passed, if there was noise."""
        noisy = decision.feasible & (decision.strength > 0)
        return jnp.where(noisy, decision.strength, carry)


class _Climb(NamedTuple):
    draw: Draw
    strength: jax.Array  # float32 []
    attempt: jax.Array  # int32 [], from 1
    variant: jax.Array  # int32 []: the copy that is being judged; those before it have passed
    read: jax.Array  # int32 []: blocks that this copy has been judged on
    shared: jax.Array | None  # [T · S, …]: what all copies share of the jury's images,
    known: jax.Array  # int32 []: in the blocks read so far
    wager: wager.Wager  # on this copy
    holds: jax.Array  # bool []
    ended: jax.Array  # bool []
    probe: Probe


def climb(
    rule: Tested, probe: Probe, draw_of: Callable[[jax.Array], Draw], bare: jax.Array,
    start: jax.Array, jury: Blocks, redraw: bool = False,
) -> tuple[Decision, Evidence, Probe]:  # fmt: skip
    """Tries start, start · step, … until all copies pass; attempt j spends its share of δ.

    Where the base seems to hold `bare`, strength 0 is the first rung: all copies are then W, which
    passes with one of them. If it fails one attempt with noise follows in any case.

    At σ_max it stays, and takes fresh draws; with `redraw` every attempt has one, as in the source.
    Ends after `max_tries` attempts with the last one, the strongest, which then does not hold. A
    copy undecided after all blocks does not pass; without a chunk of blocks none does, and the
    first attempt is the last.

    The ladder is fixed before the jury is seen, so that all attempts may read the same images: the
    error rates add up. P(feasible, one copy's accuracy above the aim) ≤ δ over the jury's images
    and their order, for accuracies on new images whose classes are as frequent as in the split.
    V copies spend no more than one: a wrong set must pass with the one copy that is wrong.

    One flat loop, a chunk of one copy a step: under vmap lanes then wait for the one that reads
    most, and not at every copy and attempt.

    Args:
      rule: `aim`, `error_rate`, `step`, `strength_max`, `max_tries` and `chunk` are read.
      probe: of the base.
      draw_of: int32 [], attempts before this draw, from 0 → draw.
      bare: bool [], whether strength 0 is put to the test before `start`.
      start: float32 [], the first strength with noise, above 0.
      jury: images on which neither the base, the draw nor the ladder was chosen. Rounds after the
        first protected one come close to that and no more: strengths that shipped before were
        chosen on the same split, and they shaped the base.
      redraw: whether each attempt has a fresh draw.
    """
    most, strata = jury.images.shape
    step = max(1, min(rule.chunk // strata, most))
    target, copies = rule.aim, probe.variants

    def look(s: _Climb) -> _Climb:
        chosen = lax.dynamic_slice_in_dim(jury.images, s.read, step).reshape(-1)
        shared, now = features(s, chosen)
        logits, probe = s.probe.look(s.draw, s.strength, s.variant, chosen, s.read == 0, now)
        right = evaluate.correct(logits, probe.labels[chosen]).reshape(step, strata)
        # Wrong answers of a dead model prove nothing: a NaN logit is a failure.
        dead = jnp.any(jnp.isnan(logits))
        error = rule.error_rate * wager.share_of_error(s.attempt)
        bets, outcome = wager.settle(s.wager, right @ jury.weights, target, error)
        read = s.read + step

        passed = outcome.under & ~dead
        failed = ~passed & (outcome.over | dead | (read + step > jury.number))
        holds = passed & ((s.variant == copies - 1) | (s.strength == 0))
        last = s.attempt >= jnp.maximum(rule.max_tries, 1 + jnp.int32(bare))
        onward = failed & ~last
        higher = jnp.where(s.strength > 0, s.strength * rule.step, start)
        higher = jnp.minimum(higher, rule.strength_max)
        renew = onward & ((s.strength >= rule.strength_max) | redraw)
        fresh = passed | failed
        return _Climb(
            draw=lax.cond(renew, lambda: draw_of(s.attempt), lambda: s.draw),
            strength=jnp.where(onward, higher, s.strength),
            attempt=s.attempt + onward,
            variant=jnp.where(failed, 0, s.variant + (passed & ~holds)),
            read=jnp.where(fresh, 0, read),
            shared=shared,
            known=jnp.maximum(s.known, read),
            wager=jax.tree.map(lambda new: jnp.where(fresh, 0.0, new), bets),
            holds=holds,
            ended=holds | (failed & last),
            probe=probe,
        )

    def features(s: _Climb, chosen: jax.Array) -> tuple[jax.Array | None, Any]:
        """What is shared of all blocks so far, and of these: computed when first read, and kept."""
        if s.shared is None:
            return None, None
        kept, at = s.shared, s.read * strata
        now = lax.cond(
            s.read < s.known,
            lambda: lax.dynamic_slice_in_dim(kept, at, step * strata),
            lambda: probe.below(chosen),
        )
        return lax.dynamic_update_slice_in_dim(kept, now, at, 0), now

    none, no = jnp.int32(0), jnp.bool_(False)
    some = jax.ShapeDtypeStruct((most * strata,), jnp.int32)
    room = jax.eval_shape(probe.below, some) if most > 0 else None
    begin = _Climb(
        draw=draw_of(none),
        strength=jnp.where(bare & (jury.number >= step), 0, start).astype(jnp.float32),
        attempt=jnp.int32(1),
        variant=none,
        read=none,
        shared=None if room is None else jnp.zeros(room.shape, room.dtype),
        known=none,
        wager=wager.start(),
        holds=no,
        ended=jury.number < step,
        probe=probe,
    )
    end = begin if most == 0 else lax.while_loop(lambda s: ~s.ended, look, begin)
    return Decision(end.draw, end.strength, end.holds), unseen(copies), end.probe
