"""The folder of a driver and the files in it: what it writes, refuses, and finds again."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from experiments.sweep.store import Store, check, is_complete
from noisefl import mesh, record
from noisefl.record import Checkpoints

HERE = {"versions": {"jax": "1"}, "git_revision": None}
ENTRIES = {"fedavg": {"run": "fedavg"}, "noise": {"run": "noise"}}
SINGLE = {"runs": ENTRIES, "options": {"rounds": 4, "cap": 0.6, "rounds_per_chunk": 1}, **HERE}
A, B = "runs/a/seed=0", "runs/b/seed=0"
SWEEP = {"grid": {"cap": [0.3]}, "runs": {A: {}}, "options": {"rounds": 4, "tau": 1}, **HERE}


def saying(options: dict | None = None, **changes: Any) -> dict:
    """`SINGLE` or `SWEEP` with other contents."""
    description = SWEEP if "grid" in changes or "of" in changes else SINGLE
    changes.pop("of", None)
    return {**description, "options": {**description["options"], **(options or {})}, **changes}


def read(file: Path) -> Any:
    return json.loads(file.read_text())


# Files


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    file = tmp_path / "file.json"
    record.replace(file, record.as_json({"a": 1}))

    def no_room(_):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(record.os, "fsync", no_room)
        with pytest.raises(OSError, match="no room"):
            record.replace(file, record.as_json({"a": 2}))
    assert read(file) == {"a": 1}
    record.replace(file, record.as_json({"a": 3}))
    assert read(file) == {"a": 3}
    assert [one.name for one in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            ValueError(
                'RESOURCE_EXHAUSTED: Error writing "x/0.0": Failed to write 4 bytes to file 2: '
                "No space left on device [os_error_code='28']"
            ),
            "No space left on device",
        ),
        (ValueError("of another kind\nand more"), "of another kind"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_state_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, caplog, error, why):
    """Of what orbax logs and raises, the reason."""
    with Checkpoints(tmp_path / "x") as checkpoints:

        def full(*_: Any, **__: Any) -> None:
            logging.getLogger("absl").error("a page of it")
            raise error

        monkeypatch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(
            ValueError, match=f"^out='.*x': .* round 2 cannot be written [(]{why}[)]$"
        ):
            checkpoints.save(2, states(2), columns(2))
    assert not caplog.records


def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record.os, "fsync", full)
    with pytest.raises(
        OSError, match=r"^/.*file.json: cannot be written \(No space left on device\)$"
    ):
        record.replace(tmp_path / "file.json", "{}")


def test_what_is_not_finite_becomes_null():
    row = record.plain({"a": float("nan"), "b": float("-inf"), "c": 0.5, "d": True, "e": "x"})
    assert record.as_lines([row, {"a": 1}]) == (
        '{"a": null, "b": null, "c": 0.5, "d": true, "e": "x"}\n{"a": 1}\n'
    )
    with pytest.raises(ValueError, match="JSON compliant"):
        record.as_lines([{"a": float("nan")}])


def test_changes_are_noted_once():
    begun: dict[str, Any] = {"versions": {"jax": "1"}, "device": "cpu"}
    now = {"versions": {"jax": "2"}, "device": "cpu"}
    for _ in range(2):
        (warning,) = record.note_changes(begun, now, "the run")
        assert "versions is {'jax': '2'}, and was {'jax': '1'} when the run began" in warning
    assert begun["versions"] == {"jax": "1"}
    assert begun["resumed"] == [{"versions": {"jax": "2"}}]
    assert record.note_changes(begun, {"versions": {"jax": "1"}, "device": "cpu"}, "it") == []


# Checkpoints


@struct.dataclass
class State:
    round: jax.Array
    owner: dict
    held: tuple


def states(t: int, lanes: int = 3) -> State:
    kernel = jax.random.normal(jax.random.key(t), (lanes, 2, 2))
    tree = State(jnp.full(lanes, t), {"conv1": {"kernel": kernel}}, ())
    return mesh.put(tree, mesh.over_lanes(mesh.make(devices=jax.devices()[:1])))


def columns(t: int) -> dict[str, jax.Array]:
    return {"round": jnp.ones((3, t), jnp.int32), "finite": jnp.ones((3, t), bool)}


def test_states_and_rows_are_restored_bitwise(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.round == 0
        for t in (2, 4, 6):
            checkpoints.save(t, states(t), columns(t))
    (tmp_path / "batch.json").write_text("{}")  # lies beside them
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.round == 6
        found, rows = checkpoints.restore(states(0))
    for got, want in ((found, states(6)), (rows, columns(6))):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert isinstance(one, jax.Array)
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    assert {file.name for file in tmp_path.iterdir()} == {"4", "6", "batch.json"}


@pytest.mark.parametrize("what", ["flipped", "gone"])
def test_what_is_damaged_in_the_midst_of_numbers_is_refused(tmp_path, what):
    """What is as large as a layer lies in a file of its own, of which orbax has no checksum."""
    large = jax.random.normal(jax.random.key(0), (3, 40, 50))

    def state(t: int) -> State:
        put = mesh.put(large + t, mesh.over_lanes(mesh.make(devices=jax.devices()[:1])))
        return states(t).replace(owner={"kernel": put})  # pyright: ignore[reportAttributeAccessIssue]

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state(2), columns(2))
    file = max(filter(Path.is_file, tmp_path.glob("2/**/*")), key=lambda file: file.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw) if what == "flipped" else file.unlink()
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="is damaged") as said,
    ):
        checkpoints.restore(state(0))
    assert len(str(said.value).splitlines()) == 1


@pytest.mark.parametrize("what", ["other code", "empty", "half"])
def test_what_cannot_be_restored_is_refused_in_a_line(tmp_path, what):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, states(2), columns(2))
    like: Any = states(0)
    files = [file for file in tmp_path.glob("2/**/*") if file.is_file()]
    if what == "other code":
        like = like.replace(owner={"conv2": like.owner["conv1"]})
    for file in files if what == "empty" else files[: len(files) // 2] if what == "half" else []:
        file.write_bytes(b"")
    refusal = f"^out='{tmp_path}': its state of round 2 is damaged or of other code"
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=refusal) as caught:
        checkpoints.restore(like)
    assert len(str(caught.value).splitlines()) == 1


# Whose folder it is


def test_a_folder_in_use_is_refused_until_it_is_released(tmp_path):
    pytest.importorskip("fcntl")
    with Store(tmp_path / "new", True):
        with pytest.raises(ValueError, match=r"^out='.*new': another process is writing there$"):
            Store(tmp_path / "new", False)
        Store(tmp_path / "new", True, held=False)
    with Store(tmp_path / "new", True):
        pass
    assert list((tmp_path / "new").iterdir()) == []  # and is nobody's until it is claimed


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^out='.*': is not writable \(Not a directory\)$"):
        Store(tmp_path / "file" / "run", True)


@pytest.mark.parametrize(
    ("single", "name", "text", "message"),
    [
        (True, "metrics.jsonl", "", "holds other files of ours, but no config.json"),
        (True, "sweep.json", "{}", "holds a sweep; give another --out"),
        (True, "config.json", "half", "its config.json is not one of ours"),
        (True, "config.json", "[]", "its config.json is not one of ours"),
        (True, "config.json", '{"options": {}, "runs": {"a": NaN}}', "is not one of ours"),
        (True, "config.json", '{"options": {}}', "its config.json is not one of ours"),
        (False, "metrics.jsonl", "", "holds other files of ours, but no sweep.json"),
        (False, "config.json", "{}", "holds a single run; give another --out"),
        (False, "sweep.json", "{}", "its sweep.json is not one of ours"),
        (False, "sweep.json", '{"options": {}, "runs": ["one"]}', "is not one of ours"),
    ],
)
def test_the_folder_of_something_else_is_refused(tmp_path, single, name, text, message):
    (tmp_path / name).write_text(text)
    description = SINGLE if single else SWEEP
    with Store(tmp_path, single) as store:
        for refused in (lambda: store.claim(description), lambda: check(tmp_path, single, SINGLE)):
            with pytest.raises(ValueError, match=f"^out='{tmp_path}': .*{message}"):
                refused()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, text)]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (saying({"cap": 0.5}), "^cap=0.5: the run in .* has 0.6, and may not change it"),
        (saying({"more": 1, "cap": 0.5}), "^cap=0.5: "),  # the first by name
        (saying({"more": 1}), "^more=1: .* has None"),
        (saying({"rounds": 3}), "^rounds=3: .* has 4; it may only grow"),
        (saying(runs={"noise": {}}), "^baseline=False: .* has fedavg and noise"),
        (saying(of=1, runs={B: {}}), "^out='.*': holds a sweep with 1 runs that this one has not"),
        (saying({"tau": 2}, runs={B: {}}, of=1), "^tau=2: the sweep in .* has 1, and may not"),
        (saying({"tau": 2}, runs={B: {}}, grid={"tau": [2]}), "^out='.*': holds a sweep with 1"),
    ],
)
def test_other_options_are_refused_and_named(tmp_path, description, message):
    single = "grid" not in description
    with Store(tmp_path, single) as store:
        store.claim(SINGLE if single else SWEEP)
        store.batch("1").mkdir(parents=True)
        store.begin("1", batch(A), False)
        before = {file: file.read_text() for file in tmp_path.rglob("*.json")}
        with pytest.raises(ValueError, match=message):
            store.claim(description)
    assert {file: file.read_text() for file in tmp_path.rglob("*.json")} == before
    assert len(before) == 2


@pytest.mark.parametrize("single", [True, False])
def test_what_ended_before_its_first_round_claims_nothing(tmp_path, single):
    """A typo found while it compiles is mended in place; so is a sweep by a smaller one."""
    first, other = (SINGLE, saying({"cap": 0.5})) if single else (SWEEP, saying(of=1, runs={B: {}}))
    with Store(tmp_path, single) as store:
        store.claim(first)
        store.claim(other)
    (file,) = tmp_path.glob("*.json")
    assert read(file) == json.loads(json.dumps(other))


def test_a_sweep_may_grow_and_be_given_an_option_as_an_axis(tmp_path):
    grown = saying(runs={A: {}, B: {}}, grid={"cap": [0.3], "tau": [1, 2]})
    del grown["options"]["tau"]
    with Store(tmp_path, False) as store:
        for description in (SWEEP, grown):
            store.claim(description)
            assert read(tmp_path / "sweep.json") == description


def test_more_rounds_of_a_single_run_are_another_result(tmp_path):
    with Store(tmp_path, True) as store:
        store.claim(SINGLE)
        store.finish("noise", SINGLE, [{"round": 1}], {}, {"rounds": 4})
        assert is_complete(tmp_path, 4)
        assert not is_complete(tmp_path, 5)
        later = saying({"rounds": 5, "rounds_per_chunk": 7}, versions={"jax": "2"})
        store.claim(later)
    assert not is_complete(tmp_path, 4)
    config = read(tmp_path / "config.json")
    assert config == saying({"rounds": 5})  # what it began under stays


# Runs


@pytest.mark.parametrize("lost", [None, "config.json", "metrics.jsonl", "summary.json", "half"])
def test_a_run_is_complete_when_its_summary_is_there(tmp_path, lost):
    drawn = []
    with Store(tmp_path, False) as store:
        folder = store.folder(A)
        assert folder == tmp_path / A
        store.finish(A, {"run": "noise"}, [{"round": 1}], {"seconds": 1}, {"rounds": 4})
        store.finish(A, {"run": "noise"}, [], {}, {"rounds": 4}, drawn.append)
    assert drawn == [folder / "figure1.png"]
    names = {"config.json", "metrics.jsonl", "timing.json", "summary.json"}
    assert {file.name for file in folder.iterdir()} == names
    if lost == "half":
        (folder / "summary.json").write_text('{"rounds"')
    elif lost:
        (folder / lost).unlink()
    assert is_complete(folder, 4) == (lost is None)


def test_a_run_cut_short_is_not_complete(tmp_path, monkeypatch):
    """Not even where there was one before, of which a file was lost."""
    write, names = record.replace, ["config.json", "metrics.jsonl", "timing.json", "summary.json"]
    for stop in names:
        with Store(tmp_path / stop, False) as store, monkeypatch.context() as patch:
            store.finish(A, {}, [], {}, {"rounds": 4})

            def replace(file, text, stop=stop):
                if file.name == stop:
                    raise KeyboardInterrupt
                write(file, text)

            patch.setattr("experiments.sweep.store.replace", replace)
            with pytest.raises(KeyboardInterrupt):
                store.finish(A, {}, [], {}, {"rounds": 4})
            assert not is_complete(store.folder(A), 4)


# Batches


def batch(*runs: str, **provenance: Any) -> dict:
    return {"runs": list(runs), "lanes": 2, "rounds_per_chunk": 1, "provenance": provenance}


@pytest.mark.parametrize("single", [True, False])
def test_a_batch_remembers_what_it_was_begun_under(tmp_path, single):
    with Store(tmp_path, single) as store:
        folder = store.batch("x")
        assert folder == tmp_path / ("checkpoints" if single else "batches") / "x"
        folder.mkdir(parents=True)
        assert store.open_batches() == []
        assert store.begin("x", batch(A, jax="1"), False) == ({"jax": "1"}, [])
        # Without a checkpoint nothing of it is left, and it begins under what is here now.
        assert store.begin("x", batch(A, jax="2"), False) == ({"jax": "2"}, [])
        begun, (warning,) = store.begin("x", batch(A, B, jax="3"), True)
        assert begun == {"jax": "2", "resumed": [{"jax": "3"}]}
        assert "jax is '3', and was '2' when batch x began" in warning
        assert store.open_batches() == [{**batch(A), "provenance": begun, "name": "x"}]
        assert store.begin("x", batch(A, jax="2"), True) == (begun, [])
        store.drop("x")
        assert store.open_batches() == []
        assert not folder.exists()


def test_what_a_kill_leaves_is_tidied_up(tmp_path):
    with Store(tmp_path, False) as store:
        for name, runs in (("done", [A]), ("half", [A, B]), ("begun", [B])):
            store.batch(name).mkdir(parents=True)
            store.begin(name, batch(*runs), False)
        (store.batch("begun") / "batch.json").unlink()
        store.tidy({A})
        assert [one["name"] for one in store.open_batches()] == ["half"]
        assert [folder.name for folder in tmp_path.glob("batches/*")] == ["half"]
    with Store(tmp_path / "single", True) as store:  # whose batch stays, so that it may grow
        store.batch("x").mkdir(parents=True)
        store.begin("x", batch("noise"), False)
        store.tidy({"noise"})
        assert len(store.open_batches()) == 1


def test_a_batch_that_is_not_ours_is_refused(tmp_path):
    with Store(tmp_path, False) as store:
        wrong = {"runs": [3], "lanes": None, "rounds_per_chunk": 0, "provenance": []}
        texts = [json.dumps({**batch(A), name: value}) for name, value in wrong.items()]
        for text in ("half", "[]", "{}", "[" * 100_000, *texts):
            store.batch("x").mkdir(parents=True, exist_ok=True)
            (store.batch("x") / "batch.json").write_text(text)
            with pytest.raises(ValueError, match=r"its batch\.json is not one of ours"):
                store.open_batches()
            with pytest.raises(ValueError, match=r"its batch\.json is not one of ours"):
                store.claim(SWEEP)
            assert not (tmp_path / "sweep.json").exists()
