"""The round as a pure function: it composes, it repeats, its noise cancels."""

import dataclasses

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from noisefl import calibrate, keys, make_round, noise
from noisefl.config import NEVER, Hyper, check_hyper, fedavg

EQUAL = (6,) * 8
ULP = float(np.finfo(np.float32).eps)


def still(hyper, t):
    """An optimizer that learns nothing: what is left of a round is its noise."""
    return optax.set_to_zero()


def assert_same(ours, theirs, **tolerance):
    """Equal bit for bit without a tolerance; with one, floats alone may differ."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype
        if tolerance and one.dtype.kind == "f":
            np.testing.assert_allclose(one, other, **tolerance)
        else:
            np.testing.assert_array_equal(one, other)


def stacked(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def lane(tree, i: int):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def noisy_start(config, **numbers):
    """Program, state, data and hyper of a round that is past warm-up and raises its noise."""
    program = fed.program(config)
    return program, fed.start(program), fed.federation(), fed.hyper(config, **numbers)


PLAIN = {"warmup_rounds": 0}


# It composes.


def test_jit_as_users_write_it_equals_eager_and_repeats_bitwise():
    program, state, data, hyper = noisy_start(fed.config(), **PLAIN)
    step, key = make_round(fed.TinyCNN(), fed.config()).step, keys.root(3)
    compiled = jax.jit(step)
    first = compiled(key, state, data, hyper)
    assert first[1].calibration.tries > 1
    assert_same(compiled(key, state, data, hyper), first)
    assert_same(step(key, state, data, hyper), first, **fed.CLOSE)
    assert_same(program.step(key, state, data, hyper), first, **fed.CLOSE)


def test_the_inputs_of_a_step_are_left_alone():
    program, state, data, hyper = noisy_start(fed.config(), **PLAIN)
    inputs = (state, data, hyper)
    before = jax.tree.map(np.array, inputs)
    program.step(keys.root(3), *inputs)
    assert_same(jax.tree.map(np.array, inputs), before)


def test_init_is_one_model_twice_and_depends_on_its_key():
    """ALGORITHM.md: "initialise w;  W = G = w"; with buffers of their own, to be donated."""
    init = fed.program(fed.config()).init
    one, again, other = init(keys.root(1)), init(keys.root(1)), init(keys.root(2))
    assert_same(one, again)
    assert_same(one.owner, one.base)
    pairs = zip(jax.tree.leaves(one.owner), jax.tree.leaves(one.base), strict=True)
    assert all(g.unsafe_buffer_pointer() != w.unsafe_buffer_pointer() for g, w in pairs)
    assert not np.array_equal(one.base["stem"]["kernel"], other.base["stem"]["kernel"])
    assert int(one.round) == 0


def test_a_scan_over_three_keys_is_three_calls():
    program, state, data, hyper = noisy_start(fed.config())
    step = make_round(fed.TinyCNN(), fed.config()).step

    def scanned(ks, state, data, hyper):
        return jax.lax.scan(lambda s, k: step(k, s, data, hyper), state, ks)

    ks = fed.round_keys(3)
    last, infos = jax.jit(scanned, compiler_options=fed.QUICK)(stacked(*ks), state, data, hyper)
    singles = []
    for key in ks:
        state, info = program.step(key, state, data, hyper)
        singles.append(info)
    assert_same(last, state, **fed.CLOSE)
    assert_same(infos, stacked(*singles), **fed.CLOSE)
    assert infos.protected.tolist() == [False, True, True]


@pytest.mark.parametrize("over", ["keys", "states", "hypers"])
def test_vmap_is_single_calls(over):
    """Lanes that need different numbers of tries, and lanes in warm-up, do not disturb others."""
    program, state, data, hyper = noisy_start(fed.config(), **PLAIN)
    args = [keys.root(3), state, data, hyper]
    position = {"keys": 0, "states": 1, "hypers": 3}[over]
    if over == "keys":
        lanes = fed.round_keys(3)
    elif over == "states":
        weak = jax.tree.map(lambda w: w * 0.5, state.base)
        lanes = [state, dataclasses.replace(state, base=weak), program.init(keys.root(5))]
    else:
        changes = [
            {"cap": 0.7, "max_tries": 3, **PLAIN},
            {"warmup_rounds": NEVER},
            {"learning_rate": 0.5, "strength": 1.0, **PLAIN},
        ]
        lanes = [fed.hyper(fed.config(), **change) for change in changes]
    axes = [0 if i == position else None for i in range(4)]
    args[position] = stacked(*lanes)
    step = make_round(fed.TinyCNN(), fed.config()).step
    mapped = jax.jit(jax.vmap(step, in_axes=axes), compiler_options=fed.QUICK)
    together = mapped(*args)
    tries = together[1].calibration.tries.tolist()
    assert len(set(tries)) > 1, "lanes of one and the same length show nothing"
    for i, one in enumerate(lanes):
        args[position] = one
        assert_same(lane(together, i), program.step(*args), **fed.CLOSE)


def test_no_new_value_compiles_anew():
    """DESIGN.md: everything in `Hyper` is traced; states of all rounds have one signature."""
    config = fed.config(momentum=True, clipping=True, calibrator="geometric")
    step, traces = make_round(fed.TinyCNN(), config).step, []

    def counted(*args):
        traces.append(1)
        return step(*args)

    compiled = jax.jit(counted, compiler_options=fed.QUICK)
    hyper = fed.hyper(config, strength=0.5, **PLAIN)
    first, data = fed.program(config).init(keys.root(1)), fed.federation()
    second, _ = compiled(keys.root(1), first, data, hyper)
    third, _ = compiled(keys.root(2), second, data, hyper)
    compiled(keys.root(3), third, fed.federation(seed=9), hyper)
    for field in dataclasses.fields(Hyper):
        old = getattr(hyper, field.name)
        value = old + 1 if old.dtype == jnp.int32 else np.float64(old) * 0.9 + 0.01
        new = dataclasses.replace(hyper, **{field.name: np.asarray(value).item()})
        compiled(keys.root(3), third, data, check_hyper(new, config))
    assert len(traces) == 1


# Without noise it is FedAvg.


def test_zero_noise_without_server_side_clients_is_fedavg_bitwise():
    """σ = 0 and s = ∅: the protected round computes what the warm-up does; and there G = W."""
    config = fed.config(calibrator="fixed", server_clients=0)
    program, state, data, hyper = noisy_start(config, strength=0.0, **PLAIN)
    plain = fedavg(hyper)
    ours = theirs = state
    for key in fed.round_keys(3):
        ours, info = program.step(key, ours, data, hyper)
        theirs, plain_info = program.step(key, theirs, data, plain)
        assert (bool(info.protected), bool(plain_info.protected)) == (True, False)
        assert_same(ours, theirs)
        assert_same(theirs.owner, theirs.base)
        assert_same(info.local_accuracy, plain_info.local_accuracy)
    assert not np.array_equal(ours.base["stem"]["kernel"], state.base["stem"]["kernel"])


# The noise pair: W' = W + (p_A − p_B) ξ + Σ p_k Δ_k with Δ = 0 (ALGORITHM.md, "Derived").


def still_round(counts, **changes):
    """(W, W', ξ, p_A − p_B, by parameter path) of a round in which nobody learns anything."""
    config = fed.config(calibrator="fixed", **changes)
    program, data = fed.program(config, optimizer=still), fed.federation(counts)
    state = fed.start(program)
    new, info = program.step(keys.root(4), state, data, fed.hyper(config, strength=2.0, **PLAIN))
    n = np.asarray(data.counts)[np.asarray(info.clients)]
    tilt = float((n * np.asarray(info.signs)).sum() / n.sum())
    xi = noise.scaled(state.base, info.calibration.draw, info.calibration.strength, "absolute")
    return state.base, new.base, xi, tilt


def assert_base_is(base, new, xi, tilt, ulps=8):
    """Every parameter of `new` is W + tilt · ξ to within a few roundings of |W| + |ξ|."""
    for layer, parameters in base.items():
        for name, w in parameters.items():
            left = np.asarray(xi.get((layer, name), jnp.zeros_like(w)))
            gap = np.abs(np.asarray(new[layer][name]) - (np.asarray(w) + tilt * left))
            assert (gap <= ulps * ULP * (np.abs(w) + np.abs(left))).all(), f"{layer}/{name}"


def test_equal_shares_restore_the_base_to_rounding():
    base, new, xi, tilt = still_round(EQUAL)
    assert tilt == 0
    assert min(np.abs(leaf).max() for leaf in xi.values()) > 0.5
    assert_base_is(base, new, xi, 0)
    assert_same(new["head"], base["head"])  # no noise there: shares of ¼ add up bitwise


def test_unequal_shares_leave_their_difference_of_the_noise():
    base, new, xi, tilt = still_round(fed.COUNTS)
    assert abs(tilt) > 0.1
    assert_base_is(base, new, xi, tilt)


@pytest.mark.parametrize("cancellation", ["reweight", "subtract"])
def test_unequal_shares_cancel_when_asked_to(cancellation):
    base, new, xi, tilt = still_round(fed.COUNTS, cancellation=cancellation)
    assert abs(tilt) > 0.1
    assert_base_is(base, new, xi, 0)


def test_subtracting_restores_the_base_bitwise():
    """With shares that are powers of two; others round in the average, noise or no noise."""
    base, new, _, _ = still_round(EQUAL, cancellation="subtract")
    assert_same(new, base)


# What it refuses, and what it accepts of a researcher's own.


def test_data_of_another_population_or_image_shape_is_refused():
    program, state, data, hyper = noisy_start(fed.config())
    key = keys.root(0)
    with pytest.raises(ValueError, match=r"num_clients=8: .* 5 clients"):
        program.step(key, state, fed.federation((3,) * 5), hyper)
    cropped = dataclasses.replace(data, train_images=data.train_images[:, :6])
    with pytest.raises(ValueError, match=r"image_shape=\(8, 8, 1\): .*\(6, 8, 1\)"):
        program.step(key, state, cropped, hyper)


@pytest.mark.parametrize("model", ["owner", "base"])
def test_a_broken_model_is_flagged(model):
    """One infinite weight of G (through the server-side clients) or of W."""
    program, state, data, hyper = noisy_start(fed.config(), **PLAIN)
    _, info = program.step(keys.root(3), state, data, hyper)
    assert info.finite
    broken = jax.tree.map(jnp.copy, getattr(state, model))
    broken["head"]["bias"] = broken["head"]["bias"].at[0].set(jnp.inf)
    state = dataclasses.replace(state, **{model: broken})
    _, info = program.step(keys.root(3), state, data, hyper)
    assert not info.finite


def escalating() -> calibrate.Calibrator:
    """A calibrator with a memory: σ0 in the first protected round, 2 σ0 in the second, …"""

    def rule(key, base, probe, hyper, carry):
        draw, strength = probe.draw(key), hyper.strength * (carry + 1)
        reading = probe.accuracy(draw, strength)
        calibration = calibrate.Calibration(
            draw=draw,
            strength=strength,
            feasible=calibrate.holds(reading, hyper),
            plus_accuracy=reading.plus,
            minus_accuracy=reading.minus,
            tries=jnp.int32(1),
            evaluations=reading.evaluations,
            samples=reading.samples,
        )
        return calibration, carry + 1

    return calibrate.Calibrator(init=lambda: jnp.int32(0), calibrate=rule)


def test_a_calibrator_of_ones_own_is_asked_once_a_protected_round():
    config = fed.config()
    program = fed.program(config, optimizer=still, calibrator=escalating())
    state, data, hyper = fed.start(program), fed.federation(), fed.hyper(config, strength=0.5)
    strengths, carries, samples = [], [int(state.carry)], []
    for key in fed.round_keys(3):
        base = state.base
        state, info = program.step(key, state, data, hyper)
        strengths.append(float(info.calibration.strength))
        carries.append(int(state.carry))
        samples.append(int(info.calibration.samples))
        # what it answered is what the clients received
        n = np.asarray(data.counts)[np.asarray(info.clients)]
        tilt = float((n * np.asarray(info.signs)).sum() / n.sum())
        calibration = info.calibration
        xi = {path: leaf * calibration.strength for path, leaf in calibration.draw.items()}
        assert_base_is(base, state.base, xi, tilt)
    assert strengths == [0.0, 0.5, 1.0]
    assert carries == [0, 0, 1, 2]
    assert samples == [0, 2 * fed.VALIDATION, 2 * fed.VALIDATION]
