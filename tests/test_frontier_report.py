"""The frontier's figures, tables and pictures, from a folder made by hand."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.report import frontier as reported
from experiments.report import shares
from noisefl import protection

OWNERS, FEDAVG, SERVER = {"iid": 0.9, "shards": 0.8}, 0.95, 0.7
SINGLES, MEMBERS = (0, 1), 2
FIELDS = [
    *("scheme", "strength", "thief", "view", "members", "which", "dataset", "model"),
    *("partition", "num_clients"),
    *("seed", "owner", "fedavg", "thief_accuracy", "thief_accuracy_best", "scratch"),
    *("server_alone", "copy", "lambda", "over_scratch", "images_needed", "fidelity", "copies"),
]
# Of V1: fine-tuning wins; in V3 of shards the average does, and of iid one member's own attack.
V1 = {"iid": {"bare_copy": 0.4, "ridge": 0.7, "fine_tune": 0.76},
      "shards": {"bare_copy": 0.45, "ridge": 0.5, "fine_tune": 0.48}}  # fmt: skip
V3 = {"iid": {"average": 0.72}, "shards": {"average": 0.74, "ridge": 0.3}}
SCRATCH = {"iid": (0.6, 0.7), "shards": (0.2, 0.4)}  # with one client's images, and with two's


def line(thief: str, view: str, members: int, which: int, accuracy: float | None, **others: Any):
    best = None if accuracy is None else round(accuracy + 0.01, 4)
    found = {
        "run": "noise", "thief": thief, "view": view, "members": members, "which": which,
        "accuracy": accuracy, "accuracy_best": best, "fidelity": accuracy, "round": 4,
        "copies": members, "images": 50 * members, **others,
    }  # fmt: skip
    return found


def stolen(partition: str, seed: int, protected: bool) -> list[dict]:
    """Of a run: the second single thief is 2 points better, and seed 1 is 1 point better."""
    by = 0.01 * seed
    owner = OWNERS[partition] + by if protected else FEDAVG
    lines = [line("owner", "V0", 0, 0, owner, accuracy_best=owner, fidelity=1.0, images=0)]
    tried = V1[partition] if protected else {"bare_copy": FEDAVG}
    lines += [line(thief, "V1", 1, which, round(x + by + 0.02 * which, 4))
              for thief, x in tried.items() for which in SINGLES]  # fmt: skip
    if protected:
        return [*lines, *(line(thief, "V3", 2, 0, x + by) for thief, x in V3[partition].items())]
    one, two = SCRATCH[partition]
    lines += [line("scratch", "V1", 1, which, round(one + 0.02 * which, 4), images=50 + 50 * which)
              for which in SINGLES]  # fmt: skip
    lines += [line("scratch", "V3", 2, 0, two, images=150)]
    return [*lines, line("server_alone", "V0", 0, 0, SERVER, images=60)]


def folder_of(out: Path, change: Any = lambda lines: lines) -> dict[str, tuple[str, Any]]:
    """A sweep of two partitions, two strengths and two seeds; returns its curves."""
    runs, curves = {}, {}
    for partition in OWNERS:
        for seed in (0, 1):
            baseline = f"runs/f-{partition}/seed={seed}"
            runs[baseline] = {"run": "fedavg", "seed": seed, "baseline": None}
            write(out / baseline, partition, seed, change(stolen(partition, seed, False)))
            for cap in (0.8, 0.6):
                path = f"runs/{partition}-{cap}/seed={seed}"
                runs[path] = {"run": "noise", "seed": seed, "baseline": baseline}
                curves[path] = "pair", cap
                lines = stolen(partition, seed, True)
                if cap == 0.8:  # weaker: all thieves 5 points better
                    lines = [{**one, "accuracy": round(one["accuracy"] + 0.05, 4)} for one in lines]
                write(out / path, partition, seed, change(lines), cap)
    runs["runs/other/seed=0"] = {"run": "noise", "seed": 0, "baseline": None}  # of no curve
    (out / "sweep.json").write_text(json.dumps({"runs": runs}))
    return curves


def write(folder: Path, partition: str, seed: int, lines: list[dict], cap: float | None = None):
    folder.mkdir(parents=True)
    own = {
        "dataset": "mnist",
        "model": "lenet5",
        "partition": partition,
        "num_clients": 6,
        "validation_size": 60,
        "seed": seed,
    }
    summary = {
        "cap": cap, "shared_accuracy_max_test": cap and cap - 0.05, "rounds_over_cap_test": seed,
        "infeasible_rounds": 2, "failed": None, "owner_accuracy_final": 0.5,
        "copy_bytes": 2000.0 + 1000 * seed, "calibration_ratio": cap and 0.25,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"options": own}))
    (folder / "summary.json").write_text(json.dumps(summary))
    text = "".join(json.dumps(one, allow_nan=False) + "\n" for one in lines)
    (folder / "thieves.jsonl").write_text(text)


STRENGTHS = {"pair": "cap"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("frontier")
    curves = folder_of(folder)
    return folder, reported.write(folder, curves, STRENGTHS)


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


def test_where_one_run_of_several_broke_the_picture_shows_the_others(made):
    frame = pd.DataFrame(made[1])
    broke = (frame["seed"] == 0) & (frame["scheme"] == "pair")
    best = reported.best_thieves(
        frame.assign(owner=frame["owner"].mask(broke), failed=frame["failed"] | broke)
    )
    ours = best[best["scheme"] == "pair"]
    assert ours["owner"].isna().all()
    assert ours["owner_of_rest"].notna().all()
    lines = reported.pictures(best)["frontier-6.png"].axes[0].get_lines()
    (hollow,) = [x for x in lines if x.get_markerfacecolor() == "white"]
    assert len(np.asarray(hollow.get_xydata())) == 2


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


def large(pictures) -> set[str]:
    """Names of those of owner against thief; beside each there is one of shares."""
    found = {name for name in pictures if name.startswith("frontier-")}
    assert set(pictures) - found == {name.replace("frontier-", "shares-") for name in found}
    return found


def test_the_picture_of_shares_says_what_the_table_says(made):
    """λ and its interval of the middle strength; undefined ones have no point, and say why."""
    best = reported.best_thieves(pd.DataFrame(made[1]))
    figure = shares.picture(best, "of what it is")
    assert [one.get_title().split(":")[0] for one in figure.axes] == ["iid", "shards"]
    for axes in figure.axes:
        partition = axes.get_title().split(":")[0]
        strength = 0.8  # the larger of two
        middle = best[(best["strength"] == strength) & (best["partition"] == partition)]
        wanted = middle[middle["view"].isin(["V1", "V3"]) & middle["lambda"].notna()]
        points = [line for line in axes.get_lines() if line.get_marker() in ("o", "s")]
        shown = [np.asarray(line.get_xdata(), float)[0] for line in points]
        np.testing.assert_allclose(sorted(shown), np.clip(sorted(wanted["lambda"]), -0.3, 1.3))
        assert f"owner {100 * middle['owner'].iloc[0]:.1f}" in axes.get_yticklabels()[0].get_text()
    gone = best.assign(**{"lambda": np.nan})
    for failed, why in ((0, "nothing to steal: owner not above scratch"), (1, "a run broke down")):
        for axes in shares.picture(gone.assign(failed=failed), "").axes:
            assert [text.get_text() for text in axes.texts] == [why]
            assert not [line for line in axes.get_lines() if line.get_marker() in ("o", "s")]


@pytest.mark.parametrize("partitions", [1, 2, 3])
def test_the_legend_of_shares_fits(made, partitions):
    """All views in it, over few panels as well."""
    best = reported.best_thieves(pd.DataFrame(made[1]))
    one = best[best["partition"] == "iid"]
    every = pd.concat([one.assign(view=view) for view in ("V1", "V2", "V3", "V4")])
    wide = pd.concat([every.assign(partition=f"number {n}") for n in range(partitions)])
    figure = shares.picture(wide, "")
    figure.draw_without_rendering()
    [legend] = figure.legends
    assert len(legend.get_texts()) == 5
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_text_and_pictures_say_the_same_of_fedavg(made):
    """That of the curve with the most seeds, where another one has fewer."""
    best = reported.best_thieves(pd.DataFrame(made[1]))
    fewer = best["scheme"] != "pair"
    best.loc[fewer, ["scheme", "seeds", "fedavg"]] = ["of one seed", 1, 0.5]
    iid = next(one for one in reported.settings(pd.DataFrame(made[1]), best) if "iid" in one.name)
    drawn = reported.pictures(best)["frontier-6.png"].axes[0].get_lines()
    assert "FedAvg 95.0;" in iid.controls
    assert shares.picture(best, "").axes[0].get_title() == "iid: FedAvg 95.0"
    assert 0.95 in [np.asarray(line.get_ydata(), float)[0] for line in drawn]
    assert 0.5 not in [np.asarray(line.get_ydata(), float)[0] for line in drawn]


def test_pictures_have_a_panel_for_each_partition_and_view(made):
    folder, found = made
    content = (folder / "frontier-6.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    pictures = reported.pictures(reported.best_thieves(pd.DataFrame(found)))
    assert set(pictures) == {"frontier-6.png", "shares-6.png"}
    axes = pictures["frontier-6.png"].axes
    assert len(axes) == 2 * 2
    assert [one.get_title().split(":")[0] for one in axes[:2]] == ["V1", "V3"]
    curves = {}
    for one, partition, view in zip(axes, ("iid", "iid", "shards", "shards"), "1313", strict=True):
        drawn = [np.asarray(x.get_xydata()) for x in one.get_lines() if x.get_marker() == "o"]
        [points] = drawn
        curves[partition, view] = points
    np.testing.assert_allclose(curves["iid", "1"], [[0.775, 0.905], [0.825, 0.955]])
    np.testing.assert_allclose(curves["shards", "3"], [[0.745, 0.805], [0.795, 0.855]])


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"num_clients": 20}, {"frontier-6.png", "frontier-20.png"}),
        ({"server_images": 9}, {"frontier-6-60.png", "frontier-6-9.png"}),
    ],
)
def test_each_population_and_each_split_of_the_server_has_a_picture(made, changes, wanted):
    frame = pd.DataFrame(made[1])
    both = pd.concat([frame, frame.assign(**changes)])
    best = reported.best_thieves(both)
    assert large(reported.pictures(best)) == wanted
    assert reported.markdown(both, best).count("\n## ") == 4


def test_a_folder_of_something_else_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^out=.*holds no sweep"):
        reported.write(tmp_path, {}, STRENGTHS)
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": {}}))
    with pytest.raises(ValueError, match=r"^out=.*holds no run with thieves"):
        reported.write(tmp_path, {}, STRENGTHS)


def test_several_models_are_told_apart(made):
    """A picture and a heading each; the name of what is one alone is left out."""
    frame = pd.DataFrame(made[1])
    both = pd.concat([frame, frame.assign(model="vit", owner=frame["owner"] - 0.1)])
    best = reported.best_thieves(both)
    assert large(reported.pictures(best)) == {"frontier-lenet5-6.png", "frontier-vit-6.png"}
    assert large(reported.pictures(reported.best_thieves(frame))) == {"frontier-6.png"}
    text = reported.markdown(both, best)
    for model in ("lenet5", "vit"):
        assert text.count(f"## mnist, {model}, iid, K = 6") == 1
