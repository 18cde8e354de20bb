"""A ladder of strengths, each put to the sequential test until one passes."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import evaluate
from noisefl.calibrate import wager
from noisefl.calibrate.base import Calibration, Draw, Probe, aim
from noisefl.calibrate.blocks import Blocks
from noisefl.config import Hyper


class _Climb(NamedTuple):
    draw: Draw
    strength: jax.Array  # float32 []
    attempt: jax.Array  # int32 [], from 1
    minus: jax.Array  # bool []: W + ξ has passed, W − ξ is being judged
    read: jax.Array  # int32 []: blocks that this copy has been judged on
    shared: jax.Array | None  # [T · S, …]: what all copies share of the jury's images,
    known: jax.Array  # int32 []: in the blocks read so far
    wager: wager.Wager  # on this copy
    holds: jax.Array  # bool []
    ended: jax.Array  # bool []
    evaluations: jax.Array  # int32 []
    samples: jax.Array  # int32 []


def climb(
    probe: Probe,
    draw_of: Callable[[jax.Array], Draw],
    start: jax.Array,
    jury: Blocks,
    hyper: Hyper,
    factor: jax.Array | float,
    chunk: int,
    redraw: bool = False,
) -> Calibration:
    """Tries start, start · factor, … until both copies pass; attempt j spends its share of δ.

    At σ_max it stays, and takes fresh draws; with `redraw` every attempt has one, as in the source.
    Ends after `max_tries` attempts with the last one, the strongest, which then does not hold. A
    copy undecided after all blocks does not pass; without a chunk of blocks none does, and the
    first attempt is the last.

    The ladder is fixed before the jury is seen, so that all attempts may read the same images: the
    error rates add up. P(feasible, one copy's accuracy above the aim) ≤ δ over the jury's images
    and their order, for accuracies on new images whose classes are as frequent as in the split.
    Two copies spend no more than one: a wrong pair must pass with the one copy that is wrong.

    One flat loop, a chunk of one copy a step: under vmap lanes then wait for the one that reads
    most, and not at every copy and attempt.

    Args:
      probe: of the base.
      draw_of: int32 [], attempts before this draw, from 0 → draw.
      start: float32 [], the first strength, at least σ0.
      jury: images on which neither the base, the draw nor the ladder was chosen. Rounds after the
        first protected one come close to that and no more: strengths that shipped before were
        chosen on the same split, and they shaped the base.
      hyper: `cap`, `cap_margin`, `error_rate`, `strength_max`, `max_tries`.
      factor: between two strengths.
      chunk: images between two looks, about.
      redraw: whether each attempt has a fresh draw.
    """
    most, strata = jury.images.shape
    step = max(1, min(chunk // strata, most))
    target = aim(hyper)

    def look(s: _Climb) -> _Climb:
        chosen = lax.dynamic_slice_in_dim(jury.images, s.read, step).reshape(-1)
        signed = jnp.where(s.minus, -s.strength, s.strength)
        logits, shared = logits_of(s, chosen, signed)
        right = evaluate.correct(logits, probe.labels[chosen]).reshape(step, strata)
        # Wrong answers of a dead model prove nothing: a NaN logit is a failure.
        dead = jnp.any(jnp.isnan(logits))
        error = hyper.error_rate * wager.share_of_error(s.attempt)
        bets, outcome = wager.settle(s.wager, right @ jury.weights, target, error)
        read = s.read + step

        passed = outcome.under & ~dead
        failed = ~passed & (outcome.over | dead | (read + step > jury.number))
        holds = passed & s.minus
        last = s.attempt >= hyper.max_tries
        onward = failed & ~last
        higher = jnp.minimum(s.strength * factor, hyper.strength_max)
        renew = onward & ((s.strength >= hyper.strength_max) | redraw)
        fresh = passed | failed
        return _Climb(
            draw=lax.cond(renew, lambda: draw_of(s.attempt), lambda: s.draw),
            strength=jnp.where(onward, higher, s.strength),
            attempt=s.attempt + onward,
            minus=passed | (s.minus & ~failed),
            read=jnp.where(fresh, 0, read),
            shared=shared,
            known=jnp.maximum(s.known, read),
            wager=jax.tree.map(lambda new: jnp.where(fresh, 0.0, new), bets),
            holds=holds,
            ended=holds | (failed & last),
            evaluations=s.evaluations + (s.read == 0),
            samples=s.samples + chosen.size,
        )

    def logits_of(
        s: _Climb, chosen: jax.Array, signed: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """[n, C], and what is shared: computed when a block is first read, and kept."""
        if s.shared is None or probe.below is None or probe.above is None:
            return probe.logits(s.draw, signed[None], chosen)[0], None
        below, at = probe.below, s.read * strata
        kept = s.shared
        now = lax.cond(
            s.read < s.known,
            lambda: lax.dynamic_slice_in_dim(kept, at, step * strata),
            lambda: below(chosen),
        )
        logits = probe.above(s.draw, signed[None], chosen, now)[0]
        return logits, lax.dynamic_update_slice_in_dim(kept, now, at, 0)

    none, no = jnp.int32(0), jnp.bool_(False)
    room = None
    if probe.below is not None and most > 0:
        room = jax.eval_shape(probe.below, jax.ShapeDtypeStruct((most * strata,), jnp.int32))
    begin = _Climb(
        draw=draw_of(none),
        strength=start,
        attempt=jnp.int32(1),
        minus=no,
        read=none,
        shared=None if room is None else jnp.zeros(room.shape, room.dtype),
        known=none,
        wager=wager.start(),
        holds=no,
        ended=jury.number < step,
        evaluations=none,
        samples=none,
    )
    end = begin if most == 0 else lax.while_loop(lambda s: ~s.ended, look, begin)
    nan = jnp.float32(jnp.nan)
    return Calibration(
        draw=end.draw,
        strength=end.strength,
        feasible=end.holds,
        plus_accuracy=nan,
        minus_accuracy=nan,
        tries=end.attempt,
        evaluations=end.evaluations,
        samples=end.samples,
    )
