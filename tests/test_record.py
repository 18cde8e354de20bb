"""The run folder: what it writes, what it refuses, what it makes of a killed run's leavings."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from noisefl.record import RunFolder

OPTIONS = {"rounds": 4, "cap": 0.6, "out": "here"}
HERE = {"versions": {"jax": "1"}, "git_revision": None}


@struct.dataclass
class State:
    round: jax.Array
    owner: dict
    warmed: jax.Array
    carry: tuple


def state(rounds: int) -> State:
    kernel = jax.random.normal(jax.random.key(rounds), (3, 2))
    return State(jnp.int32(rounds), {"conv1": {"kernel": kernel}}, jnp.bool_(True), ())


def row(number: int, **values) -> dict:
    return {"round": number, "owner_accuracy": number / 8, **values}


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def keys_of(folder) -> list[tuple[str, int]]:
    return [(line["run"], line["round"]) for line in lines(folder)]


def write(folder, done: dict[str, int], saved: dict[str, int] | None = None, **options) -> None:
    """A folder whose runs have `done` rows, and checkpoints of the first `saved` of them."""
    with RunFolder(folder, OPTIONS | options) as record:
        record.claim(HERE)
        for run, rounds in done.items():
            for number in range(1, rounds + 1):
                record.append(run, [row(number)], 0.5)
                if number <= (saved or done).get(run, 0):
                    record.save(run, state(number), number)


def test_writes_config_rows_and_summary(tmp_path):
    with RunFolder(tmp_path / "new" / "run", OPTIONS) as record:
        record.claim(HERE)
        record.append("fedavg", [row(1, plus_accuracy=float("nan"), feasible=True)], 0.25)
        assert record.summary is None
        record.finish({"gap": float("inf"), "best": 0.5})
        assert record.summary == {"rounds": 4, "gap": None, "best": 0.5}
    folder = tmp_path / "new" / "run"
    assert json.loads((folder / "config.json").read_text()) == {"options": OPTIONS, **HERE}
    assert (folder / "metrics.jsonl").read_text() == (
        '{"run": "fedavg", "round": 1, "owner_accuracy": 0.125, "plus_accuracy": null, '
        '"feasible": true, "seconds": 0.25}\n'
    )
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "summary.json",
    }


def test_checkpoint_restores_bitwise(tmp_path):
    write(tmp_path, {"fedavg": 3})
    with RunFolder(tmp_path, OPTIONS, resume=True) as record:
        record.claim(HERE)
        restored = record.restore("fedavg", like=state(0))
        assert record.restore("noise", like=state(0)) is None
    wanted = state(3)
    assert jax.tree.structure(restored) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert isinstance(got, jax.Array)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_opening_changes_nothing_until_claimed(tmp_path):
    RunFolder(tmp_path / "run", OPTIONS).close()
    assert list((tmp_path / "run").iterdir()) == []
    RunFolder(tmp_path / "run", OPTIONS).close()  # an empty folder is nobody's


def test_refuses_the_folder_of_another_run(tmp_path):
    write(tmp_path, {"fedavg": 1})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"out='.*': holds a run; give --resume"):
        RunFolder(tmp_path, OPTIONS)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_refuses_rows_without_a_config(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="but no config"):
        RunFolder(tmp_path, OPTIONS)


def test_refuses_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not writable"):
        RunFolder(tmp_path / "file" / "run", OPTIONS)


def test_refuses_a_folder_in_use_until_it_is_released(tmp_path):
    pytest.importorskip("fcntl")
    with (
        RunFolder(tmp_path, OPTIONS),
        pytest.raises(ValueError, match="another process is writing"),
    ):
        RunFolder(tmp_path, OPTIONS)
    RunFolder(tmp_path, OPTIONS).close()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cap": 0.5}, "cap=0.5: .* has 0.6"),
        ({"rounds": 3}, "rounds=3: .* has 4; it may only grow"),
        ({"more": 1}, "more=1: .* has None"),
    ],
)
def test_resume_names_the_option_that_differs(tmp_path, changed, message):
    write(tmp_path, {"fedavg": 1})
    with pytest.raises(ValueError, match=message):
        RunFolder(tmp_path, OPTIONS | changed, resume=True)


def test_resume_may_change_what_no_result_depends_on(tmp_path):
    write(tmp_path, {"fedavg": 1})
    changed = OPTIONS | {"out": "there"}
    with pytest.raises(ValueError, match="out='there'"):
        RunFolder(tmp_path, changed, resume=True)
    RunFolder(tmp_path, changed, resume=True, may_change=["out"]).close()


def test_resume_without_a_run_begins_one(tmp_path):
    with RunFolder(tmp_path, OPTIONS, resume=True) as record:
        assert record.claim(HERE) == []
        assert record.restore("fedavg", like=state(0)) is None
    assert (tmp_path / "config.json").exists()


def test_resume_cuts_rows_without_a_checkpoint_and_half_a_line(tmp_path):
    write(tmp_path, {"fedavg": 4, "noise": 3}, saved={"fedavg": 4, "noise": 2})
    whole = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"run": "noise", "rou')
    with RunFolder(tmp_path, OPTIONS, resume=True) as record:
        record.claim(HERE)
        assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(whole[:6])
        assert len(record.rows) == 6
        record.append("noise", [row(3)], 0.5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(whole)


def test_resume_refuses_damage_that_no_kill_explains(tmp_path):
    write(tmp_path, {"fedavg": 3})
    whole = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    for damaged, message in (
        ([whole[0], "{,}\n", whole[2]], "is damaged"),
        ([whole[0], "[]\n", whole[2]], "is damaged"),
        ([whole[0], whole[2]], "lacks rounds of run 'fedavg'"),
        (whole[:2], "lacks rounds of run 'fedavg'"),
    ):
        (tmp_path / "metrics.jsonl").write_text("".join(damaged))
        with (
            RunFolder(tmp_path, OPTIONS, resume=True) as record,
            pytest.raises(ValueError, match=message),
        ):
            record.claim(HERE)


def test_more_rounds_end_up_in_order(tmp_path):
    write(tmp_path, {"fedavg": 2, "noise": 2}, rounds=2)
    with RunFolder(tmp_path, OPTIONS | {"rounds": 2}, resume=True) as record:
        record.claim(HERE)
        record.finish({})
        assert record.summary is not None
    with RunFolder(tmp_path, OPTIONS, resume=True) as record:
        assert record.summary is None  # of fewer rounds than are asked for now
        record.claim(HERE)
        assert not (tmp_path / "summary.json").exists()
        for run in ("fedavg", "noise"):
            record.append(run, [row(3), row(4)], 0.5)
    assert keys_of(tmp_path) == [(run, t) for run in ("fedavg", "noise") for t in (1, 2, 3, 4)]
    assert json.loads((tmp_path / "config.json").read_text())["options"]["rounds"] == 4


def test_resume_with_other_versions_warns_and_records_them(tmp_path):
    write(tmp_path, {"fedavg": 1})
    other = {**HERE, "versions": {"jax": "2"}}
    with RunFolder(tmp_path, OPTIONS, resume=True) as record:
        (warning,) = record.claim(other)
    assert "{'jax': '2'}" in warning
    assert "{'jax': '1'}" in warning
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["versions"] == {"jax": "1"}
    assert stored["resumed"] == [{"versions": {"jax": "2"}}]
