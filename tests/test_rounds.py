"""The round as a pure function: it composes, it repeats, its noise cancels."""

from typing import ClassVar

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import DEFAULT

import noisefl
from noisefl import calibrate, keys, noise, optimizers, parts, schemes, server
from noisefl.parts import changed, part, walk

ULP = float(np.finfo(np.float32).eps)
FIXED = {"calibrator": calibrate.Fixed(strength=2.0), "warmup_rounds": 0}
DATA = fed.federation()
# Three runs that differ in all that a lane may differ in: numbers of tries, one in warm-up.
LANES = [
    fed.experiment(warmup_rounds=0, max_tries=3),
    noisefl.fedavg(fed.TINY),
    fed.experiment(learning_rate=0.5, strength=1.0, cap=0.7),
]


# It composes.


def test_vmap_is_single_calls():
    """Over keys, states and experiments at once; lanes that need more tries disturb no other. So is
    a scan: `test_simulate`."""
    roots = jnp.stack([keys.root(seed) for seed in (3, 4, 5)])
    singles = [fed.start(), fed.start(), noisefl.init(keys.root(5), fed.TINY, DATA)]
    singles[1] = fed.replaced(singles[1], base=jax.tree.map(lambda w: w / 2, singles[1].base))
    lanes, tries = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles), []
    mapped = jax.jit(jax.vmap(noisefl.step, in_axes=(0, 0, None, 0)))
    for _ in range(3):
        lanes, infos = mapped(roots, lanes, DATA, parts.lanes(LANES))
        tries.append(infos.issue.bill.tries.tolist())
        for number, experiment in enumerate(LANES):
            single, info = fed.step(roots[number], singles[number], DATA, experiment)
            singles[number] = single
            fed.assert_same(fed.lane(lanes, number), single, **fed.CLOSE)
            info = fed.replaced(info, observed=())
            fed.assert_same(fed.lane(infos, number), info, **fed.CLOSE)
    assert any(len(set(row)) == 3 for row in tries), "lanes of one length show nothing"


def test_init_is_one_model_twice_and_composes():
    """ALGORITHM.md: "initialise w;  W = G = w"; with buffers of their own, to be donated."""
    one, again, other = (noisefl.init(keys.root(seed), fed.TINY, DATA) for seed in (1, 1, 2))
    fed.assert_same(one, again)
    fed.assert_same(one.owner, one.base)
    pairs = zip(jax.tree.leaves(one.owner), jax.tree.leaves(one.base), strict=True)
    assert all(g.unsafe_buffer_pointer() != w.unsafe_buffer_pointer() for g, w in pairs)
    assert not np.array_equal(one.base["stem"]["kernel"], other.base["stem"]["kernel"])
    assert int(one.round) == 0
    mapped = jax.jit(jax.vmap(lambda key, e: noisefl.init(key, e, DATA)))
    lanes = mapped(jnp.stack([keys.root(1), keys.root(2)]), parts.lanes(LANES[:2]))
    for number, single in enumerate((one, other)):
        fed.assert_same(fed.lane(lanes, number), single, **fed.CLOSE)


def test_jit_is_eager_repeats_bitwise_and_leaves_inputs_alone():
    bare = fed.experiment(scheme=schemes.Bare())
    inputs = (fed.KEY, fed.start(bare), DATA, bare)
    before, first = fed.plain(inputs), fed.step(*inputs)
    fed.assert_same(fed.step(*inputs), first)
    fed.assert_same(fed.plain(inputs), before)
    fed.assert_same(noisefl.step(*inputs, fed.observe), first, **fed.CLOSE)


@pytest.mark.slow
def test_what_users_compile_is_what_the_tests_compile():
    """In XLA's default options; all other tests compile quickly."""
    experiment = fed.experiment(**FIXED)
    inputs = (fed.KEY, fed.start(), DATA, experiment)
    compiled = jax.jit(noisefl.step).lower(*inputs).compile(compiler_options=DEFAULT)
    first = compiled(*inputs)
    fed.assert_same(compiled(*inputs), first)
    after, info = fed.step(*inputs)
    fed.assert_same((after, fed.replaced(info, observed=())), first, **fed.CLOSE)


def test_a_new_number_in_any_part_of_an_experiment_compiles_nothing():
    """Part by part, field by field; states of all rounds and other data have one signature."""
    experiment = fed.experiment(**fed.RICH)
    state = fed.start(experiment)
    fed.step(fed.KEY, state, DATA, experiment)
    before = fed.step._cache_size()  # pyright: ignore
    seen = set()
    for place in walk(experiment):
        if place.spec.traced and place.value is not None:
            value = 3 if place.spec.kind == "count" else 0.9 * place.value.item() + 0.01
            if value < place.spec.low:
                value = place.value.item() + 0.5
            new = changed(experiment, type(place.owner), **{place.name: value})
            state, _ = fed.step(keys.root(len(seen)), state, fed.federation(seed=9), new)
            seen.add(place.name)
    assert fed.step._cache_size() == before  # pyright: ignore
    assert {"learning_rate", "momentum", "clip_norm", "warmup_rounds", "cap", "strength"} <= seen
    assert {"server_learning_rate", "cap_margin", "learning_rate_decay"} <= seen


# Without noise it is FedAvg.


def test_zero_noise_without_server_side_clients_is_fedavg_bitwise():
    """σ = 0 and s = ∅: the protected round computes what the warm-up does; and there G = W."""
    experiment = fed.experiment(**FIXED, strength=0.0, server_clients="0")
    plain = noisefl.fedavg(experiment)
    state = ours = theirs = fed.start()
    for _ in range(3):
        ours, info = fed.step(fed.KEY, ours, DATA, experiment)
        theirs, plain_info = fed.step(fed.KEY, theirs, DATA, plain)
        assert (bool(info.issue.protected), bool(plain_info.issue.protected)) == (True, False)
        fed.assert_same(ours, theirs)
        fed.assert_same(theirs.owner, theirs.base)
        fed.assert_same(info.observed, plain_info.observed)
    assert not np.array_equal(ours.base["stem"]["kernel"], state.base["stem"]["kernel"])


# The noise pair: W' = W + (p_A − p_B) ξ + Σ p_k Δ_k with Δ = 0 (ALGORITHM.md, "Derived").


def still_round(counts, **fields):
    """(W, W', ξ, p_A − p_B) of a round in which nobody learns anything: steps vanish in float32."""
    experiment = fed.experiment(**FIXED, learning_rate=1e-30, **fields)
    state, data = fed.start(), fed.federation(counts)
    new, info = fed.step(keys.root(1), state, data, experiment)
    n, signs = np.asarray(info.members.counts), 1 - 2 * np.asarray(info.members.groups)
    secret = info.issue.secret
    xi = noise.Where().scaled(state.base, secret.draw.common[0], secret.strength)
    return state.base, new.base, xi, float((n * signs).sum() / n.sum())


def assert_base_is(base, new, xi, tilt, ulps=8):
    """Every parameter of `new` is W + tilt · ξ to within a few roundings of |W| + |ξ|."""
    for layer, parameters in base.items():
        for name, w in parameters.items():
            left = np.asarray(xi.get((layer, name), jnp.zeros_like(w)))
            gap = np.abs(np.asarray(new[layer][name]) - (np.asarray(w) + tilt * left))
            assert (gap <= ulps * ULP * (np.abs(w) + np.abs(left))).all(), f"{layer}/{name}"


def test_equal_shares_restore_the_base_to_rounding():
    base, new, xi, tilt = still_round(fed.EQUAL)
    assert tilt == 0
    assert min(np.abs(leaf).max() for leaf in xi.values()) > 0.5
    assert_base_is(base, new, xi, 0)
    fed.assert_same(new["head"], base["head"])  # no noise there: shares of ¼ add up bitwise


def test_unequal_shares_leave_their_difference_of_the_noise():
    base, new, xi, tilt = still_round(fed.COUNTS)
    assert abs(tilt) > 0.1
    assert_base_is(base, new, xi, tilt)


FULL = {"clients_per_round": 2, "groups": "full", "cancellation": "subtract"}
FIVE = {"clients_per_round": 5, "cancellation": "reweight", "eval_batch": 10}
FIVE |= {"server_weights": "uniform"}


@pytest.mark.parametrize("fields", [FULL, FIVE], ids=["subtract", "reweight"])
def test_unequal_shares_cancel_when_asked_to(fields):
    base, new, xi, tilt = still_round(fed.COUNTS, **fields)
    assert abs(tilt) > 0.1
    assert_base_is(base, new, xi, 0)


def test_subtracting_restores_the_base_bitwise():
    """With shares that are powers of two; others round in the average, noise or no noise."""
    base, new, _, _ = still_round(fed.EQUAL, **FULL)
    fed.assert_same(new, base)


# What it refuses, flags, and accepts of a researcher's own.


def test_a_population_smaller_than_the_cohort_is_refused():
    with pytest.raises(ValueError, match=r"^clients_per_round=4: needs 4 .*, and the data have 3"):
        jax.eval_shape(noisefl.step, fed.KEY, fed.start(), fed.federation((3,) * 3), fed.TINY)


def test_labels_that_have_no_logit_are_refused():
    """Outside of a program, where labels are known; else no image of theirs would ever be right."""
    high = DATA.replace(validation_labels=DATA.validation_labels + 1)  # pyright: ignore
    with pytest.raises(
        ValueError, match=r"^model='.init, apply.': has logits of 4 .* labels up to 4$"
    ):
        noisefl.init(fed.KEY, fed.TINY, high)
    with pytest.raises(ValueError, match=r"has logits of 4 classes"):
        next(noisefl.simulate.run(fed.KEY, fed.TINY, high, rounds=1))


@pytest.mark.parametrize("slot", [-1, 4, 1.5])
def test_a_slot_that_there_is_not_is_refused(slot):
    """JAX would count from the end, or take the last."""
    state = fed.start()
    _, info = fed.step(fed.KEY, state, DATA, fed.TINY)
    with pytest.raises(ValueError, match=rf"^slot={slot}: must be a whole number, 0 to 3$"):
        noisefl.received(fed.TINY, state, info, slot)


@pytest.mark.parametrize("model", ["owner", "base"])
def test_a_broken_model_is_flagged(model):
    """One infinite weight of G (through the server-side clients) or of W."""
    state, experiment = fed.start(), fed.experiment(warmup_rounds=0)
    assert fed.step(fed.KEY, state, DATA, experiment)[1].finite
    broken = jax.tree.map(jnp.copy, getattr(state, model))
    broken["head"]["bias"] = broken["head"]["bias"].at[0].set(jnp.inf)
    _, info = fed.step(fed.KEY, fed.replaced(state, **{model: broken}), DATA, experiment)
    assert not info.finite
    assert info.issue.feasible == (model == "owner")  # a NaN accuracy holds no cap


@part
class Escalating(calibrate.Fixed):
    """A rule with a memory: no noise in the first protected round, then σ0, 2 σ0, …"""

    abstract: ClassVar[bool] = True

    def init(self):
        return jnp.int32(0)

    def calibrate(self, key, probe, carry):
        now = self.replace(strength=self.strength * carry)
        decision, evidence, probe, _ = super(Escalating, now).calibrate(key, probe, ())  # pyright: ignore
        return decision, evidence, probe, carry + 1


def flat(params, rows: int = 1) -> np.ndarray:
    """Models [rows, ...] as float64 [rows, all parameters]."""
    leaves = [np.reshape(leaf, (rows, -1)) for leaf in jax.tree.leaves(params)]
    return np.concatenate(leaves, axis=1).astype(np.float64)


def test_fedadam_a_rule_with_a_memory_and_rounds_that_are_skipped():
    """W follows NumPy's Adam on the clients' averaged update (Reddi et al. 2021); a round that is
    skipped changes nothing but the rule's memory; the rule is asked once a protected round."""
    scheme = schemes.SkipInfeasible(fed.TINY.scheme)
    adam = server.Optax(optax.adam, {"learning_rate": 0.03, "b1": 0.8, "b2": 0.9, "eps": 1e-3})
    experiment = fed.experiment(
        scheme=scheme, calibrator=Escalating(strength=4.0, cap=0.6), server_clients="0"
    ).replace(server=adam)
    state, words = fed.start(experiment), []
    w, m, v, t = flat(state.base)[0], 0.0, 0.0, 0
    for _ in range(5):
        before = state
        state, info = fed.step(keys.root(2), state, DATA, experiment)
        words.append((float(info.issue.strength), bool(info.issue.shipped), int(state.scheme)))
        if info.issue.shipped:
            counts = np.asarray(info.members.counts, float)
            g = w - counts @ flat(info.observed[1], 4) / counts.sum()
            m, v, t = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2, t + 1
            w = w - 0.03 * m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
            fed.assert_same(state.owner, state.base)  # s = ∅
        else:
            assert int(info.training_samples) == 0
            fed.assert_same(state, fed.replaced(before, round=state.round, scheme=state.scheme))
        np.testing.assert_allclose(flat(state.base)[0], w, rtol=1e-3, atol=1e-4)
    assert [carry for _, _, carry in words] == [0, 1, 2, 3, 4]
    assert [strength for strength, _, _ in words] == [0, 0, 4, 8, 12]
    assert {shipped for _, shipped, _ in words} == {True, False}


def test_an_optax_optimizer_of_ones_own_trains_the_clients():
    """An opaque transformation is traced like a part; what it computes is in `test_local`."""
    ours = fed.experiment(optimizer=optax.sgd(0.125, momentum=0.5))
    assert isinstance(ours.local.optimizer, optimizers.Opaque)
    state, theirs = fed.start(), fed.start()
    for experiment in (ours, fed.TINY):
        shapes = jax.eval_shape(noisefl.step, fed.KEY, state, DATA, experiment)
        assert jax.tree.structure(shapes[0]) == jax.tree.structure(theirs)
