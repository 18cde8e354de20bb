"""The library's round against `reference.py`, which is ALGORITHM.md in plain NumPy loops."""

from typing import Any

import federation as fed
import jax
import numpy as np
import optax
import pytest
import reference as ref
import reference_nets as nets

from noisefl.config import NEVER, Config

ODD = {"client_fraction": 0.625}  # m = 5: three clients in group a, two in group b

# name: (Config, Hyper, what must have happened in the three rounds for the case to mean anything)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "additive": ({}, {}, {"warming", "raised", "feasible"}),
    "fedavg": ({}, {"warmup_rounds": NEVER}, {"warming"}),
    "no warm-up": ({}, {"warmup_rounds": 0}, {"raised"}),
    "warm-up of two": ({}, {"warmup_rounds": 2}, {"warming", "raised"}),
    "cap with margin": ({}, {"cap_margin": 0.15}, {"raised", "feasible"}),
    "strength that suffices": ({}, {"strength": 4.0, "cap": 0.7}, {"feasible"}),
    "fresh draws at strength_max": (
        {},
        {"strength_max": 0.75, "max_tries": 5, "cap": 0.2},
        {"infeasible"},
    ),
    "infeasible after max_tries": ({}, {"max_tries": 2, "cap": 0.2}, {"infeasible"}),
    "learning-rate decay": ({}, {"learning_rate_decay": 0.5}, {"raised"}),
    "geometric": (
        {"calibrator": "geometric"},
        {"strength": 0.5, "strength_factor": 1.5},
        {"raised"},
    ),
    "rescale": ({"redraw": "rescale"}, {}, {"raised", "feasible"}),
    "rescale to strength_max": (
        {"redraw": "rescale"},
        {"strength_max": 0.75, "cap": 0.2},
        {"infeasible"},
    ),
    "geometric rescale": (
        {"calibrator": "geometric", "redraw": "rescale"},
        {"strength": 0.5, "strength_factor": 1.5},
        {"raised"},
    ),
    "fixed": ({"calibrator": "fixed"}, {"strength": 3.0}, {"feasible"}),
    "fixed too weak": ({"calibrator": "fixed"}, {"strength": 0.125}, {"infeasible"}),
    "relative, all layers": (
        {"noise_scale": "relative", "noise_layers": "all"},
        {},
        {"raised"},
    ),
    "last layer": ({"noise_layers": "last"}, {}, {"raised"}),
    "named parameters": ({"noise_layers": "stem/kernel|head/bias"}, {}, {"raised"}),
    "kernel only": ({"noise_parameters": "kernel"}, {}, {"raised"}),
    "laplace": ({"noise_distribution": "laplace"}, {}, {"raised"}),
    "odd m": (ODD, {}, {"raised"}),
    "two clients at once": ({**ODD, "clients_at_once": 2}, {}, {"raised"}),
    "three clients at once": ({**ODD, "clients_at_once": 3}, {}, {"raised"}),
    "all clients at once": ({**ODD, "clients_at_once": 0}, {}, {"raised"}),
    "full groups": ({"client_fraction": 0.375, "group_sizes": "full"}, {}, {"raised"}),
    "no server-side clients": ({"server_clients": 0}, {}, {"raised"}),
    "more server-side clients than K": ({"server_clients": 11}, {}, {"raised"}),
    "uniform server weights": ({"server_weights": "uniform"}, {}, {"raised"}),
    "subtract": ({"cancellation": "subtract"}, {}, {"warming", "raised"}),
    "reweight": ({**ODD, "cancellation": "reweight"}, {}, {"warming", "raised"}),
    "next base is the owner": ({"next_base": "owner"}, {}, {"warming", "raised"}),
    "keep-best": ({"keep_best": True}, {}, {"kept"}),
    "keep-best feeds back": (
        {"keep_best": True, "next_base": "owner"},
        {},
        {"kept"},
    ),
    "until cap": (
        {"warmup": "until_cap"},
        {"cap": 0.96, "learning_rate": 0.25},
        {"late", "protected"},
    ),
    "until cap, but not before tau": (
        {"warmup": "until_cap"},
        {"warmup_rounds": 2},
        {"late", "protected"},
    ),
    "infeasible ships": ({"on_infeasible": "ship"}, {"max_tries": 2}, {"infeasible"}),
    "infeasible is skipped": ({"on_infeasible": "skip"}, {"max_tries": 2}, {"skipped"}),
    "momentum": ({"momentum": True}, {"momentum": 0.5}, {"raised"}),
    "clipping": ({"clipping": True}, {"clip_norm": 0.25}, {"raised"}),
    "two epochs": ({"local_epochs": 2}, {}, {"raised"}),
    "two epochs, each in its own order": (
        {"local_epochs": 2, "batch_order": "every_epoch"},
        {},
        {"raised"},
    ),
    "evaluation in uneven batches": ({"eval_batch": 10}, {}, {"raised"}),
    "judged on test": ({"accuracy_on": "test", "local_test_size": 0}, {}, {"raised"}),
    "much at once": (
        {
            **{"client_fraction": 0.375, "group_sizes": "full", "cancellation": "reweight"},
            **{"noise_scale": "relative", "noise_layers": "last", "keep_best": True},
            **{"next_base": "owner", "momentum": True, "clipping": True, "clients_at_once": 4},
            **{"local_epochs": 2, "server_clients": 3, "warmup": "until_cap"},
        },
        {"momentum": 0.25, "clip_norm": 1.0, "learning_rate_decay": 0.75},
        {"raised"},
    ),
}

# Seeds other than 0, where 0 puts a ReLU within rounding of its kink and one gradient jumps.
SEEDS = {"two epochs, each in its own order": 1}


@pytest.fixture(autouse=True)
def full_precision():
    """A GPU multiplies float32 matrices with fewer bits unless told otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


def assert_models_close(ours, theirs: nets.Params):
    for layer, parameters in theirs.items():
        for name, expected in parameters.items():
            np.testing.assert_allclose(
                ours[layer][name], expected, **fed.CLOSE, err_msg=f"{layer}/{name}"
            )


def closest_call(draws: ref.Draws, base, report: ref.Report, data: ref.Data, options) -> float:
    """The smallest gap between the two largest logits that any accuracy of the loop rests on."""
    gaps = [np.inf]
    for j, (strength, _, _) in enumerate(report.schedule):
        unit = draws.noise(0 if options.redraw == "rescale" else j)
        xi = ref.scaled_noise(base, unit, strength, options)
        for copy in (nets.combine(np.add, base, xi), nets.combine(np.subtract, base, xi)):
            logits = np.sort(nets.forward(options.net, copy, data.accuracy_images)[0], axis=1)
            gaps.append((logits[:, -1] - logits[:, -2]).min())
    return float(min(gaps))


def compare(info, report: ref.Report, draws: ref.Draws, data: ref.Data, config: Config):
    """Every field of RoundInfo with what the reference reports."""
    calibration = info.calibration
    assert bool(info.protected) == (not report.warming)
    assert int(calibration.tries) == report.tries
    assert int(calibration.evaluations) == report.evaluations
    assert int(calibration.samples) == report.samples
    assert bool(calibration.feasible) == report.feasible
    assert bool(info.shipped) == report.shipped
    assert float(calibration.strength) == pytest.approx(report.strength, rel=1e-6)
    assert float(info.relative_strength) == pytest.approx(report.relative_strength, rel=1e-4)
    if report.warming:
        assert np.isnan([calibration.plus_accuracy, calibration.minus_accuracy]).all()
    else:
        assert float(calibration.plus_accuracy) == pytest.approx(report.plus_accuracy, abs=1e-6)
        assert float(calibration.minus_accuracy) == pytest.approx(report.minus_accuracy, abs=1e-6)
    assert bool(info.finite)

    # who took part, by the config alone
    size = round(config.client_fraction * config.num_clients)
    in_a, in_b = (size, size) if config.group_sizes == "full" else (-(-size // 2), size // 2)
    assert np.asarray(info.signs).tolist() == [1.0] * in_a + [-1.0] * in_b
    servers = size // 2 if config.server_clients is None else config.server_clients
    assert info.server_counts.shape == (servers,)
    seen = sum(len(batch) for batches in draws.batches for batch in batches)
    assert int(info.training_samples) == (seen if report.shipped else 0)


def compare_local_accuracy(info, report: ref.Report, data, config: Config):
    tested = slice(config.local_test_size or None)
    test = np.asarray(data.test_images)[tested], np.asarray(data.test_labels)[tested]
    expected = [nets.accuracy(fed.NET, model, *test) for model in report.local_models]
    if not report.shipped:
        expected = [np.nan] * config.cohort
    np.testing.assert_allclose(info.local_accuracy, expected, atol=1e-6)


def happened(state, before, info) -> set[str]:
    """What a round went through, in the words of CASES."""
    protected, shipped = bool(info.protected), bool(info.shipped)
    same = jax.tree.map(lambda x, y: bool((x == y).all()), state.owner, before.owner)
    words = {
        "protected": protected,
        "warming": not protected,
        "late": not protected and int(state.round) > 1,
        "raised": int(info.calibration.tries) > 1,
        "feasible": protected and bool(info.calibration.feasible),
        "infeasible": not info.calibration.feasible,
        "skipped": not shipped,
        "kept": shipped and protected and all(jax.tree.leaves(same)),
    }
    return {word for word, true in words.items() if true}


@pytest.mark.parametrize("name", CASES)
def test_three_rounds_agree_with_the_reference(name):
    """ALGORITHM.md, "One round", given the same draws: every number of every round."""
    changes, numbers, must_happen = CASES[name]
    config = fed.config(**changes)
    hyper, data, program = fed.hyper(config, **numbers), fed.federation(), fed.program(config)
    options, reference_data = fed.options(config, hyper), fed.reference_data(data, config)
    state = fed.start(program)
    theirs, words = fed.reference_start(state), set()
    for key in fed.round_keys(3, SEEDS.get(name, 0)):
        before, theirs_before = state, theirs
        state, info = program.step(key, state, data, hyper)
        draws = fed.draws(key, info, before.base, data, config)
        theirs, report = ref.reference_round(theirs, draws, reference_data, options)
        try:
            compare(info, report, draws, reference_data, config)
        except AssertionError as error:
            call = closest_call(draws, theirs_before.base, report, reference_data, options)
            error.add_note(f"Two largest logits as close as {call}: rounding, if under 1e-5.")
            raise
        compare_local_accuracy(info, report, data, config)
        assert_models_close(state.base, theirs.base)
        assert_models_close(state.owner, theirs.owner)
        assert int(state.round) == theirs.round
        if config.keep_best or config.warmup == "until_cap":
            assert float(state.owner_accuracy) == pytest.approx(theirs.owner_accuracy, abs=1e-6)
            assert bool(state.warmed) == (not theirs.warm)
        words |= happened(state, before, info)
    assert must_happen <= words, f"the three rounds only saw {sorted(words)}"


def test_an_optimizer_of_ones_own():
    """ClientUpdate with a rate of η / t, given as an optax transformation to `make_round`."""
    config = fed.config()
    program = fed.program(config, optimizer=lambda h, t: optax.sgd(h.learning_rate / t))
    hyper, data = fed.hyper(config, learning_rate=0.5), fed.federation()
    state = fed.start(program)
    theirs = fed.reference_start(state)
    for t, key in enumerate(fed.round_keys(3), start=1):
        before = state
        state, info = program.step(key, state, data, hyper)
        draws = fed.draws(key, info, before.base, data, config)
        options = fed.options(config, fed.hyper(config, learning_rate=0.5 / t))
        theirs, _ = ref.reference_round(theirs, draws, fed.reference_data(data, config), options)
        assert_models_close(state.base, theirs.base)
        assert_models_close(state.owner, theirs.owner)


@pytest.mark.parametrize("order", ["once", "every_epoch"])
@pytest.mark.parametrize("client", range(len(fed.COUNTS)))
def test_the_replayed_batches_are_the_clients_own_samples(client, order):
    """Each epoch is every sample once, in batches of B and a rest; so the replay hides nothing."""
    config = fed.config(local_epochs=3, batch_order=order)
    count = fed.COUNTS[client]
    batches = fed.local_batches(fed.round_keys(1)[0], client, fed.federation(), config)
    sizes = [4] * (count // 4) + [count % 4] * (count % 4 > 0)
    assert [len(batch) for batch in batches] == sizes * 3
    epochs = np.concatenate(batches).reshape(3, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    if order == "once":
        assert (epochs == epochs[0]).all()
    elif count > 5:
        assert len({tuple(epoch) for epoch in epochs}) == 3
