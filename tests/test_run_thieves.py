"""Thieves at the end of runs by the driver: what they leave, and that no kill changes it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import small_runs
from small_runs import contents, main, one_line

THIEVES = ("--thieves=thieves", "--attacks=bare_copy+scratch+average", "--controls=fedavg")
FILES = ("config.json", "metrics.jsonl", "summary.json", "thieves.jsonl")


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list:
    return small_runs.remember_programs(monkeypatch)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    return [*small_runs.flags(tmp_path_factory), *THIEVES]


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    with pytest.MonkeyPatch.context() as patch:
        small_runs.remember_programs(patch)
        assert main(*tiny, f"--out={folder}") == 0
    return folder


def test_every_key_is_on_the_page_of_outputs(single):
    described = set(re.findall(r"`(\w+)`", (small_runs.ROOT / "docs" / "outputs.md").read_text()))
    lines = [(single / f"{name}.jsonl").read_text().splitlines() for name in ("metrics", "thieves")]
    whole = [(single / f"{name}.json").read_text() for name in ("config", "summary", "timing")]
    for text in [line for some in lines for line in some] + whole:
        assert set(json.loads(text)) - described == set()


def stolen(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "thieves.jsonl").read_text().splitlines()]


def test_rows_of_both_runs_controls_beside_fedavg_and_thieves_beside_the_scheme(single):
    found = {(r["run"], r["thief"], r["view"], r["members"]): r for r in stolen(single)}
    one, two = ("V1", 1), ("V3", 2)
    both = {("owner", "V0", 0), ("bare_copy", *one)}
    controls = {("scratch", *one), ("scratch", *two), ("server_alone", "V0", 0)}
    assert {key[1:] for key in found if key[0] == "fedavg"} == both | controls
    assert {key[1:] for key in found if key[0] == "noise"} == both | {("average", *two)}
    for row in found.values():
        assert 0 <= row["accuracy"] <= row["accuracy_best"] <= 1
        assert 0 <= row["fidelity"] <= 1
        assert row["round"] == (0 if row["view"] == "V0" else 4)
    rows = small_runs.rows(single)
    last = {row["run"]: row for row in rows if row["round"] == 4}
    for run, row in last.items():
        assert found[run, "owner", "V0", 0]["accuracy"] == row["owner_accuracy"]
    shown = last["noise"]["plus_accuracy"], last["noise"]["minus_accuracy"]
    assert found["noise", "bare_copy", "V1", 1]["accuracy"] in shown


def test_the_summary_and_the_table_name_the_best(single, tiny, capsys):
    summary = json.loads((single / "summary.json").read_text())["thieves"]
    rows = {(r["run"], r["thief"], r["members"]): r["accuracy"] for r in stolen(single)}
    copy = rows["noise", "bare_copy", 1]
    assert summary["one_copy"]["thief"] == "bare_copy"
    assert summary["one_copy"]["accuracy"] == pytest.approx(copy, abs=1e-6)
    [two] = summary["coalitions"]
    assert two["members"] == 2
    assert two["accuracy"] == pytest.approx(max(copy, rows["noise", "average", 2]), abs=1e-6)
    assert summary["scratch"]["1"] == pytest.approx(rows["fedavg", "scratch", 1], abs=1e-6)
    assert summary["server_alone"] == rows["fedavg", "server_alone", 0]
    assert main(*tiny, f"--out={single}") == 0
    said = capsys.readouterr().out
    for words in ("best thief with one copy", "2 colluding", "without a copy", "server alone"):
        assert words in said


def test_more_rounds_equal_a_longer_run(tiny, single, tmp_path):
    """Views of one round alone are of the newest, whichever it is."""
    out = tmp_path / "run"
    assert main(*tiny, f"--out={out}", "--rounds=2") == 0
    assert {row["round"] for row in stolen(out)} == {0, 2}
    assert main(*tiny, f"--out={out}") == 0
    assert contents(out, *FILES) == contents(single, *FILES)


def test_what_was_killed_before_they_were_done_is_done_again(tiny, single, tmp_path, calls):
    out = Path(shutil.copytree(single, tmp_path / "copy"))
    for name in ("thieves.jsonl", "summary.json"):
        (out / name).unlink()
    assert main(*tiny, f"--out={out}") == 0
    assert not calls  # no round was
    assert contents(out, *FILES) == contents(single, *FILES)


def test_views_of_many_rounds_know_the_last(tiny, tmp_path, capsys):
    out = tmp_path / "many"
    many = [*tiny, "--kept_copies=3", "--attacks=bare_copy+average", "--controls=never"]
    many.append(f"--out={out}")
    assert main(*many) == 0
    copies = [r["copies"] for r in stolen(out) if r["view"] == "V2" and r["run"] == "noise"]
    assert copies
    assert all(1 <= number <= 3 for number in copies)
    assert json.loads((out / "config.json").read_text())["options"]["until"] == 4
    capsys.readouterr()
    assert main(*many, "--rounds=6") == 2
    assert "until" in one_line(capsys)


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("--attacks=bare", "attacks='bare': must be one of few, all, "),
        ("--coalitions=1", "coalitions='1': must be whole numbers of at least 2"),
        (
            "--coalitions=2+5000",
            "coalitions='2+5000': must be whole numbers of at least 2 and at most",
        ),
        ("--singles=5000", "singles=5000: must be a whole number, at least 1 and at most 1000"),
        ("--singles=0", "singles=0: must be a whole number, at least 1"),
        ("--coalition=2", "signs='opposite': two clients average it away"),
    ],
)
def test_bad_input_is_one_line(tiny, tmp_path, capsys, flag, wanted):
    assert main(*tiny, flag, f"--out={tmp_path / 'out'}") == 2
    assert wanted in one_line(capsys)
    assert not (tmp_path / "out").exists()
