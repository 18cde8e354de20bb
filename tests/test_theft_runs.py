"""The measure of thieves through runs, and in lanes as in single runs."""

import functools
import json
from typing import Any, ClassVar

import federation as fed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from small_thieves import (
    DATA,
    FEW,
    KEY,
    OWNER,
    SCHEMES,
    UNTOLD,
    Moved,
    few_steps_of_the_server,  # noqa: F401  # a fixture
)

import noisefl
from noisefl import attacks, average, keys, measure, owner, schemes, simulate, sweep
from noisefl.measure import Thieves
from noisefl.parts import part, static

M = 4
pytestmark = pytest.mark.usefixtures("few_steps_of_the_server")

# Through a run.


def test_coalitions_larger_than_a_round_are_left_out_and_one_is_not_larger_than_it():
    made = Thieves(attacks="bare_copy+scratch+average", singles=9, coalitions=" 5+4+ 2", until=2,
                   kept_copies=2)  # fmt: skip
    assert (made.sizes, made.followers) == ((2, 4, 5), 9)
    state = jax.eval_shape(lambda: simulate.begin(KEY, fed.TINY, DATA, made))
    found = jax.eval_shape(lambda s: simulate.conclude(KEY, s, DATA, fed.TINY, made), state)
    of = {view: sorted({(r.members, r.which) for r in found if r.view == view}) for view in
          ("V1", "V2", "V3", "V4")}  # fmt: skip
    assert of == {
        "V1": [(1, n) for n in range(M)],
        "V2": [(1, n) for n in range(M)],
        "V3": [(2, 0), (4, 0)],
        "V4": [(2, 0), (4, 0)],
    }


@pytest.mark.parametrize("text", ["1", "2+x", "2+-3", "2.5", "²", "9999999999"])
def test_coalitions_are_whole_numbers(text):
    with pytest.raises(ValueError, match=r"^coalitions=.*must be whole numbers of at least 2"):
        Thieves(coalitions=text)


def titles(made: Thieves, model: Any) -> list[str]:
    return [attack.title for attack in made.able(noisefl.models.functions(model), fed.IMAGE)]


def test_an_attack_that_cannot_attack_the_model_is_left_out_unless_it_is_named():
    def without_bias(params, images):
        return fed.forward({**params, "head": {**params["head"], "bias": 0}}, images)

    pair, module = (fed.initial, without_bias), fed.TinyCNN()
    for attempts in ("few", "all"):
        without = titles(Thieves(attacks=attempts), pair)
        assert [*titles(Thieves(attacks=attempts), module)] == [
            one.title for one in Thieves(attacks=attempts).tried
        ]
        assert set(titles(Thieves(attacks=attempts), module)) - set(without) == {"ridge"}
    assert titles(Thieves(), module) == [*measure.FEW]
    named = (Thieves(attacks="ridge+bare_copy"),
             Thieves(attacks="bare_copy", more_attacks=(attacks.Ridge(),)),
             Thieves(attacks="few", more_attacks=(Renamed(),)))  # fmt: skip
    for made in named:
        with pytest.raises(ValueError, match=r"^model="):
            simulate.begin(KEY, fed.TINY.replace(model=pair), DATA, made)
        assert "ridge" in " ".join(titles(made, module))


@part
class Renamed(attacks.Ridge):
    """Ridge by another name."""

    abstract: ClassVar[bool] = True


def test_thieves_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match=r"^attacks=.*did you mean scratch\?"):
        Thieves(attacks="bare_copy+scratsch")
    with pytest.raises(ValueError, match=r"must have different titles"):
        Thieves(more_attacks=(attacks.FineTune(steps=3),))
    with pytest.raises(ValueError, match=r"^kept_copies=2: needs `until`"):
        simulate.begin(KEY, fed.TINY, DATA, Thieves(kept_copies=2))
    with pytest.raises(ValueError, match=r"at most one measure may follow clients"):
        measure.Standard(thieves=Thieves(), more=(Thieves(),))


# Lanes, and single runs.


@part
class Light(measure.Standard):
    """Without what looks at models in every round."""

    abstract: ClassVar[bool] = True

    @property
    def parts(self) -> tuple[measure.Measure, ...]:
        return (measure.Protocol(), *([self.thieves] if self.thieves else []))


@part
class OtherMean(average.Mean):
    """The same by another name."""

    abstract: ClassVar[bool] = True


SILENT = Light()
KEPT = Light(thieves=Thieves(attacks="bare_copy", more_attacks=FEW[1:2], until=3, kept_copies=2))
RUN = fed.experiment(scheme=SCHEMES["pair"]).replace(local=Moved())


@pytest.fixture(scope="module")
def single():
    """single(fedavg, measure) → the state after three rounds, its rows, and the last words."""
    chunks = functools.cache(simulate.chunk_of_rounds)

    @functools.cache
    def last(made: Any) -> Any:
        return jax.jit(lambda key, s, one: simulate.conclude(key, s, DATA, one, made))

    @functools.cache
    def of(fedavg: bool, made: Any) -> tuple[Any, list[Any], Any]:
        one, key = noisefl.fedavg(RUN) if fedavg else RUN, keys.root(2)
        runs = simulate.run(key, one, DATA, rounds=3, measure=made, rounds_per_chunk=3)
        [(state, rows)] = [(jax.tree.map(jnp.asarray, state), rows) for state, rows in runs]
        return state, rows, fed.plain(last(made)(key, state, one)) if made.concludes else {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "chunk_of_rounds", chunks)
        yield of


@part
class Saying(measure.Measure):
    """Speaks in the end."""

    abstract: ClassVar[bool] = True
    words: Any = static("", "that it says")

    @property
    def concludes(self) -> bool:
        return bool(self.words)

    def conclude(self, key, experiment, data, owner, carry):
        return {self.words: {"carry": carry, "key": key}}


@pytest.mark.parametrize("words", [("a", "b"), ("", "b"), ("a", ""), ("", "")])
def test_all_parts_of_a_measure_have_the_last_word(words):
    whole = measure.Standard(more=tuple(Saying(word) for word in words))
    assert whole.concludes == any(words)
    carries = tuple(range(len(whole.parts)))
    found = whole.conclude(KEY, UNTOLD, DATA, OWNER, carries)
    places = {one.words: n for n, one in enumerate(whole.parts) if isinstance(one, Saying)}
    assert {word: said["carry"] for word, said in found.items()} == places
    assert all(said["key"] is KEY for said in found.values())


def test_measuring_thieves_changes_nothing_of_the_run(single):
    (ours, rows, said), (alone, others, _) = (single(False, one) for one in (KEPT, SILENT))
    assert simulate.conclude(KEY, alone, DATA, RUN, SILENT) == {}
    assert repr(rows) == repr(others)
    fed.assert_same(*(fed.replaced(state, measured=()) for state in (ours, alone)))
    fed.assert_same(ours.measured[:-1], alone.measured)
    assert (bool(said), KEPT.concludes, SILENT.concludes) == (True, True, False)


def test_lanes_say_what_single_runs_say(single):
    """A protected run and its FedAvg side by side."""
    lanes, roots = [RUN, noisefl.fedavg(RUN)], jnp.stack([keys.root(2)] * 2)
    found = sweep.run(lanes, roots, [DATA] * 2, rounds=3, measure=KEPT, rounds_per_chunk=3)
    for lane, fedavg in enumerate((False, True)):
        state, _, said = single(fedavg, KEPT)
        seen, wanted = fed.lane(found.states.measured[-1], lane), state.measured[-1]
        fed.assert_same(seen, wanted, **fed.CLOSE)
        assert set(found.conclusions) == set(said)
        assert {row.view for row in said} == {"V0", "V1", "V3"}
        for row, columns in said.items():
            ours = {name: column[lane] for name, column in found.conclusions[row].items()}
            fed.assert_same(ours, columns)
            of_fedavg = row.thief in ("scratch", "server_alone")
            if row.thief not in ("owner", "bare_copy"):
                assert columns["tried"] == (of_fedavg == fedavg)


def test_one_program_has_the_last_word_of_all_parts_of_the_server_and_numbers_of_lanes():
    """It is told none of these."""
    programs: Any = sweep._last_words_of_one
    before = programs._cache_size()
    kept = Light(thieves=Thieves(attacks="bare_copy", until=1))
    ways = [{"scheme": one} for one in (*SCHEMES.values(), schemes.Withheld())]
    ways += [{"owner": owner.ServerClients("4m")}, {"owner": owner.FeedsBack()}]
    ways += [{"average": OtherMean()}]
    for parts in ways:
        some = [RUN.replace(**parts)] * (3 if parts.get("scheme") is SCHEMES["pair"] else 1)
        roots = jnp.stack([keys.root(seed) for seed, _ in enumerate(some)])
        said = sweep.run(some, roots, [DATA] * len(some), rounds=1, measure=kept).conclusions
        assert {columns["accuracy"].shape for columns in said.values()} == {(len(some),)}
    assert programs._cache_size() == before + 1


def test_lanes_go_device_by_device():
    """Six lanes on two devices: each had its first, then its second, then its third."""
    found: list[Any] = [{"row": {"lane": np.array([place, 3 + place])}} for place in range(3)]
    assert sweep.in_order(found)["row"]["lane"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_run_that_grows_has_the_thieves_of_its_last_round(tmp_path_factory, tmp_path, capsys):
    """More --rounds for a run that is done: as if they had been asked for at once, or refused."""
    tiny = [one for one in small_runs.flags(tmp_path_factory) if not one.startswith("--rounds")]
    args = [
        *tiny,
        "--thieves=thieves",
        "--attacks=bare_copy+average",
        "--kept_copies=3",
        "--checkpoint_every=1",
    ]
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    with pytest.MonkeyPatch.context() as patch:
        small_runs.remember_programs(patch)
        assert small_runs.main(*args, "--rounds=5", f"--out={whole}") == 0
        assert small_runs.main(*args, "--rounds=2", f"--out={grown}") == 0
        capsys.readouterr()
        code = small_runs.main(*args, "--rounds=5", f"--out={grown}")
    if code:
        assert code == 2
        assert "until=5: " in small_runs.one_line(capsys)
    else:
        found = (folder / "thieves.jsonl" for folder in (grown, whole))
        ours, wanted = ([json.loads(x) for x in file.read_text().splitlines()] for file in found)
        assert [row["round"] for row in ours] == [row["round"] for row in wanted]
        assert ours == wanted
