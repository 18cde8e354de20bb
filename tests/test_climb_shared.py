"""What all copies share of an image is computed once, and changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_calibrate import hyper
from test_climb import TOP, Lane, compiled, lanes, naive, pick, table_probe

from noisefl.calibrate import Probe
from noisefl.calibrate.climb import climb


def shared_probe(lane: Lane, calls: list | None) -> Probe:
    """What is shared of an image is its number, and above that nothing else is looked at."""
    plain = table_probe(lane, None)

    def below(images):
        if calls is not None:
            note = calls.append
            jax.debug.callback(lambda call: note(call), images, ordered=True)
        return jnp.stack([images, -images], axis=1).astype(jnp.float32)

    def above(draw, strengths, images, shared):
        return plain.logits(draw, strengths, shared[:, 0].astype(jnp.int32))

    def asked(*_):
        raise AssertionError("never from the image")

    return plain._replace(logits=asked, below=below, above=above)


@functools.cache
def sharing(chunk: int, redraw: bool, many: bool):
    calls: list = []

    def one(lane: Lane):
        numbers = {"error_rate": lane.error, "max_tries": lane.max_tries, "strength_max": TOP}
        numbers = hyper(cap=lane.aim, cap_margin=0.0, **numbers)
        probe, ladder = shared_probe(lane, None if many else calls), (lane.factor, chunk, redraw)
        return climb(probe, lambda number: number, lane.start, lane.jury, numbers, *ladder)

    return jax.jit(jax.vmap(one) if many else one), calls


@pytest.mark.parametrize(
    ("most", "strata", "chunk", "redraw"), [(60, 5, 25, False), (100, 1, 7, True), (0, 3, 6, False)]
)
def test_each_image_is_computed_once_and_nothing_changes(most, strata, chunk, redraw):
    every = lanes(200, most, strata, seed=most)
    found = jax.device_get(sharing(chunk, redraw, True)[0](every))
    plain = jax.device_get(compiled(chunk, redraw, lanes=True)[0](every))
    jax.tree.map(np.testing.assert_array_equal, found, plain)

    again, (run, calls) = 0, sharing(chunk, redraw, False)
    for i in range(20 if most else 1):
        lane = pick(every, i)
        calls.clear()
        single = jax.device_get(run(lane))
        jax.effects_barrier()
        jax.tree.map(np.testing.assert_array_equal, single, pick(found, i))
        computed = [image for call in calls for image in call.tolist()]
        read = [image for *_, images in naive(lane, chunk, redraw).reads for image in images]
        assert sorted(computed) == sorted(set(computed))
        if len(read) == single.samples:  # else float32 fell on the other side of a bound
            assert set(computed) == set(read)
            again += len(read) > len(computed)
    assert again > 5 or not most
