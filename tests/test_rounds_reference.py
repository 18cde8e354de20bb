"""The library's round against `reference.py`, which is ALGORITHM.md in plain NumPy loops."""

from typing import Any

import federation as fed
import jax
import numpy as np
import pytest
import reference as ref
import reference_nets as nets

import noisefl
from noisefl import average, calibrate, keys, noise, owner, schemes
from noisefl.experiment import Experiment
from noisefl.parts import Part, implementations, specs, walk
from noisefl.schemes import NEVER

GEOMETRIC = calibrate.Geometric(strength=0.5, strength_factor=1.5, strength_max=8.0)
RESCALED = GEOMETRIC.replace(redraw="rescale")
FIXED = calibrate.Fixed(strength=4.0)
KEEP_BEST = owner.KeepBest(owner.ServerClients())
UNTIL_CAP = schemes.UntilCap(fed.TINY.scheme)
SKIPPING = schemes.SkipInfeasible(fed.TINY.scheme)
ALONE = schemes.UntilCap(schemes.Noised(on=noise.layers("last", relative=True)))

# name: (fields, what must have happened in the three rounds for the case to mean anything). Cases
# that differ in numbers share a compiled round; readings that do not touch each other share a case.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "additive": (dict(), "warming raised feasible"),
    "fedavg": (dict(warmup_rounds=NEVER), "warming"),
    "no warm-up": (dict(warmup_rounds=0), "raised"),
    "warm-up of two": (dict(warmup_rounds=2), "warming raised"),
    "cap with margin": (dict(cap_margin=0.15), "raised feasible"),
    "strength that suffices": (dict(strength=4.0, cap=0.7), "feasible"),
    "fresh draws at strength_max": (
        dict(strength_max=0.75, max_tries=5, cap=0.2),
        "infeasible",
    ),
    "infeasible ships after max_tries": (dict(max_tries=2, cap=0.2), "infeasible"),
    "learning-rate decay": (dict(learning_rate_decay=0.5), "raised"),
    "half a step of the server": (dict(server_learning_rate=0.5), "warming raised"),
    "geometric": (dict(calibrator=GEOMETRIC), "raised feasible"),
    "geometric, base that holds": (dict(calibrator=GEOMETRIC, cap=0.96), "bare feasible"),
    "geometric, infeasible": (
        dict(calibrator=GEOMETRIC, max_tries=3, cap=0.2),
        "infeasible raised",
    ),
    "geometric, rescaled uniform noise": (
        dict(calibrator=RESCALED, noise_distribution=noise.Uniform()),
        "raised feasible",
    ),
    "rescale": (dict(redraw="rescale"), "raised feasible"),
    "rescale to strength_max": (
        dict(redraw="rescale", strength_max=0.75, cap=0.2),
        "infeasible",
    ),
    "fixed, judged on test, no server-side clients": (
        dict(calibrator=FIXED, accuracy_on="test", server_clients="0"),
        "feasible",
    ),
    "fixed too weak": (
        dict(calibrator=FIXED, strength=0.125, accuracy_on="test", server_clients="0"),
        "infeasible",
    ),
    "relative laplace noise on all layers": (
        dict(
            calibrator=FIXED, strength=2.0, noise_scale="relative", noise_layers="all",
            noise_distribution=noise.Laplace(),
        ),
        "protected feasible",
    ),
    "last layer, kernel only": (
        dict(model=fed.TinyCNN(), calibrator=FIXED, noise_layers="last", noise_parameters="kernel"),
        "protected",
    ),
    "named parameters, two epochs, each in its own order": (dict(fed.RICH), "protected"),
    "momentum": (dict(fed.RICH, momentum=0.5), "protected"),
    "clipping": (dict(fed.RICH, clip_norm=0.25), "protected"),
    "two of five clients at once, more server-side clients than K": (
        dict(calibrator=FIXED, clients_per_round=5, clients_at_once=2, server_clients="11"),
        "protected",
    ),
    "all five clients at once, next base is the owner": (
        dict(
            calibrator=FIXED, clients_per_round=5, clients_at_once=0, gather="step",
            participation="always", owner=owner.FeedsBack(owner.ServerClients()),
        ),
        "warming protected",
    ),
    "full groups, subtract": (
        dict(calibrator=FIXED, clients_per_round=2, groups="full", cancellation="subtract"),
        "warming protected",
    ),
    "odd m, reweight, uniform server weights, evaluation in uneven batches": (
        dict(
            calibrator=FIXED, clients_per_round=5, cancellation="reweight", eval_batch=10,
            server_weights="uniform",
        ),
        "warming protected",
    ),
    "keep-best": (dict(calibrator=FIXED, owner=KEEP_BEST), "kept"),
    "until cap": (dict(scheme=UNTIL_CAP, cap=0.98, learning_rate=0.5), "late protected"),
    "until cap, then for good": (dict(scheme=UNTIL_CAP, cap=0.96, learning_rate=0.5), "sunk"),
    "until cap, but not before tau": (
        dict(scheme=UNTIL_CAP, warmup_rounds=2),
        "late protected",
    ),
    "infeasible is skipped": (dict(scheme=SKIPPING, max_tries=2), "skipped"),
    "bare": (dict(scheme=schemes.Bare()), "warming"),
    "much at once": (
        dict(
            model=fed.TinyCNN(), scheme=ALONE, calibrator=fed.LOOP, cancellation="reweight",
            clients_per_round=3, groups="full", clients_at_once=4, server_clients="3",
            owner=owner.FeedsBack(KEEP_BEST), momentum=0.25, clip_norm=1.0, local_epochs=2,
            learning_rate_decay=0.75,
        ),
        "raised",
    ),
}  # fmt: skip

RIVALS = {
    *(schemes.Released, schemes.FewWeights, schemes.Quantised),
    *(schemes.SubModel, schemes.OwnClasses, schemes.Withheld, schemes.Statistics),
}

# Seeds other than 0, where 0 would not show it.
SEEDS = {"until cap": 6, "until cap, then for good": 1}


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
        j = 0 if options.redraw == "rescale" else max(j - options.bare_first, 0)
        xi = ref.scaled_noise(base, draws.noise(j), strength, options)
        for copy in (nets.combine(np.add, base, xi), nets.combine(np.subtract, base, xi)):
            logits = np.sort(nets.forward(options.net, copy, data.accuracy_images)[0], axis=1)
            gaps.append((logits[:, -1] - logits[:, -2]).min())
    return float(min(gaps))


def compare(info, report: ref.Report, draws: ref.Draws, experiment: Experiment):
    """Every field of RoundInfo with what the reference reports."""
    issue = info.issue
    assert bool(issue.protected) == (not report.warming)
    assert int(issue.bill.tries) == report.tries
    assert int(issue.bill.evaluations) == report.evaluations
    assert int(issue.bill.samples) == report.samples
    assert bool(issue.feasible) == report.feasible
    assert bool(issue.shipped) == report.shipped
    assert float(issue.strength) == pytest.approx(report.strength, rel=1e-6)
    assert float(issue.relative_strength) == pytest.approx(report.relative_strength, rel=1e-4)
    seen = [np.nan] * 2 if report.warming else [report.plus_accuracy, report.minus_accuracy]
    np.testing.assert_allclose(issue.accuracy, seen[: len(issue.accuracy)], atol=1e-6)
    assert bool(info.finite)

    # who took part, by the fields alone
    values = {place.name: place.value for place in walk(experiment)}
    m = values["clients_per_round"]
    in_a, in_b = (m, m) if values["groups"] == "full" else (-(-m // 2), m // 2)
    assert np.asarray(info.members.groups).tolist() == [0] * in_a + [1] * in_b
    servers = m // 2 if values["server_clients"] == "m/2" else int(values["server_clients"])
    assert info.told["server_counts"].shape == (servers,)
    trained = sum(len(batch) for batches in draws.batches for batch in batches)
    assert int(info.training_samples) == (trained if report.shipped else 0)


def compare_clients(info, report: ref.Report, draws: ref.Draws, experiment, before):
    """What every client received and returned, and the model that `received` says it got."""
    for slot, model in enumerate(report.local_models):
        copy, returned = fed.lane(info.observed, slot)
        sent = report.plus if draws.cohort[slot][1] > 0 else report.minus
        assert_models_close(copy, sent)
        assert_models_close(returned, model)
        if slot in (0, len(report.local_models) - 1):
            assert_models_close(noisefl.received(experiment, before, info, slot), sent)


def happened(state, before, info, accuracy: float, cap: float) -> set[str]:
    """What a round went through, in the words of CASES."""
    issue = info.issue
    protected, shipped = bool(issue.protected), bool(issue.shipped)
    same = jax.tree.map(lambda x, y: bool((x == y).all()), state.owner, before.owner)
    words = {
        "protected": protected,
        "warming": not protected,
        "late": not protected and int(state.round) > 1,
        "raised": int(issue.bill.tries) > 1,
        "sunk": protected and accuracy <= cap,  # of G before the round
        "bare": protected and float(issue.strength) == 0,
        "feasible": protected and bool(issue.feasible),
        "infeasible": not issue.feasible,
        "skipped": not shipped,
        "kept": shipped and protected and all(jax.tree.leaves(same)),
    }
    return {word for word, true in words.items() if true}


@pytest.mark.parametrize("name", CASES)
def test_three_rounds_agree_with_the_reference(name):
    """ALGORITHM.md, "One round", given the same draws: every number of every round."""
    fields, must_happen = CASES[name]
    experiment, data = fed.experiment(**fields), fed.federation()
    options, reference_data = fed.options(experiment), fed.reference_data(data, experiment)
    state, root = fed.start(experiment), keys.root(SEEDS.get(name, 0))
    own, base = nets.as_float64(state.owner), nets.as_float64(state.base)
    judged = reference_data.accuracy_images, reference_data.accuracy_labels
    theirs = ref.State(0, own, base, True, nets.accuracy(fed.NET, own, *judged))
    words = set()
    for t in (1, 2, 3):
        before, theirs_before = state, theirs
        state, info = fed.step(root, state, data, experiment)
        key = keys.of_round(root, t)
        fed.assert_same(experiment.cohort.draw(key, data.counts), info.members)
        draws = fed.draws(key, info, before.base, data, experiment)
        theirs, report = ref.reference_round(theirs, draws, reference_data, options)
        try:
            compare(info, report, draws, experiment)
        except AssertionError as error:
            call = closest_call(draws, theirs_before.base, report, reference_data, options)
            error.add_note(f"Two largest logits as close as {call}: rounding, if under 1e-5.")
            raise
        compare_clients(info, report, draws, experiment, before)
        assert_models_close(state.base, theirs.base)
        assert_models_close(state.owner, theirs.owner)
        assert int(state.round) == theirs.round == t
        if options.keep_best:
            assert float(state.held[0]) == pytest.approx(theirs.owner_accuracy, abs=1e-6)
        words |= happened(state, before, info, theirs_before.owner_accuracy, options.cap)
    assert set(must_happen.split()) <= words, f"the three rounds only saw {sorted(words)}"


def test_every_reading_stands_in_some_case():
    """Every choice of every part of a round, and every kind of part that the package has, but for
    the rival schemes and clients' own noise, whose references are `test_rivals`, `test_noised`."""
    places = [place for fields, _ in CASES.values() for place in walk(fed.experiment(**fields))]
    seen = {type(place.owner) for place in places} | {type(place.value) for place in places}
    chosen = {(type(place.owner), place.name, place.value) for place in places
              if place.spec.kind in ("choice", "switch")}  # fmt: skip
    kinds = schemes.Scheme, owner.Owner, noise.Distribution, calibrate.Loop, average.Average
    for kind in kinds:
        assert {cls for cls in implementations(kind) if fed.ours(cls)} - RIVALS <= seen
    for cls in seen - {noisefl.Strategy}:
        for name, spec in specs(cls).items() if issubclass(cls, Part) else ():
            if (cls, name) in ((schemes.Noised, "own"), (schemes.Noised, "signs")):
                continue
            if name in ("running_statistics", "pixels"):  # `test_running`, `test_models`
                continue
            missing = {choice for choice in spec.choices if (cls, name, choice) not in chosen}
            assert not missing, f"{cls.__name__}.{name}: {missing}"
