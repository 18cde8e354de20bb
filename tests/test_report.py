"""The report of a folder: its statistics against numbers by hand, its files against each other,
and what it refuses."""

import csv
import math
from pathlib import Path

import pytest
from pyarrow import parquet
from sweep_folder import BROKEN, FakeSweep, single_run, small_sweep, summary

from experiments.report import __main__ as report
from experiments.report import results, table

# Student's t at 97.5 % in closed form.
T1 = math.tan(0.475 * math.pi)  # 1 degree of freedom: 12.7
T2 = 0.95 * math.sqrt(2 / (1 - 0.95**2))  # 2 degrees: 4.30


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "report.csv", newline="") as file:
        return list(csv.DictReader(file))


def cells_of(folder: Path) -> dict[str, list[str]]:
    """The table of report.md by heading."""
    lines = [line for line in (folder / "report.md").read_text().splitlines() if line[:1] == "|"]
    split = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {column[0]: list(column[2:]) for column in zip(*split, strict=True)}


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    folder = small_sweep(tmp_path_factory.mktemp("sweep"))
    assert report.main(["report", str(folder)]) == 0
    return folder


# By hand, in the order of the grid. A gap is FedAvg's accuracy minus the owner's, of seeds 0 and 1:
# 0.95 − 0.90 and 0.97 − 0.92; 0.95 − 0.90 and 0.97 − 0.80. FedAvg broke down with seed 2.
EXPECTED = {
    "cap": [0.5, 0.5, 0.4, 0.4],
    "seeds": [3, 3, 1, 0],
    "owner_accuracy_mean": [0.93, 0.85, 0.8, None],
    "owner_accuracy_std": [math.sqrt(0.0013), 0.1 / math.sqrt(2), None, None],
    "owner_accuracy_ci95": [T2 * math.sqrt(0.0013 / 3), T1 * 0.05, None, None],
    "baseline_gap_mean": [0.05, 0.11, 0.17, None],
    "baseline_gap_ci95": [0, T1 * 0.06, None, None],
    "baseline_gap_seeds": [2, 2, 1, 0],
    "shared_accuracy_max_test_mean": [0.48, None, 0.39, None],
    "shared_accuracy_max_test_max": [0.51, None, 0.39, None],
    "rounds_over_cap_test_mean": [1, 0, 0, None],
    "infeasible_rounds_mean": [2, 0, 0, None],
    "protected_rounds_mean": [2, 1, 2, None],
    "images_per_round_mean": [600, 400, 400, None],  # of seeds that had protected rounds
    "failed_runs": [0, 1, 0, 0],
    "unfinished_runs": [0, 0, 2, 3],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_statistics_are_those_by_hand(reported, name):
    found = [float(row[name]) if row[name] else None for row in rows_of(reported)]
    assert found == pytest.approx(EXPECTED[name], abs=1e-10)


def test_parquet_is_the_csv(reported):
    texts = rows_of(reported)
    columns = parquet.read_table(reported / "report.parquet")
    assert columns.column_names == list(texts[0])
    assert columns.column_names[:4] == ["cap", "calibrator", "seeds", "owner_accuracy_mean"]
    assert set(columns.column_names) == {"calibrator", *EXPECTED}
    types = [str(columns.schema.field(name).type) for name in ("seeds", "owner_accuracy_ci95")]
    assert types == ["int64", "double"]
    for row, text in zip(columns.to_pylist(), texts, strict=True):
        assert {name: "" if value is None else str(value) for name, value in row.items()} == text


def test_markdown_is_the_csv_in_percent(reported):
    cells = cells_of(reported)
    assert list(cells)[:3] == ["calibrator", "cap", "owner"]
    assert cells["calibrator"] == ["sequential", "bisection"] * 2
    assert cells["cap"] == ["50 %", "50 %", "40 %", "40 %"]
    halves = [100 * T2 * math.sqrt(0.0013 / 3), 5 * T1, 6 * T1]
    owners = [f"93.00 ± {halves[0]:.2f} %", f"85.00 ± {halves[1]:.2f} %"]
    assert cells["owner"] == [*owners, "80.00 % (1 seed)", "–"]
    gaps = ["5.00 ± 0.00", f"11.00 ± {halves[2]:.2f}", "17.00", "–"]
    assert cells["FedAvg − owner, points"] == gaps
    assert cells["rounds over cap"] == ["1.0 of 2", "0.0 of 1", "0.0 of 2", "–"]
    assert cells["seeds"] == ["3", "3, 1 failed", "1, 2 unfinished", "0, 3 unfinished"]
    assert "nan" not in str(cells).lower()
    text = (reported / "report.md").read_text()
    assert text.splitlines()[0] == "15 runs planned: 8 complete, 2 failed, 5 unfinished."
    assert text.partition("## Failed runs")[2].strip().splitlines() == [
        "- runs/f/seed=2 (run=fedavg, seed=2): round 2: the model is NaN",
        "- runs/broken/seed=2 (run=noise, cap=0.5, calibrator=bisection, seed=2): "
        "round 2: the model is NaN",
    ]


def test_what_it_writes_and_says(reported, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # too narrow for the table
    assert report.main(["report", str(reported)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("15 runs planned: 8 complete, 2 failed, 5 unfinished.")
    assert "failed: runs/broken/seed=2" in said
    names = said.splitlines()[-1].partition(" holds: ")[2].split(", ")
    assert {"report.csv", "report.md", "report.parquet", "figure1.png"} <= set(names)
    assert {path.name for path in reported.iterdir()} == {"runs", "sweep.json", *names}
    words = {"sequential", "93.00", "85.00", "11.00", "48.00", "600", "unfinished"}
    assert words <= set(said.split())  # none is cut
    assert "8.96 %" in said
    assert "± 8.96 %" not in said  # but folded
    assert "…" not in said
    monkeypatch.delenv("COLUMNS")  # of a pipe nobody knows the width
    assert report.main(["report", str(reported)]) == 0
    assert "± 8.96 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("room", "widths"), [(0, [9, 9]), (18, [9, 9]), (20, [11, 9]), (25, [12, 13]), (99, [12, 18])]
)
def test_what_lacks_least_is_unfolded_first(room, widths):
    """Of texts of 12 and 18 letters, folded to `FOLDED` at most."""
    assert table._widths([["c", "aaaa bbbb cc"], ["d", "a longer text here"]], room) == widths


def test_a_terminal_gets_the_first_lines_and_is_told_so(tmp_path, capsys):
    caps = [t / 1000 for t in range(100, 160)]
    sweep = FakeSweep(tmp_path, {"cap": caps})
    for cap in caps:
        sweep.plan(f"n{cap}", 0, {"cap": cap}, "", cap)
    assert report.main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "14.9 %" in said
    assert "15 %" not in said
    assert "The first 50 of 60 lines; report.md has all." in said
    assert len(cells_of(tmp_path)["cap"]) == 60


def test_flags_may_hold_anything(tmp_path, capsys, monkeypatch):
    """A regular expression with a bar and brackets, a switch, words among numbers, a path whose
    last part is the cap, nothing, and a chain. Without FedAvg the gap is empty."""
    monkeypatch.setenv("COLUMNS", "300")
    layers = "conv[ab]|dense.*/kernel$"
    grid = {
        "noise_layers": [layers], "server_clients": ["m", 3], "keep_best": [False, True],
        "scheme.calibrator.cap": [0.5], "momentum": [None, 0.9], "owner": ["a+b", "b"],
    }  # fmt: skip
    sweep = FakeSweep(tmp_path, grid)
    for name, *values in (
        ("a", layers, "m", True, 0.5, 0.9, "a+b"),
        ("b", layers, 3, False, 0.5, None, "b"),
    ):
        named = dict(zip(grid, values, strict=True))
        sweep.run(name, 0, named, summary(0.8), baseline="", cap=0.5)
    assert report.main(["report", str(tmp_path)]) == 0
    assert f" {layers} " in capsys.readouterr().out
    found = rows_of(tmp_path)
    shown = [[row[flag] for flag in [*grid, "baseline_gap_mean"]] for row in found]
    first = [layers, "m", "true", "0.5", "0.9", "a+b", ""]
    assert shown == [first, [layers, "3", "false", "0.5", "", "b", ""]]
    assert cells_of(tmp_path)["cap"] == ["50 %", "50 %"]
    assert "scheme.calibrator.cap" not in cells_of(tmp_path)
    assert "| conv[ab]\\|dense.*/kernel$ | m |" in (tmp_path / "report.md").read_text()
    columns = parquet.read_table(tmp_path / "report.parquet").to_pydict()
    assert columns["server_clients"] == ["m", "3"]
    assert (columns["keep_best"], columns["momentum"]) == ([True, False], [0.9, None])


def test_a_single_run_is_a_sweep_of_one(tmp_path, capsys):
    def said() -> str:
        assert report.main(["report", str(folder)]) == 0
        return capsys.readouterr().out

    found = summary(0.8, baseline_accuracy_final=0.9, baseline_failed=None)
    folder = single_run(tmp_path / "run", [], found)  # of which no rounds are read
    (folder / "figure1.png").write_text("the driver's own")
    assert said().startswith("2 runs planned: 2 complete")
    (row,) = rows_of(folder)
    assert (row["cap"], row["seeds"], row["owner_accuracy_mean"]) == ("0.6", "1", "0.8")
    assert float(row["baseline_gap_mean"]) == pytest.approx(0.1)
    assert (folder / "figure1.png").read_text() == "the driver's own"
    single_run(folder, [], {**found, "failed": BROKEN, "baseline_failed": BROKEN})
    text = said()
    assert "failed: fedavg (run=fedavg, seed=3): round 2: the model is NaN" in text
    assert "failed: noise (run=noise, seed=3): round 2: the model is NaN" in text
    (folder / "summary.json").unlink()
    assert said().startswith("2 runs planned: 0 complete, 0 failed, 2 unfinished")


def test_the_table_reads_no_rounds(tmp_path):
    folder = small_sweep(tmp_path)
    for file in folder.rglob("metrics.jsonl"):
        file.write_text("")
    found = table.statistics(results.read(folder))
    assert found["owner_accuracy_mean"].iloc[0] == pytest.approx(0.93)


def test_a_sweep_that_has_only_begun(tmp_path, capsys):
    sweep = FakeSweep(tmp_path, {"calibrator": ["fixed", "sequential"]})
    base = sweep.plan("f", 0, {}, None, 0.6)
    assert report.main(["report", str(tmp_path)]) == 0
    assert len((tmp_path / "report.csv").read_text().splitlines()) == 1  # the columns
    for rule in ("fixed", "sequential"):
        sweep.plan(f"n{rule}", 0, {"calibrator": rule}, base, 0.6)
    assert report.main(["report", str(tmp_path)]) == 0
    assert [row["unfinished_runs"] for row in rows_of(tmp_path)] == ["1", "1"]
    (tmp_path / "sweep.json").write_text('{"grid": {"cap": [0.4]}, "runs": {}}')
    assert report.main(["report", str(tmp_path)]) == 0
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
    assert [one.name for one in file.parent.iterdir()] == [file.name]
    report.replace(file, lambda path: path.write_text("new"))
    assert file.read_text() == "new"


def one_line(capsys, *args: str) -> str:
    assert report.main(["report", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bad_input_is_one_line(tmp_path, capsys):
    assert "usage: python -m experiments.report OUT" in one_line(capsys)
    assert "usage:" in one_line(capsys, "a", "b")
    assert "tensorbord" in one_line(capsys, "a", "--tensorbord=b")
    assert "out='nowhere': is no folder" in one_line(capsys, "nowhere")
    no_list = '{"grid": {"cap": 0.4}, "runs": {}}'
    for name, text in (("config.json", "[]"), *(("sweep.json", s) for s in ("{", "[]", no_list))):
        (tmp_path / name).write_text(text)
        assert f"out='{tmp_path}': holds no sweep" in one_line(capsys, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "sweep.json"}


DAMAGED = {
    "summary.json": (("{", "{}", "[]", '{"failed": 3}'), "is a damaged run"),
    "metrics.jsonl": (("", "{", "{}\n", "3\n", '{"run": "noise", "round": 2}\n'), "metrics.jsonl"),
}


def test_damaged_runs_are_named_and_without_a_file_unfinished(tmp_path, capsys):
    folder = small_sweep(tmp_path)
    run = folder / "runs/full/seed=1"
    for name in results.FILES:
        before = (run / name).read_text()
        contents, complaint = DAMAGED.get(name, ((), ""))
        for content in contents:
            (run / name).write_text(content)
            assert f"out='{run}': {complaint}" in one_line(capsys, str(folder)), content
        (run / name).unlink()  # the driver then does it again
        unfinished = table.statistics(results.read(folder))["unfinished_runs"]
        assert list(unfinished) == [1, 0, 2, 3], name
        (run / name).write_text(before)
