"""The frontier's pictures, from a folder made by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from frontier_folder import STRENGTHS, folder_of

from experiments.report import frontier as reported
from experiments.report import shares


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("frontier")
    return folder, reported.write(folder, folder_of(folder), STRENGTHS)


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
