"""The frontier's figures and tables, from a folder made by hand."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from frontier_folder import (
    FEDAVG,
    FIELDS,
    OWNERS,
    SERVER,
    STRENGTHS,
    V1,
    folder_of,
)

from experiments.report import frontier as reported
from noisefl import protection


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("frontier")
    return folder, reported.write(folder, folder_of(folder), STRENGTHS)


def row_of(found: list[dict], **values: Any) -> dict:
    [row] = [row for row in found if values.items() <= row.items()]
    return row


def test_a_row_for_each_thief_in_each_view_of_each_run(made):
    found = made[1]
    of_run = {"iid": 3 * 2 + 1, "shards": 3 * 2 + 2}
    assert len(found) == 2 * 2 * sum(of_run.values()) + 4 * 2  # and FedAvg's bare copies
    assert all(set(FIELDS) <= set(row) for row in found)
    assert len({tuple(row) for row in found}) == 1
    assert {row["thief"] for row in found} == {"bare_copy", "ridge", "fine_tune", "average"}
    assert {row["scheme"] for row in found} == {"pair", "none"}
    row = row_of(found, partition="iid", strength=0.6, seed=1, thief="fine_tune", which=1)
    t, s, o = 0.79, 0.62, 0.91
    assert row == {
        **row,
        **{"strength_name": "cap", "view": "V1", "members": 1, "num_clients": 6, "copies": 1},
        **{"owner": o, "fedavg": FEDAVG, "server_alone": SERVER, "thief_accuracy": t},
        **{"thief_accuracy_best": 0.8, "scratch": s, "copy": 0.43, "fidelity": t, "cap": 0.6},
        **{"lambda": pytest.approx((t - s) / (o - s), abs=1e-6), "rounds_over_cap": 1},
        **{"over_scratch": pytest.approx(t / s, abs=1e-6), "highest_copy": pytest.approx(0.55)},
        # Scratch comes to 0.7 with the most that there was: 150 images.
        **{"server_images": 60, "copy_bytes": 3000, "calibration_ratio": 0.25},
        **{"images_needed": 150, "images_exact": False, "infeasible_rounds": 2, "failed": False},
    }
    row = row_of(found, partition="iid", strength=0.6, seed=0, thief="average")
    assert (row["scratch"], row["copy"], row["members"]) == (0.7, 0.4, 2)  # of two clients
    row = row_of(found, partition="shards", strength=0.6, seed=0, thief="ridge", view="V3")
    assert row["lambda"] == pytest.approx((0.3 - 0.4) / (0.8 - 0.4))  # worse than without a copy
    curve = [50, 100, 150], [0.2, 0.22, 0.4]
    wanted = protection.images_needed(0.3, *curve)
    assert (row["images_needed"], row["images_exact"]) == (round(wanted[0], 1), True)
    none = row_of(found, scheme="none", partition="iid", seed=0, which=0)
    assert (none["strength"], none["thief"], none["owner"]) == (None, "bare_copy", FEDAVG)
    assert none["lambda"] == 1


def test_where_the_owner_is_not_above_scratch_nothing_can_be_stolen(tmp_path):
    def worse(lines: list[dict]) -> list[dict]:
        return [{**one, "accuracy": 0.5} if one["thief"] == "owner" else one for one in lines]

    found = reported.rows(tmp_path, folder_of(tmp_path, worse), STRENGTHS)
    assert {row["lambda"] for row in found if row["partition"] == "iid"} == {None}
    of_v1 = [row for row in found if row["partition"] == "shards" and row["view"] == "V1"]
    assert all(row["lambda"] is not None for row in of_v1)


def test_a_thief_whose_model_broke_has_no_figures(tmp_path):
    def broken(lines: list[dict]) -> list[dict]:
        return [{**one, "accuracy": None, "accuracy_best": None} if one["thief"] == "fine_tune"
                else one for one in lines]  # fmt: skip

    found = reported.write(tmp_path, folder_of(tmp_path, broken), STRENGTHS)
    for row in found:
        if row["thief"] == "fine_tune":
            figures = ("thief_accuracy", "lambda", "over_scratch", "images_needed", "images_exact")
            assert {row[name] for name in figures} == {None}
    best = reported.best_thieves(pd.DataFrame(found))
    assert "fine_tune" not in set(best["thief"])
    json.dumps(found, allow_nan=False)


def test_of_an_owner_that_broke_nothing_is_stolen(tmp_path):
    """Its run has thieves all the same, whose copies are of before."""

    def broken(lines: list[dict]) -> list[dict]:
        return [{**one, "accuracy": None, "accuracy_best": None} if one["thief"] == "owner"
                else one for one in lines]  # fmt: skip

    found = reported.write(tmp_path, folder_of(tmp_path, broken), STRENGTHS)
    assert all(row["owner"] is None for row in found if row["scheme"] == "pair")
    assert all(row["lambda"] is None for row in found if row["scheme"] == "pair")
    assert any(row["thief_accuracy"] is not None for row in found if row["scheme"] == "pair")
    assert "| pair | 0.6 | –" in (tmp_path / "frontier.md").read_text("utf-8")
    json.dumps(found, allow_nan=False)


def test_a_run_that_broke_before_any_thief_had_a_copy_is_not_left_out(tmp_path):
    """Of the curve at 0.6 one run, and of the one at 0.8 all."""
    curves = folder_of(tmp_path)
    early = [f"{partition}-0.8/seed={seed}" for partition in OWNERS for seed in (0, 1)]
    for path in ("iid-0.6/seed=0", *early):
        run = tmp_path / "runs" / path
        owner, *_ = (run / "thieves.jsonl").read_text().splitlines()
        broken = {**json.loads(owner), "accuracy": None, "accuracy_best": None}
        (run / "thieves.jsonl").write_text(json.dumps(broken) + "\n")
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps({**summary, "failed": {"round": 2}}))
    found: Any = pd.DataFrame(reported.write(tmp_path, curves, STRENGTHS))
    of = found[(found["partition"] == "iid") & (found["scheme"] == "pair")]
    assert of.groupby(["strength", "seed"])["failed"].first().to_list() == [True, False, True, True]
    assert len(of) == 7 + 3 * 8  # shards have one thief more
    assert of[of["failed"]]["thief_accuracy"].isna().all()
    text = (tmp_path / "frontier.md").read_text("utf-8")
    assert "| pair | 0.6 | – (1 of 2 broke down)" in text
    assert "| pair | 0.8 | – (2 of 2 broke down)" in text


def test_without_controls_there_is_nothing_to_compare_with(tmp_path):
    def neither(lines: list[dict]) -> list[dict]:
        return [one for one in lines if one["thief"] not in ("scratch", "server_alone")]

    found = reported.rows(tmp_path, folder_of(tmp_path, neither), STRENGTHS)
    names = ("scratch", "server_alone", "lambda", "over_scratch", "images_needed", "images_exact")
    assert len(found) == 2 * 2 * (7 + 8) + 8
    assert {row[name] for row in found for name in names} == {None}


def test_scratch_may_know_nothing(tmp_path):
    """An accuracy of 0 is possible on few test images: T / S is then no number."""

    def zero(lines: list[dict]) -> list[dict]:
        return [{**one, "accuracy": 0.0} if one["thief"] == "scratch" else one for one in lines]

    found = reported.rows(tmp_path, folder_of(tmp_path, zero), STRENGTHS)
    row = row_of(found, partition="iid", strength=0.6, seed=0, thief="fine_tune", which=0)
    assert row["lambda"] == pytest.approx(0.76 / 0.9, abs=1e-6)
    assert row["over_scratch"] is None


def test_the_best_thief_of_a_view_may_use_less_than_it_has(made):
    best = reported.best_thieves(pd.DataFrame(made[1]))
    assert len(best) == 2 * (2 * 2 + 1)

    def of(**values: Any) -> Any:
        found = best
        for name, value in values.items():
            found = found[found[name] == value]
        [one] = found.to_dict("records")
        return one

    one = of(partition="iid", strength=0.6, view="V1", scheme="pair")
    # The mean over single thieves of one kind, not the best of them; seeds are paired.
    assert one["thief"] == "fine_tune"
    assert one["thief_accuracy"] == pytest.approx(0.775)
    assert (one["owner"], one["scratch"], one["seeds"]) == pytest.approx((0.905, 0.61, 2))
    assert one["lambda"] == pytest.approx((0.775 - 0.61) / (0.905 - 0.61))
    assert one["lambda_low"] <= one["lambda"] <= one["lambda_high"]
    assert one["lambda_worst"] == pytest.approx((0.785 - 0.61) / (0.905 - 0.61))
    assert one["thief_best"] == pytest.approx(0.785)
    assert one["over_scratch"] == pytest.approx(0.775 / 0.61)
    assert one["rounds_over_cap"] == 1
    pooled = of(partition="iid", strength=0.6, view="V3", scheme="pair")
    assert (pooled["thief"], pooled["thief_accuracy"]) == ("fine_tune", pytest.approx(0.775))
    assert pooled["scratch"] == pytest.approx(0.7)  # but its scratch is the coalition's own
    assert pooled["lambda"] == pytest.approx((0.775 - 0.7) / (0.905 - 0.7))
    shards = of(partition="shards", strength=0.6, view="V3", scheme="pair")
    assert (shards["thief"], shards["thief_accuracy"]) == ("average", pytest.approx(0.745))
    assert of(partition="shards", strength=0.6, view="V1", scheme="pair")["thief"] == "ridge"
    none = of(partition="iid", scheme="none", view="V1")
    assert none["lambda"] == pytest.approx(1.0, abs=0.1)


def test_the_accuracy_of_the_copy_is_a_mean_over_single_thieves(made):
    """However many thieves were tried in which view."""
    best = reported.best_thieves(pd.DataFrame(made[1])).to_dict("records")
    mine = [one for one in best if (one["partition"], one["strength"]) == ("iid", 0.6)]
    assert [one["copy"] for one in mine] == pytest.approx([0.415] * 2)


def ladder(view: str, members: int, thief: str, accuracy: float) -> dict:
    return {
        "dataset": "mnist", "model": "lenet5",
        "scheme": "pair", "strength": 0.6, "partition": "iid", "num_clients": 6, "seed": 0,
        "thief": thief, "view": view, "members": members, "which": 0, "owner": 0.9,
        "fedavg": 0.9, "server_alone": 0.7, "thief_accuracy": accuracy, "copy": 0.3,
        "thief_accuracy_best": accuracy, "scratch": 0.5, "fidelity": 0.5, "images_needed": 1.0,
        "rounds_over_cap": 0, "strength_name": "cap", "server_images": 60, "copy_bytes": 1.0,
        "calibration_ratio": None, "failed": False,
    }  # fmt: skip


def test_the_best_thief_is_the_best_on_average():
    """And not the one that some client was once lucky with; that one is named by the bound."""
    lucky, steady = (0.9, 0.1, 0.4, 0.2), (0.5, 0.6, 0.4, 0.6)
    frame = pd.DataFrame([
        {**ladder("V1", 1, thief, accuracy), "which": n % 2, "seed": n // 2}
        for thief, each in (("lucky", lucky), ("steady", steady))
        for n, accuracy in enumerate(each)
    ])  # fmt: skip
    [best] = reported.best_thieves(frame).to_dict("records")
    assert (best["thief"], best["seeds"]) == ("steady", 2)
    assert best["thief_accuracy"] == pytest.approx(0.525)
    assert best["thief_best"] == pytest.approx(0.525)
    assert best["lambda"] == pytest.approx(0.025 / 0.4)
    assert best["lambda_worst"] == pytest.approx(0.1 / 0.4)


@pytest.mark.parametrize("first", [True, False])
def test_a_thief_whose_model_broke_is_neither_the_best_nor_the_bound(first):
    frames = [pd.DataFrame([ladder("V1", 1, thief, accuracy)])
              for thief, accuracy in (("broken", math.nan), ("steady", 0.6))]  # fmt: skip
    [best] = reported.best_thieves(pd.concat(frames if first else frames[::-1])).to_dict("records")
    assert best["thief"] == "steady"
    assert best["thief_accuracy"] == pytest.approx(0.6)
    assert best["thief_best"] == pytest.approx(0.6)


@pytest.mark.parametrize("strong", ["V1", "V2", "V3", "V4", "V5"])
@pytest.mark.parametrize("members", [2, 5])
def test_what_works_in_a_view_works_in_those_that_hold_it(strong, members):
    """Of coalitions of two and of five; a coalition does not do what another one does."""
    shapes = [("V1", 1), ("V2", 1), *((v, c) for v in ("V3", "V4", "V5") for c in (2, 5))]
    if strong in ("V1", "V2"):
        members = 1
    frame = pd.DataFrame([
        *(ladder(view, c, "weak", 0.6) for view, c in shapes), ladder(strong, members, "best", 0.8)
    ])  # fmt: skip
    best = reported.best_thieves(frame)
    found = {(r["view"], r["members"]) for r in best.to_dict("records") if r["thief"] == "best"}
    holds = {
        "V1": {"V1", "V2", "V3", "V4", "V5"}, "V2": {"V2", "V4", "V5"}, "V3": {"V3", "V4", "V5"},
        "V4": {"V4", "V5"}, "V5": {"V5"},
    }[strong]  # fmt: skip
    assert found == {(v, c) for v, c in shapes if v in holds and members in (1, c)}
    assert len(best) == len(shapes)


def test_the_files_can_be_read(made, tmp_path):
    folder, found = made
    names = {file.name for file in folder.iterdir() if file.is_file()}
    assert names == {
        "sweep.json", *(f"frontier.{end}" for end in ("csv", "parquet", "md")),
        "frontier-6.png", "shares-6.png",
    }  # fmt: skip
    with open(folder / "frontier.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [list(line) for line in lines] == [list(row) for row in found]
    for text, row in zip(lines, found, strict=True):
        for name, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert float(text[name]) == value
            else:
                assert text[name] == ("" if value is None else str(value))
    frame = pd.read_parquet(folder / "frontier.parquet")
    assert list(frame.columns) == list(found[0])
    assert frame["thief_accuracy"].tolist() == [row["thief_accuracy"] for row in found]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_several_frontiers_are_merged(made, tmp_path):
    """In parts, with FedAvg in each of them, they are the whole; one scheme has a seed less."""
    folder, found = made
    whole, parts = pd.read_csv(folder / "frontier.csv"), []
    for seed in (0, 1):
        few = whole[(whole["seed"] == seed) & ((whole["strength"] != 0.8) | (seed == 0))]
        parts.append(str(tmp_path / f"{seed}.csv"))
        few.to_csv(parts[-1], index=False)
    third = whole[whole["scheme"] == "none"].assign(owner=0.1)
    parts.append(str(tmp_path / "fedavg.csv"))
    third.to_csv(parts[-1], index=False)
    frame = reported.merged(parts)
    assert len(frame) == len(found) - sum(r["strength"] == 0.8 and r["seed"] == 1 for r in found)
    assert 0.1 not in set(frame["owner"])
    text = reported.markdown(frame, reported.best_thieves(frame))
    assert "## mnist, lenet5, iid, K = 6, 2 seeds" in text
    assert "| pair (1 seed) | 0.8 |" in text
    assert "| pair | 0.6 |" in text
    (out := tmp_path / "out").mkdir()
    reported.publish(out, reported.merged([str(folder / "frontier.csv")]))
    for name in ("frontier.md", "frontier.csv"):
        assert (out / name).read_text() == (folder / name).read_text()


def test_what_cannot_be_merged_is_one_line(made, tmp_path):
    file = str(made[0] / "frontier.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    pd.read_csv(file).drop(columns="failed").to_csv(tmp_path / "older.csv")
    for files, words in [
        ([file, file], "two have the same runs of pair"),
        ([str(tmp_path / "no.csv")], "cannot be read"),
        ([str(tmp_path / "other.csv")], "it has no column 'scheme'"),
        ([str(tmp_path / "older.csv")], "it has no column 'failed'"),
    ]:
        with pytest.raises(ValueError, match=words) as error:
            reported.merged(files)
        assert str(error.value).startswith("merge=")


def test_tables_in_markdown(made):
    text = (made[0] / "frontier.md").read_text("utf-8")
    headings = [one for one in text.splitlines() if one.startswith("## ")]
    for heading, partition in zip(headings, OWNERS, strict=True):
        assert heading.startswith(f"## mnist, lenet5, {partition}, K = 6")
        assert heading.endswith("2 seeds")
    iid = text.split("## ")[1].splitlines()
    tables: list[list[list[str]]] = [[]]
    for one in iid:
        if one.startswith("|"):
            tables[-1].append([cell.strip() for cell in one.strip("|").split(" | ")])
        elif tables[-1]:
            tables.append([])
    by_view, by_thief = [table for table in tables if table]
    for table in (by_view, by_thief):
        assert len({len(cells) for cells in table}) == 1
        assert set(table[1]) == {"---"}
    assert by_view[0] == [
        *("scheme", "strength", "O", "copy", "kB a copy", "calibration / training"),
        *("V1: S, T, λ", "V3, 2: S, T, λ"),
    ]
    rows = {(cells[0], cells[1]): cells for cells in by_view[2:]}
    assert set(rows) == {("pair", "0.8"), ("pair", "0.6"), ("none", "")}
    cells = rows["pair", "0.6"]
    assert (cells[2], *cells[4:6]) == ("90.5", "2", "0.25")  # 2.5 kB, to even
    assert cells[6].startswith("61.0, 77.5 (fine tune), 0.56 [")
    assert cells[7].startswith("70.0, 77.5 (fine tune), 0.37 [")
    assert rows["none", ""][5] == "–"
    assert "FedAvg 95.0; the server alone, on its 60 images, 70.0." in iid
    thieves = {(cells[0], cells[1]) for cells in by_thief[2:]}
    assert thieves == {("average", "V3, 2"), *((t.replace("_", " "), "V1") for t in V1["iid"])}
    [average] = [cells for cells in by_thief[2:] if cells[0] == "average"]
    assert average[2].startswith("0.12 [")  # (0.725 − 0.7) / (0.905 − 0.7)
    assert by_thief[0] == ["thief", "view", "pair 0.6", "none"]


def test_a_folder_of_something_else_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^out=.*holds no sweep"):
        reported.write(tmp_path, {}, STRENGTHS)
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": {}}))
    with pytest.raises(ValueError, match=r"^out=.*holds no run with thieves"):
        reported.write(tmp_path, {}, STRENGTHS)
