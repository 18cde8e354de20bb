"""The report of a sweep: its statistics against numbers by hand, its files against each other."""

import csv
import math
from pathlib import Path

import pytest
from pyarrow import parquet
from sweep_folder import FakeSweep, fedavg_row, noise_row, small_sweep, summary

from experiments import report, sweep_statistics

# Student's t at 97.5 % in closed form.
T1 = math.tan(0.475 * math.pi)  # 1 degree of freedom: 12.7
T2 = 0.95 * math.sqrt(2 / (1 - 0.95**2))  # 2 degrees: 4.30


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "report.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    folder = small_sweep(tmp_path_factory.mktemp("sweep"))
    assert report.main(["report", str(folder)]) == 0
    return folder


def test_rows_stand_in_the_order_of_the_grid(reported):
    found = [(row["cap"], row["calibrator"]) for row in rows_of(reported)]
    assert found == [
        ("0.5", "sequential"),
        ("0.5", "bisection"),
        ("0.4", "sequential"),
        ("0.4", "bisection"),
    ]


def test_columns(reported):
    first = [
        *("cap", "calibrator", "seeds", "owner_accuracy_mean", "owner_accuracy_std"),
        *("owner_accuracy_ci95", "baseline_gap_mean", "max_shared_accuracy_mean"),
        *("rounds_over_cap_mean", "infeasible_rounds_mean", "failed_runs"),
    ]
    assert list(rows_of(reported)[0])[: len(first)] == first


# Hand-written. A gap is FedAvg's accuracy minus the owner's, of seeds 0 and 1; FedAvg broke down
# with seed 2.
EXPECTED = {
    0: {
        "seeds": 3,
        "owner_accuracy_mean": 0.93,
        "owner_accuracy_std": math.sqrt(0.0013),  # (0.03² + 0.01² + 0.04²) / 2
        "owner_accuracy_ci95": T2 * math.sqrt(0.0013 / 3),
        "baseline_gap_mean": 0.05,  # 0.95 − 0.90 and 0.97 − 0.92
        "baseline_gap_ci95": 0.0,
        "baseline_gap_seeds": 2,
        "max_shared_accuracy_mean": 0.48,
        "max_shared_accuracy_max": 0.51,
        "rounds_over_cap_mean": 1.0,
        "infeasible_rounds_mean": 2.0,
        "protected_rounds_mean": 2.0,
        "images_per_round_mean": 600.0,  # 3,600 images in 6 rounds
        "failed_runs": 0,
        "unfinished_runs": 0,
    },
    1: {
        "seeds": 3,
        "owner_accuracy_mean": 0.85,
        "owner_accuracy_std": 0.1 / math.sqrt(2),
        "owner_accuracy_ci95": T1 * 0.05,
        "baseline_gap_mean": 0.11,  # 0.95 − 0.90 and 0.97 − 0.80
        "baseline_gap_ci95": T1 * 0.06,
        "baseline_gap_seeds": 2,
        "max_shared_accuracy_mean": None,
        "max_shared_accuracy_max": None,
        "rounds_over_cap_mean": 0.0,
        "protected_rounds_mean": 1.0,
        "images_per_round_mean": 400.0,  # of the seed that had protected rounds
        "failed_runs": 1,
        "unfinished_runs": 0,
    },
    2: {
        "seeds": 1,
        "owner_accuracy_mean": 0.8,
        "owner_accuracy_std": None,
        "owner_accuracy_ci95": None,
        "baseline_gap_mean": 0.17,
        "baseline_gap_ci95": None,
        "baseline_gap_seeds": 1,
        "max_shared_accuracy_mean": 0.39,
        "failed_runs": 0,
        "unfinished_runs": 2,
    },
    3: {
        "seeds": 0,
        "owner_accuracy_mean": None,
        "baseline_gap_mean": None,
        "baseline_gap_seeds": 0,
        "images_per_round_mean": None,
        "failed_runs": 0,
        "unfinished_runs": 3,
    },
}


@pytest.mark.parametrize("place", EXPECTED)
def test_statistics_are_those_by_hand(reported, place):
    row = rows_of(reported)[place]
    for name, wanted in EXPECTED[place].items():
        found = float(row[name]) if row[name] else None
        assert found == (wanted if wanted is None else pytest.approx(wanted, abs=1e-12)), name


def test_parquet_is_the_csv(reported):
    texts = rows_of(reported)
    table = parquet.read_table(reported / "report.parquet")
    assert table.column_names == list(texts[0])
    assert str(table.schema.field("seeds").type) == "int64"
    assert str(table.schema.field("owner_accuracy_ci95").type) == "double"
    for row, text in zip(table.to_pylist(), texts, strict=True):
        assert {name: "" if value is None else str(value) for name, value in row.items()} == text


def cells_of(folder: Path) -> list[dict[str, str]]:
    """The table of report.md."""
    lines = [line for line in (folder / "report.md").read_text().splitlines() if line[:1] == "|"]
    split = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(split[0], cells, strict=True)) for cells in split[2:]]


def test_markdown_is_the_csv_in_percent(reported):
    cells = cells_of(reported)
    for cell, row in zip(cells, rows_of(reported), strict=True):
        assert (cell["calibrator"], cell["cap"]) == (
            row["calibrator"],
            f"{100 * float(row['cap']):.0f} %",
        )
    assert [cell["owner"] for cell in cells] == [
        f"93.00 ± {100 * T2 * math.sqrt(0.0013 / 3):.2f} %",
        f"85.00 ± {5 * T1:.2f} %",
        "80.00 % (1 seed, no interval)",
        "–",
    ]
    gaps = [cell["FedAvg − owner, points"] for cell in cells]
    assert gaps == ["5.00 ± 0.00", f"11.00 ± {6 * T1:.2f}", "17.00", "–"]
    assert [cell["rounds over cap"] for cell in cells] == ["1.0 of 2", "0.0 of 1", "0.0 of 2", "–"]
    seeds = [cell["seeds"] for cell in cells]
    assert seeds == ["3", "3, 1 failed", "1, 2 unfinished", "0, 3 unfinished"]


def test_the_owner_stands_beside_the_cap(reported):
    headings = list(cells_of(reported)[0])
    assert headings.index("owner") == headings.index("cap") + 1


def test_markdown_says_first_how_far_the_sweep_is_and_then_what_failed(reported):
    text = (reported / "report.md").read_text()
    says = "15 runs planned: 8 complete, 2 failed, 5 unfinished."
    assert text.splitlines()[0] == says
    failed = text.partition("## Failed runs")[2].strip().splitlines()
    assert failed == [
        "- runs/f/seed=2 (run=fedavg, seed=2): round 2: the model is NaN",
        "- runs/broken/seed=2 (run=noise, cap=0.5, calibrator=bisection, seed=2): "
        "round 2: the model is NaN",
    ]


def test_nothing_is_called_nan(reported):
    # "NaN" is in the cause of a failed run, which is told below the table.
    for text in ((reported / "report.csv").read_text(), str(cells_of(reported))):
        assert "nan" not in text.lower().replace("finan", "")
        assert "None" not in text


def test_what_it_writes_and_says(reported, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert report.main(["report", str(reported)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("15 runs planned: 8 complete, 2 failed, 5 unfinished.")
    assert "failed: runs/broken/seed=2" in said
    names = said.splitlines()[-1].partition(" holds: ")[2].split(", ")
    assert {"report.csv", "report.md", "report.parquet", "figure1.png"} <= set(names)
    kept = {"runs", "sweep.json"}
    assert {path.name for path in reported.iterdir()} - kept == set(names)  # nothing half-written
    words = said.split()
    # On a terminal that is too narrow for the table.
    assert {"sequential", "93.00", "85.00", "11.00", "48.00", "600", "unfinished"} <= set(words)
    assert "…" not in said


def test_without_a_cap_in_the_grid_that_of_the_options_is_there(tmp_path):
    sweep = FakeSweep(tmp_path, {"model": ["mlp"]})
    base = sweep.run("f", 7, {}, summary(0.9), [fedavg_row(1, 0.9)])
    sweep.run("n", 7, {"model": "mlp"}, summary(0.8), [noise_row(1, 0.8, 0.3, 0.3)], baseline=base)
    assert report.main(["report", str(tmp_path)]) == 0
    assert rows_of(tmp_path)[0]["cap"] == "0.6"
    assert cells_of(tmp_path)[0]["cap"] == "60 %"


def test_without_fedavg_the_gap_is_empty(tmp_path):
    sweep = FakeSweep(tmp_path, {"seed": [0, 1]})
    for seed in (0, 1):
        sweep.run("n", seed, {}, summary(0.8), [noise_row(1, 0.8, 0.3, 0.3)], kind="noise")
    assert report.main(["report", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path)
    assert (row["baseline_gap_mean"], row["baseline_gap_seeds"]) == ("", "0")
    assert (row["owner_accuracy_mean"], row["owner_accuracy_std"]) == ("0.8", "0.0")


def test_flags_may_hold_anything(tmp_path, capsys, monkeypatch):
    """A regular expression with a bar and brackets, a switch, and words among numbers."""
    monkeypatch.setenv("COLUMNS", "300")
    layers, clients, best = ["conv[ab]|dense.*/kernel$"], ["m", 3], [False, True]
    grid = {"noise_layers": layers, "server_clients": clients, "keep_best": best}
    sweep = FakeSweep(tmp_path, grid)
    for name, clients_, best_ in (("a", "m", True), ("b", 3, False)):
        values = {"noise_layers": layers[0], "server_clients": clients_, "keep_best": best_}
        sweep.run(name, 0, values, summary(0.8), [noise_row(1, 0.8, 0.3, 0.3)], baseline="none")
    assert report.main(["report", str(tmp_path)]) == 0
    assert f" {layers[0]} " in capsys.readouterr().out
    found = [[row[flag] for flag in grid] for row in rows_of(tmp_path)]
    assert found == [[layers[0], "m", "true"], [layers[0], "3", "false"]]
    assert "| conv[ab]\\|dense.*/kernel$ | m |" in (tmp_path / "report.md").read_text()
    columns = parquet.read_table(tmp_path / "report.parquet").to_pydict()
    assert columns["server_clients"] == ["m", "3"]
    assert columns["keep_best"] == [True, False]


def test_clopper_pearson_is_exact():
    low, high = sweep_statistics.clopper_pearson(3, 20)

    def at_most(hits: int, rate: float) -> float:
        return sum(math.comb(20, k) * rate**k * (1 - rate) ** (20 - k) for k in range(hits + 1))

    assert 1 - at_most(2, low) == pytest.approx(0.025)
    assert at_most(3, high) == pytest.approx(0.025)
    assert sweep_statistics.clopper_pearson(0, 20) == (0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert sweep_statistics.clopper_pearson(20, 20) == (pytest.approx(0.025 ** (1 / 20)), 1)


def test_a_terminal_gets_the_first_lines_and_is_told_so(tmp_path, capsys):
    caps = [t / 1000 for t in range(100, 160)]
    sweep = FakeSweep(tmp_path, {"cap": caps})
    for cap in caps:
        rows = [noise_row(1, 0.8, 0.3, 0.3)]
        sweep.run(f"n{cap}", 0, {"cap": cap}, summary(0.8), rows, baseline="none", cap=cap)
    assert report.main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "14.9 %" in said
    assert "15 %" not in said
    assert "The first 50 of 60 lines; report.md has all." in said
    assert len(cells_of(tmp_path)) == 60
