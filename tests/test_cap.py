"""The cap in real rounds: `feasible` says what an accuracy of our own says of the copies."""

import federation as fed
import jax
import numpy as np
import pytest
import reference_nets as nets

from noisefl import calibrate, keys, schemes
from noisefl.parts import changed

DATA = fed.federation()
CAP = 0.5
# Few tries, so that some rounds reach the cap and others do not.
SEARCH = {"cap": CAP, "strength": 1.0, "max_tries": 3}
ADDITIVE = calibrate.Additive(**SEARCH, strength_step=2.0)
FIRST, LAST = fed.experiment(calibrator=ADDITIVE), {"noise_layers": "last"}
CASES = {
    "additive": FIRST,
    "judged on test": fed.experiment(calibrator=ADDITIVE, accuracy_on="test"),
    "rescale": fed.experiment(calibrator=ADDITIVE.replace(redraw="rescale")),
    "geometric, last layer": fed.experiment(calibrator=calibrate.Geometric(**SEARCH), **LAST),
    "bisection": fed.experiment(calibrator=calibrate.Bisection(**SEARCH)),
    "fixed": fed.experiment(calibrator=calibrate.Fixed(cap=CAP, strength=2.5)),
    "skip": changed(
        FIRST.replace(scheme=schemes.SkipInfeasible(FIRST.scheme)), calibrate.Additive, max_tries=4
    ),
    "a margin": changed(FIRST, calibrate.Additive, cap_margin=0.1),
}


@pytest.mark.parametrize("case", CASES)
def test_feasible_is_the_cap_on_the_judging_split(case):
    """Of both copies, as the clients received them."""
    experiment = CASES[case]
    aim = CAP - 0.1 if case == "a margin" else CAP
    split = experiment.accuracy_on
    judged = [np.asarray(getattr(DATA, f"{split}_{what}")) for what in ("images", "labels")]
    seen = []
    for seed in range(4):
        state = fed.start(experiment)
        for _ in range(4):
            before = state
            state, info = fed.step(keys.root(seed), before, DATA, experiment)
            issue, (copies, _) = info.issue, info.observed
            if not issue.protected:
                assert issue.feasible
                continue
            models = [fed.lane(copies, slot) for slot in (0, -1)]
            of = [nets.accuracy(fed.NET, nets.as_float64(model), *judged) for model in models]
            assert issue.feasible == (max(of) <= aim)
            assert issue.shipped == (issue.feasible or case != "skip")
            unchanged = jax.tree.map(np.array_equal, before.base, state.base)
            assert jax.tree.all(unchanged) == (not issue.shipped)
            seen.append(bool(issue.feasible))
    assert set(seen) == {True, False}
