"""What the report of a sweep reads, what it refuses, and how it replaces files."""

from pathlib import Path

import pytest
from sweep_folder import FakeSweep, small_sweep

from experiments import report, sweep_results, sweep_statistics


def test_the_table_reads_no_rounds(tmp_path):
    folder = small_sweep(tmp_path)
    for file in folder.rglob("metrics.jsonl"):
        file.write_text("")
    _, rows = sweep_statistics.table(sweep_results.read(folder))
    assert rows[0]["owner_accuracy_mean"] == pytest.approx(0.93)


def test_a_sweep_that_has_only_begun(tmp_path, capsys):
    sweep = FakeSweep(tmp_path, {"cap": [0.4, 0.5]})
    base = sweep.plan("f", 0, {}, None)
    for cap in (0.4, 0.5):
        sweep.plan(f"n{cap}", 0, {"cap": cap}, base)
    assert report.main(["report", str(tmp_path)]) == 0
    assert [one.unfinished for one in sweep_results.read(tmp_path).configurations] == [1, 1]
    sweep.write("sweep.json", {"grid": {"cap": [0.4]}, "runs": {}})
    assert report.main(["report", str(tmp_path)]) == 0
    assert len((tmp_path / "report.csv").read_text().splitlines()) == 1  # the columns
    assert "0 runs planned" in capsys.readouterr().out


def test_a_file_is_replaced_in_one_step(tmp_path):
    file = tmp_path / "report.md"
    file.write_text("old")

    def breaks(path: Path) -> None:
        path.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        report.replace(file, breaks)
    assert file.read_text() == "old"
    report.write_text(file, "new")
    assert file.read_text() == "new"


def one_line(capsys, *args: str) -> str:
    assert report.main(["report", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bad_input_is_one_line(tmp_path, capsys):
    assert "usage: python -m experiments.report OUT" in one_line(capsys)
    assert "usage:" in one_line(capsys, "a", "b")
    assert "tensorbord" in one_line(capsys, "a", "--tensorbord=b")
    assert "out='nowhere': holds no sweep" in one_line(capsys, "nowhere")
    for plan in ("{", "[]", '{"grid": {}}', '{"grid": {"cap": 0.4}, "runs": {}}'):
        (tmp_path / "sweep.json").write_text(plan)
        assert f"out='{tmp_path}': holds no sweep" in one_line(capsys, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.json"}


@pytest.mark.parametrize("content", ["{", "{}", '{"failed": 3}'])
def test_a_damaged_run_is_named(tmp_path, capsys, content):
    folder = small_sweep(tmp_path)
    (folder / "runs/full/seed=1/summary.json").write_text(content)
    line = one_line(capsys, str(folder))
    assert f"out='{folder}/runs/full/seed=1': is a damaged run" in line


@pytest.mark.parametrize("content", ["", "{", "{}\n", "3\n", '{"round": 2}\n'])
def test_damaged_rounds_are_named(tmp_path, capsys, content):
    folder = small_sweep(tmp_path)
    (folder / "runs/full/seed=1/metrics.jsonl").write_text(content)
    assert "runs/full/seed=1': metrics.jsonl" in one_line(capsys, str(folder))


@pytest.mark.parametrize("name", sweep_results.FILES)
def test_a_run_that_lacks_a_file_is_unfinished(tmp_path, name):
    """As it is for the driver, which does it again."""
    folder = small_sweep(tmp_path)
    before = sweep_results.read(folder)
    (folder / "runs/full/seed=1" / name).unlink()
    found = sweep_results.read(folder)
    assert found.unfinished == before.unfinished + 1
    assert [one.unfinished for one in found.configurations] == [1, 0, 2, 3]
