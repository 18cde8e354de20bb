"""The reference's rounds: hand-worked numbers and closed forms."""

import dataclasses

import numpy as np
import pytest
import reference as ref
import reference_nets as nets
from reference_cases import LINEAR, largest_gap, random_params

# Which parameters carry ξ.


@pytest.mark.parametrize(
    ("net", "layers", "parameters", "expected"),
    [
        ("lenet5", "first", "kernel+bias", "conv1/kernel conv1/bias"),
        ("mlp", "first", "kernel", "dense1/kernel"),
        ("mcmahan", "last", "kernel+bias", "dense2/kernel dense2/bias"),
        ("mcmahan", "all", "kernel", "conv1/kernel conv2/kernel dense1/kernel dense2/kernel"),
        ("lenet5", "conv2", "kernel+bias", "conv2/kernel conv2/bias"),
        ("lenet5", "dense[13]/bias", "kernel+bias", "dense1/bias dense3/bias"),
        ("lenet5", "conv", "kernel+bias", ""),  # a whole name, not a part of one
    ],
)
def test_noised_parameters(net, layers, parameters, expected):
    pairs = ref.noised_parameters(nets.NETS[net], layers, parameters)
    assert " ".join("/".join(pair) for pair in pairs) == expected


# The loop, on a toy whose accuracy under noise is known: ten one-hot images of label 0, where
# image p is right while its margin stays above 0. ξ lowers the margins of the first five by σ·u and
# raises those of the other five; so the plus copy loses the first five, the minus copy the others.

MARGINS = np.array([1, 2, 3, 4, 5] * 2) - 0.5
TOY = ref.Options(
    net=LINEAR, noised=[("dense1", "kernel")], strength_step=1.0, warmup_rounds=0, learning_rate=0.0
)


def toy_params():
    kernel = np.stack([MARGINS, np.zeros(10)], axis=1)  # [10, 2]
    return {"dense1": {"kernel": kernel, "bias": np.zeros(2)}}


def toy_data(counts=(3, 5, 2, 4)):
    eye = (np.eye(10) * 255).astype(np.uint8).reshape(10, 1, 10, 1)
    rng = np.random.default_rng(5)
    drawn = [rng.integers(0, 10, n) for n in counts]
    labels = [rng.integers(0, 2, n) for n in counts]
    return ref.Data([eye[d] for d in drawn], labels, eye, np.zeros(10, int))


def toy_noise(size=1.0):
    down = np.array([-1.0] * 5 + [1.0] * 5)
    return {"dense1": {"kernel": size * np.stack([down, 0 * down], axis=1)}}


def toy_draws(data, cohort=((0, 1), (1, -1)), server=(2.0,), noise=lambda j: toy_noise()):
    batches = [np.array_split(np.arange(len(data.client_labels[k])), 2) for k, _ in cohort]
    return ref.Draws(cohort, batches, server, noise)


def run_toy(data=None, state=None, draws=None, **changes):
    options = dataclasses.replace(TOY, **changes)
    data = toy_data() if data is None else data
    state = ref.initial_state(options, data, toy_params()) if state is None else state
    draws = toy_draws(data) if draws is None else draws
    return ref.reference_round(state, draws, data, options)


def test_additive_loop_starts_at_the_bare_base_and_stops_at_the_cap():
    _, report = run_toy()
    # at σ the copies have lost the margins below σ: 0, 1, 2, 3, 4 of ten images each
    expected = [(0, 1.0, 1.0), (1, 0.9, 0.9), (2, 0.8, 0.8), (3, 0.7, 0.7), (4, 0.6, 0.6)]
    assert report.schedule == expected
    assert (report.strength, report.feasible, report.shipped) == (4, True, True)
    assert (report.tries, report.evaluations, report.samples) == (5, 10, 100)
    assert (report.plus_accuracy, report.minus_accuracy) == (0.6, 0.6)
    assert report.relative_strength == pytest.approx(4 / np.sqrt(np.mean(MARGINS**2) / 2))


GEOMETRIC = {"calibrator": "geometric", "strength": 0.75, "strength_factor": 2}


@pytest.mark.parametrize(
    ("changes", "strengths", "feasible"),
    [
        ({"cap_margin": 0.05}, [0, 1, 2, 3, 4, 5], True),
        ({"strength": 2.0}, [2, 3, 4], True),
        ({"strength_max": 2.5, "redraw": "rescale"}, [0, 1, 2, 2.5], False),
        ({"strength_max": 2.0, "redraw": "rescale"}, [0, 1, 2], False),
        ({"strength_max": 1.5, "max_tries": 5}, [0, 1, 1.5, 1.5, 1.5], False),  # fresh draws
        ({"strength_max": 4.0}, [0, 1, 2, 3, 4], True),
        ({"max_tries": 3}, [0, 1, 2], False),
        ({"max_tries": 5}, [0, 1, 2, 3, 4], True),
        # half of the images are always right
        ({"cap": 0.4, "redraw": "rescale"}, [0, 1, 2, 3, 4, 5], False),
        (GEOMETRIC, [0.75, 1.5, 3, 5], True),
        ({**GEOMETRIC, "bare_first": True}, [0, 0.75, 1.5, 3, 5], True),
        ({**GEOMETRIC, "bare_first": True, "max_tries": 3}, [0, 0.75, 1.5], False),
        ({**GEOMETRIC, "bare_first": True, "cap": 0.99, "max_tries": 2}, [0, 0.75], True),
        ({"calibrator": "fixed", "strength": 3.0}, [3], False),
        ({"calibrator": "fixed", "strength": 4.0}, [4], True),
    ],
)
def test_schedule(changes, strengths, feasible):
    _, report = run_toy(**changes)
    assert [row[0] for row in report.schedule] == strengths
    assert report.feasible == feasible


def test_a_look_at_the_bare_base_is_one_model_and_draws_nothing():
    """A base that holds goes out bare; draw 0 is that of the first try with noise."""
    asked, data = [], toy_data()
    data = dataclasses.replace(data, accuracy_labels=np.array([0] * 6 + [1] * 4))

    def noise(j):
        asked.append(j)
        return toy_noise()

    draws = toy_draws(data, noise=noise)
    _, held = run_toy(data, draws=draws, bare_first=True, **GEOMETRIC)
    assert (held.schedule, held.feasible, held.strength) == ([(0, 0.6, 0.6)], True, 0)
    assert (held.tries, held.evaluations, held.samples, asked) == (1, 1, 10, [])
    assert held.plus is held.minus
    _, raised = run_toy(data, draws=draws, bare_first=True, cap=0.55, **GEOMETRIC)
    assert (raised.tries, raised.evaluations, raised.samples) == (2, 3, 30)
    assert asked == [0]


def test_the_server_moves_by_its_rate():
    data, w = toy_data(), toy_params()
    changes = {"warmup_rounds": 1, "learning_rate": 0.5}
    whole, _ = run_toy(data, **changes)
    half, _ = run_toy(data, server_learning_rate=0.5, **changes)
    assert largest_gap(half.base, nets.combine(lambda a, b: (a + b) / 2, w, whole.base)) < 1e-12
    assert half.owner is half.base


def test_both_copies_must_be_under_the_cap():
    one_sided = toy_noise()
    one_sided["dense1"]["kernel"][5:] = 0  # only the plus copy suffers
    data = toy_data()
    _, report = run_toy(data, draws=toy_draws(data, noise=lambda j: one_sided))
    assert (report.plus_accuracy, report.minus_accuracy) == (0.5, 1.0)
    assert not report.feasible


@pytest.mark.parametrize(("redraw", "strength"), [("fresh", 2.0), ("rescale", 4.0)])
def test_redraw(redraw, strength):
    """Draw 2 is twice as large: fresh noise meets the cap there, rescaled draw 0 does not."""
    asked = []

    def noise(j):
        asked.append(j)
        return toy_noise(2.0 if j == 2 else 1.0)

    data = toy_data()
    _, report = run_toy(data, draws=toy_draws(data, noise=noise), redraw=redraw)
    assert report.strength == strength
    assert asked == ([0, 1, 2] if redraw == "fresh" else [0] * 5)


def test_relative_noise_scales_each_layer_by_its_own_rms():
    base = {
        "conv1": {"kernel": np.array([3.0, 0, 0]), "bias": np.array([4.0])},
        "dense1": {"kernel": np.array([1.0, -1]), "bias": np.array([7.0])},
    }
    unit = nets.combine(np.ones_like, base)
    noised = [("conv1", "kernel"), ("conv1", "bias"), ("dense1", "kernel")]
    options = ref.Options(net=[], noised=noised, noise_scale="relative")
    noise = ref.scaled_noise(base, unit, 2.0, options)
    np.testing.assert_allclose(noise["conv1"]["kernel"], 5.0)  # 2·√(25 / 4)
    np.testing.assert_allclose(noise["conv1"]["bias"], 5.0)
    np.testing.assert_allclose(noise["dense1"]["kernel"], 2.0)
    np.testing.assert_array_equal(noise["dense1"]["bias"], 0.0)
    absolute = ref.scaled_noise(
        base, unit, 2.0, dataclasses.replace(options, noise_scale="absolute")
    )
    np.testing.assert_array_equal(absolute["conv1"]["kernel"], 2.0)
    _, report = run_toy(noise_scale="relative", strength_step=0.5)
    assert report.relative_strength == report.strength > 0


@pytest.mark.parametrize("skip", [False, True])
def test_infeasible_round(skip):
    data = toy_data()
    state = ref.initial_state(TOY, data, toy_params())
    changes = {"max_tries": 4, "learning_rate": 0.1, "skip_infeasible": skip}
    after, report = run_toy(data, state, **changes)
    assert after.round == 1
    assert (report.strength, report.tries, report.feasible) == (3, 4, False)
    if skip:
        assert (report.shipped, report.local_models) == (False, [])
        assert largest_gap(after.owner, state.owner) == largest_gap(after.base, state.base) == 0
        assert after.owner_accuracy == state.owner_accuracy
    else:
        assert report.shipped
        assert largest_gap(after.base, state.base) > 0.1


# The averages. With η = 0 a client returns what it received, so they have closed forms.

CLOSED = {"calibrator": "fixed", "strength": 4.0}


@pytest.mark.parametrize("cancellation", ["pair", "subtract", "reweight"])
@pytest.mark.parametrize(
    ("cohort", "share"),  # clients 0, 1, 2, 3 hold 3, 5, 2, 4 samples
    [
        (((0, 1), (2, 1), (1, -1)), 0.0),  # an odd m whose groups hold 5 samples each
        (((0, 1), (1, -1), (3, -1)), (3 - 9) / 12),
        (((3, -1), (1, 1)), (5 - 4) / 9),
    ],
)
def test_noise_cancels_by_the_sample_shares(cohort, share, cancellation):
    """W' = W + (p_A − p_B) ξ with "pair" (ALGORITHM.md, "Derived"), W' = W with the others."""
    data, w = toy_data(), toy_params()
    state = ref.State(1, nets.combine(np.ones_like, w), w, False, 0.0)
    draws = toy_draws(data, cohort=cohort, server=(3.0, 1.0))
    after, report = run_toy(data, state, draws, cancellation=cancellation, **CLOSED)
    left = share if cancellation == "pair" else 0.0
    expected = nets.combine(lambda b, a: b + left * (a - b), w, report.plus)
    assert largest_gap(after.base, expected) < 1e-12
    # G' = (n W' + n_s G) / (n + n_s)
    n = sum(len(data.client_labels[client]) for client, _ in cohort)
    owner = nets.combine(lambda b, g: (n * b + 4 * g) / (n + 4), expected, state.owner)
    assert largest_gap(after.owner, owner) < 1e-12


@pytest.mark.parametrize("cancellation", ["pair", "subtract", "reweight"])
def test_round_with_training_is_the_written_out_sum(cancellation):
    data = toy_data()
    rng = np.random.default_rng(6)
    owner = nets.combine(lambda w: w + rng.normal(size=w.shape), toy_params())
    state = ref.State(4, owner, toy_params(), False, 0.0)
    draws = toy_draws(data, cohort=((3, -1), (0, 1)), server=(2.0, 5.0))
    changes = {"cancellation": cancellation, "learning_rate": 0.8, "learning_rate_decay": 0.5}
    after, report = run_toy(data, state, draws, **changes, **CLOSED)
    a, b = report.plus, report.minus
    rate = 0.8 * 0.5**4  # t = 5
    w3 = nets.client_update(
        LINEAR, b, draws.batches[0], data.client_images[3], data.client_labels[3], rate
    )
    w0 = nets.client_update(
        LINEAR, a, draws.batches[1], data.client_images[0], data.client_labels[0], rate
    )
    assert largest_gap(report.local_models[0], w3) == largest_gap(report.local_models[1], w0) == 0
    n0, n3 = 3, 4
    for layer, name in (("dense1", "kernel"), ("dense1", "bias")):
        x0, x3, g, w = (m[layer][name] for m in (w0, w3, owner, toy_params()))
        if cancellation == "subtract":
            x0, x3 = w + x0 - a[layer][name], w + x3 - b[layer][name]
        if cancellation == "reweight":
            n0 = n3 = 3.5
        np.testing.assert_allclose(after.base[layer][name], (n0 * x0 + n3 * x3) / 7, atol=1e-12)
        held = (n0 * x0 + n3 * x3 + 2 * g + 5 * g) / 14
        np.testing.assert_allclose(after.owner[layer][name], held, atol=1e-12)
    split = data.accuracy_images, data.accuracy_labels
    assert after.owner_accuracy == nets.accuracy(LINEAR, after.owner, *split)


@pytest.mark.parametrize(
    ("server_weights", "server", "on_g"),
    [("borrowed", (2, 5), 7 / 15), ("uniform", (2, 5), 7 / 15.0), ("uniform", (5,), 3.5 / 11.5)],
)
def test_server_side_clients_hold_g(server_weights, server, on_g):
    """Clients 0 and 1 hold 8 samples together; the mean client of the population has 3.5."""
    data = toy_data()
    state = ref.State(1, nets.combine(np.ones_like, toy_params()), toy_params(), False, 0.0)
    draws = toy_draws(data, server=server)
    after, _ = run_toy(data, state, draws, server_weights=server_weights, **CLOSED)
    expected = nets.combine(lambda w, g: (1 - on_g) * w + on_g * g, after.base, state.owner)
    assert largest_gap(after.owner, expected) < 1e-12


def test_no_server_side_clients_make_g_equal_w():
    data = toy_data()
    after, _ = run_toy(data, draws=toy_draws(data, server=()), learning_rate=0.3, **CLOSED)
    assert largest_gap(after.owner, after.base) == 0


def test_the_owner_feeds_back():
    data = toy_data()
    state = ref.State(1, nets.combine(np.ones_like, toy_params()), toy_params(), False, 0.0)
    base, _ = run_toy(data, state, **CLOSED)
    owner, _ = run_toy(data, state, feeds_back=True, **CLOSED)
    assert largest_gap(base.owner, base.base) > 0.1
    assert largest_gap(owner.owner, base.owner) == largest_gap(owner.base, base.owner) == 0


@pytest.mark.parametrize("best", [0.9, 1.0])
def test_keep_best_keeps_an_owner_that_is_better(best):
    """The candidate has accuracy 0.9: a tie replaces G, a loss does not."""
    data = toy_data()
    base = toy_params()
    base["dense1"]["kernel"][0, 0] = -1.0
    owner = nets.combine(lambda w: 2 * w, base) if best == 0.9 else toy_params()
    state = ref.State(1, owner, base, False, best)
    draws = toy_draws(data, cohort=((0, 1), (0, -1)), server=(0.001,))
    after, _ = run_toy(data, state, draws, keep_best=True, **CLOSED)
    free, _ = run_toy(data, state, draws, **CLOSED)
    assert free.owner_accuracy == 0.9
    if best == 1.0:
        assert after.owner is state.owner
        assert after.owner_accuracy == 1.0
    else:
        assert largest_gap(after.owner, free.owner) == 0
        assert largest_gap(after.owner, state.owner) > 0.1
    assert largest_gap(after.base, free.base) == 0


# The warm-up.


def test_warm_up_is_plain_fedavg():
    def no_noise(j):
        raise AssertionError("the warm-up asked for noise")

    data, w = toy_data(), toy_params()
    state = ref.initial_state(TOY, data, w)
    draws = toy_draws(data, noise=no_noise)
    after, report = run_toy(data, state, draws, warmup_rounds=1, learning_rate=0.5)
    x, y = (
        nets.client_update(
            LINEAR, w, draws.batches[k], data.client_images[k], data.client_labels[k], 0.5
        )
        for k in (0, 1)
    )
    expected = nets.combine(lambda x, y: (3 * x + 5 * y) / 8, x, y)
    assert largest_gap(after.base, expected) < 1e-12
    assert after.owner is after.base
    assert (report.strength, report.relative_strength, report.tries, report.samples) == (0, 0, 0, 0)
    assert (report.warming, report.feasible, report.shipped) == (True, True, True)
    assert report.plus_accuracy == report.minus_accuracy == 1.0  # of the base it sent


def test_warm_up_ends_after_tau():
    data, warming = toy_data(), []
    state = ref.initial_state(TOY, data, toy_params())
    for _ in range(4):
        state, report = run_toy(data, state, warmup_rounds=2)
        warming.append(report.warming)
    assert warming == [True, True, False, False]
    assert state.round == 4


def test_until_cap_waits_for_a_good_owner_and_never_returns():
    """Owner accuracies, set by hand: the round after the first good one is the first noisy one."""
    data, warming, latches = toy_data(), [], []
    bad = nets.combine(lambda w: -w, toy_params())  # every margin negative: accuracy 0
    state = ref.State(0, bad, bad, True, 0.0)
    for model in (bad, bad, toy_params(), bad, bad):
        state = dataclasses.replace(state, owner=model, base=model)
        state, report = run_toy(data, state, until_cap=True, warmup_rounds=1)
        warming.append(report.warming)
        latches.append(state.warm)
    assert latches == [True, True, False, False, False]
    assert warming == [True, True, True, False, False]
    # τ stays a lower bound: a good first round does not shorten it
    state = ref.initial_state(TOY, data, toy_params())
    state, _ = run_toy(data, state, until_cap=True, warmup_rounds=2)
    _, report = run_toy(data, state, until_cap=True, warmup_rounds=2)
    assert not state.warm
    assert report.warming


# All of it, on a small CNN.


def quadrants(rng, n):
    """Images of noise whose one brighter quadrant is their label."""
    labels = rng.integers(0, 4, n)
    images = rng.integers(0, 120, (n, 8, 8, 1)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[row : row + 4, column : column + 4] += 100
    return images, labels


@pytest.mark.parametrize("warmup_rounds", [5, 100])
def test_a_small_cnn_learns_without_noise_and_stays_under_the_cap_with_it(warmup_rounds):
    rng, net = np.random.default_rng(7), nets.NETS["mcmahan"]
    clients = [quadrants(rng, 20) for _ in range(4)]
    data = ref.Data([x for x, _ in clients], [y for _, y in clients], *quadrants(rng, 200))
    options = ref.Options(
        net=net,
        noised=ref.noised_parameters(net, "all"),
        calibrator="geometric",
        noise_scale="relative",
        strength=0.125,
        learning_rate=0.2,
        warmup_rounds=warmup_rounds,
    )
    params = random_params(net, (8, 8, 1), 3, (3, 4, 8, 4), rng)

    def normal(value):
        return rng.normal(size=value.shape)

    state = ref.initial_state(options, data, params)
    for t in range(1, 16):
        batches = [np.split(rng.permutation(20), 4) * 2 for _ in range(4)]
        cohort = [(0, 1), (1, -1), (2, 1), (3, -1)]
        draws = ref.Draws(cohort, batches, [20, 20], lambda j: nets.combine(normal, params))
        state, report = ref.reference_round(state, draws, data, options)
        assert report.warming == (t <= warmup_rounds)
        if not report.warming:
            assert report.feasible
            assert max(report.plus_accuracy, report.minus_accuracy) <= 0.6
    if warmup_rounds == 100:  # what noise does to the owner is a finding, not a test
        assert state.owner_accuracy > 0.9
