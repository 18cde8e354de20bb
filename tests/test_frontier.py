"""The frontier's command line: its sweep as it is planned, what it refuses, and one run of all of
it that is killed in between."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import small_runs
from small_runs import LIMIT, ROOT, Processes, wait

from experiments import frontier
from experiments.frontier import CURVES, PARTITIONS, chosen, names, options, points
from experiments.sweep.plan import plan
from noisefl import measure


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    """Of the driver."""
    keep = ("--dataset", "--model", "--clients_per_round", "--compilation")
    return [
        "--server_images=60",
        *(flag for flag in small_runs.flags(tmp_path_factory) if flag.startswith(keep)),
    ]


def planned(*args: str) -> tuple[Any, Any]:
    given, rest = options(["frontier", *args])
    assert given is not None
    return given, points(given, rest)


@pytest.mark.parametrize("name", CURVES)
def test_every_curve_is_planned_at_every_strength(name, tiny):
    """Beside the FedAvg run that it shares with others of the same seed and partition."""
    given, command = planned(f"--schemes={name}", "--clients=6,8", "--seeds=4", "--rounds=3", *tiny)
    curve, runs = CURVES[name], plan(command)
    strengths = [float(x) for x in curve.values] if curve.strength else [None]
    protected = [run for run in runs if run.kind == "noise"]
    assert len(protected) == len(strengths) * len(PARTITIONS) * 2
    assert len(runs) - len(protected) == len(PARTITIONS) * 2
    seen = {}
    for run in protected:
        flags = {**run.flags, "noise_layers": run.flags.get("noise_layers")}
        assert flags["scheme"].split("+")[-1] == curve.flags["scheme"]
        for flag, text in curve.flags.items():
            if flag != "scheme":
                assert str(flags[flag]) in (text, f"{float(text) if text.isdigit() else text}")
        if name in (
            "withheld",
            "own-classes",
        ):  # a bare head gives the last away
            assert run.setup.experiment.scheme.warmup_rounds == 0  # pyright: ignore
        strength = flags[curve.strength] if curve.strength else None
        seen.setdefault((flags["partition"], flags["num_clients"], flags["seed"]), []).append(
            strength
        )
        thieves: Any = run.setup.measures.thieves  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(thieves, measure.Thieves)
        assert (thieves.until, thieves.kept, thieves.sizes) == (3, 8, (2, 5, 10))
        assert names(command)[run.path] == (name, strength)
    assert set(seen) == {(p, k, 4) for p in PARTITIONS for k in (6, 8)}
    assert all(one == strengths for one in seen.values())
    assert given["strength_names"] == {name: curve.strength}
    assert set(names(command)) == {run.path for run in protected}


def test_all_curves_together_are_told_apart(tiny):
    given, command = planned("--clients=6", "--seeds=0", "--partitions=iid", "--rounds=3", *tiny)
    runs, found = plan(command), names(command)
    values = [(name, float(x) if c.strength else None) for name, c in CURVES.items()
              for x in (c.values if c.strength else ("",))]  # fmt: skip
    assert sorted(found.values(), key=str) == sorted(values, key=str)
    assert len(runs) == len(values) + sum(run.kind == "fedavg" for run in runs)
    assert len({run.path for run in runs}) == len(runs)
    assert given["strength_names"] == {name: curve.strength for name, curve in CURVES.items()}


def test_models_and_data_sets_are_repeated_for(tiny):
    """Where they are named; else they are the driver's own flags."""
    rest = [flag for flag in tiny if not flag.startswith("--model")]
    few = "--schemes=pair", "--strengths=1", "--clients=6", "--seeds=0", "--rounds=3"
    _, command = planned(*few, "--models=mlp,vit", *rest)
    runs = plan(command)
    found = [(run.flags["model"], run.flags["partition"], run.kind) for run in runs]
    assert sorted(found) == sorted(
        (m, p, k) for m in ("mlp", "vit") for p in PARTITIONS for k in ("noise", "fedavg")
    )
    with pytest.raises(ValueError, match=r"^models='mlp': say that, or --model=vit$"):
        planned(*few, "--models=mlp", "--model=vit", *rest)
    with pytest.raises(ValueError, match=r"'mpl' must be one of .*did you mean mlp"):
        planned(*few, "--models=mpl", *rest)


def test_quick_is_small_and_what_is_given_counts(tiny):
    given, command = planned("--quick", *tiny)
    assert set(given["schemes"]) <= set(CURVES)
    assert len(plan(command)) == 2 * (3 + 1)
    assert command.out == "results/frontier-quick"
    given, command = planned("--quick", "--partitions=iid", "--out=here", "--every=2", *tiny)
    assert (given["partitions"], command.out, len(plan(command))) == (["iid"], "here", 4)
    assert all(run.setup.measures.every == 2 for run in plan(command))  # pyright: ignore


@pytest.mark.parametrize(
    ("values", "number", "wanted"),
    [
        (("0.8", "0.6", "0.4"), 1, ("0.6",)),  # the one in the middle
        (("0.8", "0.6", "0.4"), 2, ("0.8", "0.6")),
        (("0.8", "0.6", "0.4"), 3, ("0.8", "0.6", "0.4")),
        (("1", "2"), 1, ("1",)),
        (("1", "2"), 3, ("1", "2")),
    ],
)
def test_strengths_of_a_curve(values, number, wanted):
    assert chosen(frontier.Curve({}, "cap", values), number) == wanted
    assert chosen(frontier.Curve({}, ""), number) == ("",)


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--schemes=pear"], ["schemes='pear'", "did you mean pair?"]),
        (["--schemes=pair,two_way"], ["schemes='two_way'", "two-way"]),
        (["--partitions=idd"], ["partitions='idd'", "did you mean iid?"]),
        (["--strengths=4"], ["strengths=4", "must be 1 to 3"]),
        (["--strengths=0"], ["strengths=0", "must be 1 to 3"]),
        (["--strengths=few"], ["strengths='few': must be a whole number"]),
        (["--rounds=1.5"], ["rounds='1.5': must be a whole number"]),
        (["--json=/no/such/folder.json"], ["json='/no/such/folder.json': cannot be written"]),
        (["--clients=some"], ["num_clients=some", "a whole number"]),
        (["--seeds=0,x"], ["seed=0,x", "a whole number"]),
        (["--seeds=0,0"], ["seed=0,0", "repeats a value"]),
        (["--seeds=3:1"], ["seed=3:1", "an empty range"]),
        (["--schemes="], ["schemes=''", "at least one"]),
        (["--seeds="], ["seeds=''", "at least one"]),
        (["--server_images=0"], ["validation_size=0"]),
        (["--rounds=0"], ["rounds=0", "at least 1"]),
        (["--attacks=bare_copi"], ["attacks='bare_copi'", "did you mean bare_copy?"]),
        (["--coalitions=2,5"], ["coalitions='2,5'", "joined by +"]),
        (["--capp=0.5"], ["--capp is no flag", "did you mean --cap?"]),
        (["--server_image=1"], ["--server_image is no flag", "did you mean --server_images?"]),
        (["--copies=0"], ["kept_copies=0"]),
    ],
)
def test_bad_input_is_one_clear_line(args, wanted, capsys):
    assert frontier.main(["frontier", "--quick", *args]) == 2
    printed, err = capsys.readouterr()
    assert printed == ""
    (line,) = err.splitlines()
    assert line.startswith("experiments.frontier: ")
    for words in wanted:
        assert words in line


def test_merging_runs_nothing(tmp_path, capsys):
    out = f"--out={tmp_path / 'out'}"
    assert frontier.main(["frontier", "--merge=no.csv", out]) == 2
    assert "merge='no.csv': cannot be read" in capsys.readouterr().err
    assert frontier.main(["frontier", "--merge=no.csv", "--cpu_devices=2", out]) == 2
    assert "runs nothing: --cpu_devices=2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "frontier.csv").write_text("kept")
    here = f"{tmp_path}/frontier.csv"
    assert frontier.main(["frontier", f"--merge={here}", f"--out={tmp_path}"]) == 2
    assert "must not be where" in capsys.readouterr().err
    assert (tmp_path / "frontier.csv").read_text() == "kept"
    file, json_file = ROOT / "docs" / "frontier" / "pair.csv", tmp_path / "rows.json"
    assert frontier.main(["frontier", f"--merge={file}", f"--json={json_file}", out]) == 0
    assert {one.name for one in (tmp_path / "out").iterdir()} == {
        *(f"frontier.{end}" for end in ("csv", "parquet", "md")), "frontier-100.png",
        "shares-100.png",
    }  # fmt: skip
    rows = json.loads(json_file.read_text())
    with file.open() as lines:
        assert len(rows) == sum(1 for _ in lines) - 1


def test_help_is_a_page(capsys):
    assert frontier.main(["frontier", "--help"]) == 0
    page = capsys.readouterr().out
    for name in frontier.FULL:
        assert f"--{name}" in page
        assert frontier.HELP[name].split(";")[0] in " ".join(page.split())


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_with_the_same_frontier(tiny, tmp_path):
    args = [
        "--schemes=pair,two-way", "--partitions=iid", "--clients=6", "--seeds=0", "--rounds=2",
        "--coalitions=2", "--singles=1", "--copies=2", "--strengths=1", "--thief_images=50",
        "--attacks=bare_copy+scratch+fine_tune+average", "--checkpoint_every=1", "--max_tries=9",
        "--calibrator=geometric", "--cpu_devices=1", *tiny,
    ]  # fmt: skip
    whole, out, json_file = tmp_path / "whole", tmp_path / "out", tmp_path / "rows.json"
    args.append(f"--json={json_file}")
    with Processes() as processes:

        def ends(out: Path) -> None:
            code, err = processes.run(*args, f"--out={out}", module="experiments.frontier")
            assert code == 0, err

        ends(whole)
        wanted = (whole / "frontier.csv").read_bytes()
        process = processes.start(*args, f"--out={out}", module="experiments.frontier")
        assert wait(lambda: list(out.glob("runs/*/*/summary.json")), process)
        process.send_signal(signal.SIGKILL)
        assert process.wait(LIMIT) == -signal.SIGKILL
        assert not (out / "frontier.csv").exists()
        ends(out)
        assert (out / "frontier.csv").read_bytes() == wanted
        ends(out)  # nothing is left to do but to read
    assert (out / "frontier.csv").read_bytes() == wanted
    assert (out / "frontier.md").read_text() == (whole / "frontier.md").read_text()
    found = json.loads(json_file.read_text())
    assert {row["scheme"] for row in found} == {"pair", "two-way", "none"}
    tried = {(row["scheme"], row["thief"], row["view"]) for row in found}
    for scheme in ("pair", "two-way"):
        for one in (("bare_copy", "V1"), ("fine_tune", "V1"), ("average", "V2"), ("average", "V3")):
            assert (scheme, *one) in tried
    for row in found:
        assert row["scratch"] is not None
        assert row["server_alone"] is not None
        assert 0 <= row["thief_accuracy"] <= row["thief_accuracy_best"] <= 1
        assert (row["num_clients"], row["partition"], row["seed"]) == (6, "iid", 0)
        assert row["lambda"] is None or math.isfinite(row["lambda"])
