"""What the report of a sweep reads, what it refuses, and how it replaces files."""

from pathlib import Path

import pytest
from sweep_folder import FakeSweep, small_sweep, summary

from experiments import report, sweep_results, sweep_statistics


def test_configurations_that_the_plan_lacks_are_not_made_up(tmp_path):
    """Two spellings of one value are one configuration: the grid then has more than the plan."""
    sweep = FakeSweep(tmp_path, {"server_clients": ["m", "10"]})
    sweep.run("n", 0, {"server_clients": "m"}, summary(0.8), baseline="runs/f/seed=0")
    sweep.plan("f", 0)
    found = sweep_results.read(tmp_path)
    assert [one.values for one in found.configurations] == [{"server_clients": "m"}]
    assert (found.planned, found.unfinished) == (2, 1)


def test_the_table_reads_no_rounds(tmp_path):
    folder = small_sweep(tmp_path)
    for file in folder.rglob("metrics.jsonl"):
        file.unlink()
    _, rows = sweep_statistics.table(sweep_results.read(folder))
    assert rows[0]["owner_accuracy_mean"] == pytest.approx(0.93)


def test_a_sweep_that_has_only_begun(tmp_path, capsys):
    sweep = FakeSweep(tmp_path, {"cap": [0.4, 0.5]})
    for name in ("f", "n4", "n5"):
        sweep.plan(name, 0)
    assert report.main(["report", str(tmp_path)]) == 0
    assert [one.unfinished for one in sweep_results.read(tmp_path).configurations] == [1, 1]
    sweep.write("sweep.json", {"grid": {"cap": [0.4]}, "runs": []})
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
    for plan in ("{", "[]", '{"grid": {}}', '{"grid": {"cap": 0.4}, "runs": []}'):
        (tmp_path / "sweep.json").write_text(plan)
        assert f"out='{tmp_path}': holds no sweep" in one_line(capsys, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.json"}


@pytest.mark.parametrize(
    ("name", "content"),
    [("summary.json", "{"), ("summary.json", "{}"), ("config.json", '{"run": "noise"}')],
)
def test_a_damaged_run_is_named(tmp_path, capsys, name, content):
    folder = small_sweep(tmp_path)
    (folder / "runs/full/seed=1" / name).write_text(content)
    line = one_line(capsys, str(folder))
    assert f"out='{folder}/runs/full/seed=1': is a damaged run" in line


def test_damaged_rounds_are_named(tmp_path, capsys):
    folder = small_sweep(tmp_path)
    (folder / "runs/full/seed=1/metrics.jsonl").write_text("{")
    assert "runs/full/seed=1': metrics.jsonl" in one_line(capsys, str(folder))
