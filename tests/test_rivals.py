"""The rival schemes against NumPy, and what their papers say of them; the contract is tested in
`test_schemes`."""

import functools
import itertools
import math

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_nets as nets
from flax import linen as nn
from scheme_rounds import DATA, LINEN, M, W, copies, flat, issued, joined, joined_clients, still

from noisefl import keys, models, schemes
from noisefl.schemes import Slot


def assert_one_program(before, after):
    """States have one structure, so that rounds are a loop."""
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (before, after)]
    assert kinds[0] == kinds[1]


# DP downlink.


def test_a_release_is_unbiased_where_the_clip_does_not_act():
    """The mean of 400 untrained updates over all 226 parameters, in their own deviations: of 226
    standard normals over √400 the largest is below 4.5 but once in 600."""
    scheme = schemes.Released(calibrator=still(0.5), clip=5.0)
    deviation = deviation_by_hand(scheme, 0.5)
    draws = jax.vmap(jax.random.key)(jnp.arange(400))
    of = functools.partial(scheme.variant, strength=jnp.float32(0.5), variant=jnp.int32(0))
    many = jax.jit(jax.vmap(lambda key: of(W, key)))(draws)
    for path, leaf in flat(many).items():
        added = (leaf - np.asarray(flat(W)[path])) / deviation[path]
        assert np.abs(added.mean(axis=0)).max() * 20 < 4.5
        assert added.std() == pytest.approx(1, rel=5 / math.sqrt(2 * added.size))
    issue, members, _ = issued(scheme)
    slot = Slot(jnp.int32(0), members.groups[0], members.clients[0])
    copy = scheme.copy(W, issue, slot)
    update, mask = scheme.recover(copy, copy, W, issue, slot)
    assert mask is None
    fed.assert_same(update, jax.tree.map(jnp.subtract, copy, W))  # it stays in
    assert scheme.slots(LINEN.cohort) == {"copy0": 0}
    assert (np.ptp(joined_clients(copies(scheme, issue, members)), axis=0) == 0).all()


def deviation_by_hand(scheme, strength) -> dict[tuple[str, ...], float]:
    """C_l / √n_l by hand: C = clip · √O, O = 3 of the stem and 4 of the head."""
    clip = float(scheme.clip)
    of_layer = {"stem": clip * (3 / 30) ** 0.5, "head": clip * (4 / 196) ** 0.5}
    return {path: strength * of_layer[path[0]] for path in flat(W)}


def test_the_clip_acts_on_layers_that_are_longer_and_on_no_others():
    scheme = schemes.Released(calibrator=still(1.0), clip=0.5)
    long = jax.tree.map(lambda w: w, W)
    long["head"] = jax.tree.map(lambda w: w / 100, W["head"])  # and this one is not
    clipped = scheme.variant(long, keys.root(1), jnp.float32(1e-7), jnp.int32(0))
    norms = {layer: np.linalg.norm(joined(clipped[layer])) for layer in clipped}
    assert norms["stem"] == pytest.approx(0.5 * 3**0.5, rel=1e-4)
    np.testing.assert_allclose(joined(clipped["head"]), joined(long["head"]), atol=1e-6)
    fed.assert_same(scheme.variant(long, keys.root(1), jnp.float32(0), jnp.int32(0)), long)


# Few weights.


def test_exactly_n_weights_are_shifted_uphill():
    scheme = schemes.FewWeights(calibrator=still(0.5), entries=7, sample=32)
    scheme.fit(LINEN.functions, fed.IMAGE, LINEN.cohort)
    issue, members, _ = issued(scheme)
    copy = fed.lane(copies(scheme, issue, members), 0)
    moved = joined(copy) - joined(W)
    assert np.sum(moved != 0) == 7
    rms = np.sqrt(np.mean(joined(W) ** 2))
    places, direction = (np.asarray(x) for x in issue.secret.draw)
    np.testing.assert_allclose(moved[places], 0.5 * rms * direction, atol=1e-6)
    assert np.mean(direction**2) == pytest.approx(1, rel=1e-5)

    images, labels = np.asarray(DATA.validation_images), np.asarray(DATA.validation_labels)

    def loss(params):
        logits = np.asarray(fed.forward(params, jnp.asarray(images / np.float32(255))), np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels])

    assert loss(copy) > loss(W)
    back = jax.tree.map(lambda w, c: 2 * w - c, W, copy)
    assert loss(copy) > loss(back)  # uphill, not any way
    with pytest.raises(ValueError, match=r"^entries=227: the model has 226 parameters$"):
        schemes.FewWeights(entries=227).fit(LINEN.functions, fed.IMAGE, LINEN.cohort)


# Quantised copies.


@pytest.mark.parametrize("strength", [0.25, 1.0, 4.0])
def test_a_quantised_layer_has_few_levels_and_a_bounded_error(strength):
    scheme = schemes.Quantised(calibrator=still(strength))
    issue, members, _ = issued(scheme)
    copy = flat(fed.lane(copies(scheme, issue, members), 0))
    coarse = 0
    for path, leaf in flat(W).items():
        whole = joined(W[path[0]])
        step = strength * np.sqrt(np.mean(whole**2))
        error = copy[path] - leaf
        assert np.abs(error).max() <= step / 2 * (1 + 1e-5)
        places = (copy[path] - copy[path].ravel()[0]) / step
        np.testing.assert_allclose(places, np.round(places), atol=1e-4)  # one grid
        levels = math.floor(2 * np.abs(leaf).max() / step) + 2
        assert len(np.unique(np.round(places))) <= levels
        coarse += min(math.ceil(math.log2(levels)) * leaf.size / 8 + 8, 4 * leaf.size)
    assert float(scheme.bytes_sent(W, issue)) == pytest.approx(coarse)
    if strength == 0.25:
        assert coarse < 4 * joined(W).size / 4


def test_offsets_of_the_grid_are_uniform_so_that_the_error_is_q_over_root_12():
    """Over 300 offsets of 192 parameters: their mean square has a relative error below 0.05."""
    scheme = schemes.Quantised(calibrator=still(2.0))
    paths = scheme.touched(LINEN.functions, fed.IMAGE)

    def error(key):
        copy = scheme.variant(W, scheme.on.keys(key, paths), jnp.float32(2.0), jnp.int32(0))
        return copy["head"]["kernel"] - W["head"]["kernel"]

    errors = jax.jit(jax.vmap(error))(jax.vmap(jax.random.key)(jnp.arange(300)))
    step = 2 * np.sqrt(np.mean(joined(W["head"]) ** 2))
    assert np.mean(np.square(errors)) == pytest.approx(step**2 / 12, rel=0.05)
    assert np.abs(np.mean(errors)) < 0.05 * step
    known = scheme.spread(W, jnp.float32(2.0), LINEN.functions, fed.IMAGE)["head", "kernel"]
    assert known == pytest.approx(step / 12**0.5, rel=1e-5)


# Sub-models.


class Deep(nn.Module):
    """Two convolutions and two dense layers; the second reads images of 2 × 2 of 6 channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3), name="zeroth")(x)), (2, 2), (2, 2))
        x = nn.max_pool(nn.relu(nn.Conv(6, (3, 3), name="first")(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(10, name="b")(x.reshape(x.shape[0], -1)))
        return nn.Dense(fed.CLASSES, name="a")(x)


DEEP = fed.TINY.replace(model=Deep()).resolved()
SHAPES = {
    "zeroth": {"kernel": (3, 3, 1, 4), "bias": (4,)},
    "first": {"kernel": (3, 3, 4, 6), "bias": (6,)},
    "b": {"kernel": (24, 10), "bias": (10,)},
    "a": {"kernel": (10, fed.CLASSES), "bias": (fed.CLASSES,)},
}
RNG = np.random.default_rng(3)
DEEP_W = {
    layer: {name: jnp.float32(RNG.normal(0.1, 0.3, shape)) for name, shape in some.items()}
    for layer, some in SHAPES.items()
}
NET: nets.Net = [
    ("conv", "zeroth", "SAME"), ("relu",), ("pool",), ("conv", "first", "SAME"), ("relu",),
    ("pool",), ("flatten",), ("dense", "b"), ("relu",), ("dense", "a"),
]  # fmt: skip
CHAIN = {"zeroth": 4, "first": 6, "b": 10}  # hidden layers in call order
SHARE = {1.0: (2, 3, 5), 2.0: (2, 2, 4), 9.0: (1, 1, 1)}  # ⌈units / (1 + s)⌉


def held_units(copy) -> list[np.ndarray]:
    """Of one copy, by its biases, none of which is 0 in W."""
    return [np.flatnonzero(np.asarray(copy[layer]["bias"])) for layer in CHAIN]


@pytest.mark.parametrize("units", ["sticky", "rolling"])
@pytest.mark.parametrize("strength", [1.0, 2.0, 9.0])
def test_a_sub_model_computes_what_the_smaller_network_does(units, strength):
    scheme = schemes.SubModel(calibrator=still(strength), units=units)
    scheme.fit(DEEP.functions, fed.IMAGE, DEEP.cohort)
    issue, members, _ = issued(scheme, DEEP_W, experiment=DEEP)
    all_of_them = copies(scheme, issue, members, DEEP_W)
    images = np.random.default_rng(0).integers(0, 256, (5, *fed.IMAGE))
    for slot in range(M):
        copy = fed.lane(all_of_them, slot)
        one, two, three = held_units(copy)
        assert (len(one), len(two), len(three)) == SHARE[strength]
        w, rows = jax.tree.map(np.asarray, DEEP_W), np.arange(4 * 6).reshape(4, 6)
        small = {
            "zeroth": {"kernel": w["zeroth"]["kernel"][..., one], "bias": w["zeroth"]["bias"][one]},
            "first": {
                "kernel": w["first"]["kernel"][:, :, one][..., two],
                "bias": w["first"]["bias"][two],
            },
            "b": {
                "kernel": w["b"]["kernel"][rows[:, two].ravel()][:, three],
                "bias": w["b"]["bias"][three],
            },
            "a": {"kernel": w["a"]["kernel"][three], "bias": w["a"]["bias"]},
        }
        whole, _ = nets.forward(NET, nets.as_float64(copy), images)
        np.testing.assert_allclose(
            whole, nets.forward(NET, nets.as_float64(small), images)[0], rtol=1e-9
        )
        size = sum(leaf.size for leaf in jax.tree.leaves(small))
        assert float(scheme.bytes_sent(DEEP_W, issue)) == 4 * size
        place = Slot(jnp.int32(slot), members.groups[slot], members.clients[slot])
        update, mask = scheme.recover(copy, copy, DEEP_W, issue, place)
        assert not joined(update).any()
        assert joined(mask).sum() == size
        fed.assert_same(jax.tree.map(jnp.multiply, DEEP_W, mask), copy)


def test_sticky_units_are_the_clients_own_and_rolling_ones_move_by_one():
    sticky = schemes.SubModel(calibrator=still(1.0))
    issue, members, carry = issued(sticky, DEEP_W, experiment=DEEP)
    again, _, _ = issued(sticky, DEEP_W, 3, 5, carry, DEEP)
    one = copies(sticky, issue, members, DEEP_W)
    fed.assert_same(one, copies(sticky, again, members, DEEP_W))
    subsets = [tuple(np.concatenate(held_units(fed.lane(one, slot)))) for slot in range(M)]
    assert len(set(subsets)) == M  # of 6 · 20 · 252 that there are
    stronger = schemes.SubModel(calibrator=still(2.0))
    less, _, _ = issued(stronger, DEEP_W, 3, 5, carry, DEEP)
    for slot in range(M):  # nested: a larger share later is all that a client ever has
        small = held_units(fed.lane(copies(stronger, less, members, DEEP_W), slot))
        large = held_units(fed.lane(one, slot))
        assert all(set(few) <= set(many) for few, many in zip(small, large, strict=True))

    rolling = schemes.SubModel(calibrator=still(1.0), units="rolling")
    _, members, carry = issued(rolling, DEEP_W, experiment=DEEP)
    seen = []
    for t in (1, 2, 3):
        issue, _, _ = issued(rolling, DEEP_W, t, t, carry, DEEP)
        everyone = copies(rolling, issue, members, DEEP_W)
        assert (np.ptp(joined_clients(everyone), axis=0) == 0).all()
        seen.append(held_units(fed.lane(everyone, 0)))
    for before, after in itertools.pairwise(seen):
        for units, old, new in zip(CHAIN.values(), before, after, strict=True):
            assert set(new) == {(unit + 1) % units for unit in old}
    assert rolling.slots(DEEP.cohort) == {"copy0": 0}


def test_sub_models_of_layers_that_do_not_chain_are_refused():
    class Aside(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x.reshape(x.shape[0], -1)
            both = nn.Dense(5, name="z")(x), nn.Dense(6, name="a")(x)
            return nn.Dense(fed.CLASSES, name="head")(jnp.concatenate(both, axis=1))

    with pytest.raises(ValueError, match=r"^model='z/a': a \(64, 6\) does not read .* of z"):
        schemes.SubModel().fit(models.functions(Aside()), fed.IMAGE, fed.TINY.cohort)
    schemes.SubModel().fit(fed.TINY.functions, fed.IMAGE, fed.TINY.cohort)


# The head stays with the server.


def test_a_client_of_a_withheld_head_never_has_it():
    experiment = fed.TINY.replace(model=fed.TinyCNN(), scheme=schemes.Withheld())
    before = fed.start(experiment)
    after, info = fed.step(fed.KEY, before, DATA, experiment)
    assert_one_program(before, after)
    copy, kept = info.observed
    for has in (copy, kept):
        assert not joined(has["head"]).any()
    assert (np.asarray(kept["stem"]["kernel"]) != np.asarray(copy["stem"]["kernel"])).any()
    bare, of_bare = fed.step(fed.KEY, before, DATA, experiment.replace(scheme=schemes.Bare()))
    fed.assert_same(after.base, bare.base)  # joint training is training from W: bitwise
    fed.assert_same(kept["stem"], of_bare.observed[1]["stem"])
    assert float(experiment.scheme.bytes_sent(before.base, info.issue)) == 4 * 30

    warm = experiment.replace(scheme=schemes.Warmup(schemes.Withheld(), 5))
    _, of_warm = fed.step(fed.KEY, before, DATA, warm)  # W is handed out: all of it is kept
    fed.assert_same(of_warm.observed[1], of_bare.observed[1])
    assert float(warm.scheme.bytes_sent(before.base, of_warm.issue)) == 4 * 226


def test_what_cannot_be_withheld_is_refused():
    with pytest.raises(ValueError, match=r"^withheld_layers=2: must leave one of the model's 2"):
        schemes.Withheld(withheld_layers=2).fit(LINEN.functions, fed.IMAGE, LINEN.cohort)
    two = schemes.Withheld(withheld_layers=2).touched(DEEP.functions, fed.IMAGE)
    assert {path[0] for path in two} == {"a", "b"}


# Rows of own classes alone.


@pytest.mark.parametrize("least_share", [0.0, 0.3])
def test_a_round_of_own_classes_is_that_of_smaller_heads(least_share):
    """Each client trains a net that ends in its own classes, in NumPy, with a row of zeros for one
    of which it owns too few images; rows move by their holders' mean, all else by everybody's."""
    base = fed.replaced(fed.start(), owner=W)
    images, labels = np.asarray(DATA.train_images), np.asarray(DATA.train_labels)
    rows = [np.asarray(row)[:n] for row, n in zip(DATA.clients, DATA.counts.tolist(), strict=True)]
    experiment = fed.TINY.replace(scheme=schemes.OwnClasses(least_share=least_share))
    after, info = fed.step(fed.KEY, base, DATA, experiment)
    assert_one_program(base, after)
    copies, kept = info.observed
    own_key = keys.of_round(fed.KEY, jnp.int32(1))
    counts, updates, masks = [], [], []
    for place, k in enumerate(info.members.clients.tolist()):
        own, often = np.unique(labels[rows[k]], return_counts=True)
        mask = np.zeros(fed.CLASSES)
        mask[own[often >= least_share * len(rows[k])]] = 1
        start = nets.as_float64(W)
        start["head"] = {name: w * mask for name, w in start["head"].items()}
        sliced = {"stem": start["stem"], "head": {n: w[..., own] for n, w in start["head"].items()}}
        batches = fed.local_batches(own_key, k, DATA, experiment.local)
        remapped = np.searchsorted(own, labels[rows[k]])
        rate = float(experiment.local.optimizer.learning_rate)
        trained = nets.client_update(fed.NET, sliced, batches, images[rows[k]], remapped, rate)
        update = nets.combine(np.subtract, start, start)
        update["stem"] = nets.combine(np.subtract, trained, sliced)["stem"]
        for name in ("kernel", "bias"):
            copy = np.asarray(copies["head"][name][place])
            np.testing.assert_array_equal(copy, np.asarray(W["head"][name]) * np.float32(mask))
            has = np.asarray(kept["head"][name][place])
            assert not np.delete(has, own, axis=-1).any()
            update["head"][name][..., own] = trained["head"][name] - sliced["head"][name]
            np.testing.assert_allclose(has[..., own], trained["head"][name], **fed.CLOSE)
        counts.append(len(rows[k]))
        updates.append(update)
        masks.append(mask)
    assert 0 < np.sum(masks) < M * fed.CLASSES
    weights, masks = np.array(counts) / sum(counts), np.array(masks)
    for path, leaf in flat(after.base).items():
        moves = np.array([update[path[0]][path[1]] for update in updates])
        shares = np.repeat(weights[:, None], leaf.shape[-1], axis=1)
        if path[0] == "head":
            held = masks * shares
            shares = held / np.where(held.sum(0) > 0, held.sum(0), 1)
        shares = shares.reshape(M, *[1] * (leaf.ndim - 1), -1)
        expected = np.asarray(flat(W)[path]) + np.sum(shares * moves, axis=0)
        np.testing.assert_allclose(leaf, expected, **fed.CLOSE)
    absent = sum(1 - masks[0])
    sent = experiment.scheme.bytes_sent(base.base, info.issue)
    assert float(sent) == 4 * (226 - 49 * absent)


def test_classes_are_those_of_valid_rows():
    found = DATA.classes_of(jnp.arange(8), fed.CLASSES)
    for k, n in enumerate(DATA.counts.tolist()):
        own = np.asarray(DATA.train_labels)[np.asarray(DATA.clients)[k, :n]]
        assert found[k].tolist() == np.bincount(own, minlength=fed.CLASSES).tolist()


def test_models_without_a_row_for_each_class_are_refused():
    class NoBias(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(fed.CLASSES, use_bias=False)(x.reshape(x.shape[0], -1))

    with pytest.raises(ValueError, match=r"^model='NoBias': must end in .* and a bias \[4\]"):
        schemes.OwnClasses().fit(models.functions(NoBias()), fed.IMAGE, fed.TINY.cohort)


# Statistics alone.


def test_statistics_are_the_ridge_regression_on_the_pooled_clients():
    """In float64, of all images of the clients of two rounds; a client in both counts twice."""
    scheme = schemes.Statistics(ridge=0.01, at_once=5)  # no divisor of the padding
    experiment = fed.TINY.replace(model=fed.TinyCNN(), scheme=scheme)
    state, rows = fed.start(experiment), []
    stem, base = state.base["stem"], state.base
    for _ in range(2):
        before = state
        state, info = fed.step(fed.KEY, state, DATA, experiment)
        copy, kept = info.observed
        assert not joined(copy["head"]).any()
        fed.assert_same(copy, kept)
        for k in np.asarray(info.members.clients):
            rows += np.asarray(DATA.clients)[k, : int(DATA.counts[k])].tolist()
        fed.assert_same(state.base["stem"], stem)
        assert_one_program(before, state)
    net = {name: jax.tree.map(np.float64, layer) for name, layer in base.items()}
    net["head"] = {"kernel": np.eye(48), "bias": np.zeros(48)}
    features, _ = nets.forward(fed.NET, net, np.asarray(DATA.train_images)[rows])
    features = np.concatenate([features, np.ones((len(rows), 1))], axis=1)
    hot = np.eye(fed.CLASSES)[np.asarray(DATA.train_labels)[rows]]
    mean = features.T @ features / len(rows)
    expected = np.linalg.solve(mean + 0.01 * np.eye(49), features.T @ hot / len(rows))
    np.testing.assert_allclose(state.base["head"]["kernel"], expected[:-1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(state.base["head"]["bias"], expected[-1], rtol=1e-3, atol=1e-4)


def test_models_that_statistics_cannot_serve_are_refused():
    class Square(nn.Module):
        """As many classes as the first layer has inputs."""

        @nn.compact
        def __call__(self, x):
            return nn.Dense(64)(nn.Dense(5)(x.reshape(x.shape[0], -1)))

    scheme, cohort = schemes.Statistics(), LINEN.cohort
    scheme.fit(fed.TINY.functions, fed.IMAGE, cohort)  # a pair of functions
    with pytest.raises(ValueError, match=r"^model='Square': must end in a dense layer"):
        scheme.fit(models.functions(Square()), fed.IMAGE, cohort)
    with pytest.raises(ValueError, match=r"^scheme='statistics': hands out no model to train"):
        schemes.Warmup(scheme)
    for name in models.MODELS:
        made = models.functions(models.by_name(name, 10))
        scheme.fit(made, (28, 28, 1), cohort)
        if name in ("resnet8", "resnet18", "vit"):  # what passes a layer by is of its width
            with pytest.raises(ValueError, match=r"^model='.* does not read the outputs of "):
                schemes.SubModel().fit(made, (28, 28, 1), cohort)
        else:
            schemes.SubModel().fit(made, (28, 28, 1), cohort)


# Through a whole round.

ROUNDS = {
    "own noise": schemes.own_noise(calibrator=still(1.0)),
    "sticky": schemes.own_noise(calibrator=still(1.0), own="sticky"),
    "two-way": schemes.own_noise(calibrator=still(1.0), own="sticky", common=0.5),
    "released": schemes.Released(calibrator=still(0.1)),
    "few weights": schemes.FewWeights(calibrator=still(1.0), entries=5),
    "quantised": schemes.Quantised(calibrator=still(1.0)),
    "sticky units": schemes.SubModel(calibrator=still(1.0)),
    "rolling units": schemes.SubModel(calibrator=still(1.0), units="rolling"),
}


def of_rounds(scheme, strength=None):
    """FedAvg's round, and that of the scheme, from the same state."""
    if strength is not None:
        scheme = scheme.replace(calibrator=still(strength))
    linen = isinstance(scheme, schemes.SubModel)  # must know the order of the layers
    model = fed.TinyCNN() if linen else fed.TINY.model
    experiment = fed.TINY.replace(model=model, scheme=scheme)
    before = fed.start(experiment)
    return before, *fed.step(fed.KEY, before, DATA, experiment)


@pytest.mark.parametrize("name", ROUNDS)
def test_a_round_learns_and_at_strength_0_it_is_fedavgs(name):
    """Bitwise, but for sub-models: with masks the mean is divided by the sum of the weights,
    which is 1 up to rounding."""
    before, after, info = of_rounds(ROUNDS[name])
    assert info.finite
    assert (joined(after.base) != joined(before.base)).any()
    assert (joined_clients(info.observed[0]) != joined(before.base)).any()
    assert_one_program(before, after)
    _, nothing, _ = of_rounds(ROUNDS[name], 0.0)
    _, fedavg, _ = of_rounds(schemes.Bare())
    if isinstance(ROUNDS[name], schemes.SubModel):
        fed.assert_same(nothing.base, fedavg.base, rtol=1e-5, atol=1e-6)
    else:
        fed.assert_same(nothing.base, fedavg.base)
