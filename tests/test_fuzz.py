"""Wrong flags, files and arguments by the hundred: `fuzz` says what must hold of each."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fuzz
import fuzz_files
import fuzz_flags
import fuzz_parts
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from federation import assert_same
from fuzz import Begun, assert_unharmed, cases, files, said, taken, thrifty
from hypothesis import given
from hypothesis import strategies as st
from sweep_folder import FakeSweep, fedavg_row, noise_row, single_run, summary
from test_frontier_report import STRENGTHS, folder_of

import noisefl
from experiments import frontier, plot, run
from experiments.report import __main__ as report
from experiments.report import frontier as frontiers
from experiments.report.figure1 import blank
from experiments.sweep import execute, options
from experiments.sweep.plan import batch_name
from experiments.sweep.store import Store
from experiments.sweep.summary import summarise
from noisefl import keys, local, mesh, owner, parts
from noisefl.data import Dataset
from noisefl.errors import refuse
from noisefl.record import Checkpoints


@pytest.fixture(scope="module", autouse=True)
def table(request) -> Iterator[None]:
    """After a full run, what became of it."""
    jax.devices()  # before a driver can split the CPU for the other tests of this process
    yield
    if fuzz.CASES:
        plugins = request.config.pluginmanager
        with plugins.getplugin("capturemanager").global_and_fixture_disabled():
            for line in ["", *fuzz.table()]:
                plugins.getplugin("terminalreporter").write_line(line)


# Of readers that orbax leaves behind, whenever they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def begun(*_: Any) -> Any:
    raise Begun


def looked_through(sweep: execute.Sweep, number: int, lanes: Any) -> int:
    """In place of running a group: what an earlier start has left of it."""
    left = {run.path for run in lanes.group.runs} - sweep.done
    for name, batch in execute.begun(sweep, lanes.group.runs, left):
        description = {"runs": [run.path for run in batch.runs], "provenance": sweep.provenance}
        sweep.store.begin(name, description, True)
    raise Begun


@pytest.fixture(scope="module")
def drivers() -> Iterator[None]:
    """They end where rounds would begin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options.Driver, "start_devices", lambda self: None)
        patch.setattr("experiments.sweep.provenance.git_revision", lambda: None)
        patch.setattr(run, "prepare", lambda group, driver, on: SimpleNamespace(group=group))
        patch.setattr(run, "run_group", looked_through)
        patch.setattr("experiments.sweep.estimate.estimate", begun)
        yield


def stood_in(main: Any, program: str, args: list[str], flag_files: dict[str, str]) -> None:
    """A command line in a folder with all kinds of things in it, of which none is harmed."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        here = fuzz_flags.lay_out(Path(folder), flag_files)
        patch.chdir(here)
        patch.syspath_prepend(here)
        before, kind = files(Path(folder)), f"{program.removeprefix('experiments.')}: flags"
        said(program, main, args, kind)
        assert_unharmed(kind, before, files(Path(folder)))


@cases(0.2, 10)
@given(fuzz_flags.command_lines())
def test_any_command_line_is_taken_or_refused(drivers, given):
    stood_in(run.main, "experiments.run", *given)


@cases(0.07, 4)
@given(fuzz_flags.frontier_lines())
def test_any_command_line_of_the_frontier_is_taken_or_refused(drivers, args):
    stood_in(frontier.main, "experiments.frontier", args, {})


@cases(0.03, 3)
@given(fuzz_flags.folder_lines("tensorboard"))
def test_any_command_line_of_the_report_is_taken_or_refused(args):
    stood_in(report.main, "experiments.report", args, {})


@cases(0.03, 3)
@given(fuzz_flags.folder_lines("out"))
def test_any_command_line_of_the_plot_is_taken_or_refused(args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "draw", lambda panels: blank(1, 1, 20))  # what is drawn is no matter
        stood_in(plot.main, "experiments.plot", args, {})


# Data files


def assert_holds(found: Dataset, arrays: Sequence[np.ndarray]) -> None:
    """The images and labels of x_train, y_train, x_test, y_test, and no others."""
    splits = (found.train_images, found.train_labels), (found.test_images, found.test_labels)
    for (images, labels), (x, y) in zip(splits, (arrays[:2], arrays[2:4]), strict=True):
        assert (images.dtype, labels.dtype, images.ndim) == (np.uint8, np.int32, 4)
        ours = sorted(
            (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
        )
        theirs = ((image.tobytes(), int(label)) for image, label in zip(x, y.ravel(), strict=True))
        assert ours == sorted(theirs)
        assert images.shape[1:] == (x.shape[1:] if x.ndim == 4 else (*x.shape[1:], 1))
    assert found.num_classes == 1 + max(int(arrays[1].max()), int(arrays[3].max()))


def loaded(kind: str, folder: Path, name: Any, *others: Any) -> Dataset | None:
    before = files(folder)
    with thrifty():
        found = taken(kind, lambda: noisefl.load(name, *others))
    assert_unharmed(kind, before, files(folder))
    return found


@cases(0.1, 6)
@given(fuzz_files.npz_files())
def test_any_npz_file_is_loaded_right_or_refused(given):
    made, arrays = given
    with tempfile.TemporaryDirectory() as folder:
        fuzz_files.lay_out(Path(folder), {"x.npz": made, "beside.npz": b"kept"})
        found = loaded("data: npz", Path(folder), f"{folder}/x.npz")
        if found is not None:
            stored, ends = arrays or np.load(f"{folder}/x.npz"), "" if arrays else ".npy"
            assert_holds(found, [stored[name + ends] for name in fuzz_files.NAMES])


@cases(0.1, 6)
@given(fuzz_files.idx_folders())
def test_any_folder_of_idx_files_is_loaded_right_or_refused(given):
    made, zipped = given
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder) / "digits"
        fuzz_files.lay_out(here, made)
        found = loaded("data: idx", Path(folder), str(here))
        if found is not None:
            arrays = [
                fuzz_files.described(here / name) for name in sorted(made, key=list(made).index)
            ]
            assert_holds(found, list(fuzz_files.SOUND.values()) if zipped else arrays)


@cases(0.05, 3)
@given(fuzz_files.names, st.booleans().flatmap(lambda x: fuzz_files.names if x else st.none()))
def test_any_name_of_a_data_set_is_loaded_or_refused(name, data_dir):
    def offline(name: str, url: str, remedy: str) -> None:
        raise refuse("dataset", name, "no network here")

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        here = fuzz_flags.lay_out(Path(folder), {})
        patch.chdir(here)
        patch.setattr("noisefl.data.tfds._require_network", offline)
        loaded("data: names", Path(folder), name, data_dir)


# Folders of results


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> dict[str, fuzz_files.Held]:
    """A sweep and a single run, as `experiments.report` reads them."""
    folder = tmp_path_factory.mktemp("reported")
    owner = summary(0.8, baseline_accuracy_final=0.9, baseline_failed=None)
    rows = [
        fedavg_row(1, 0.9),
        fedavg_row(2, 0.91),
        noise_row(1, 0.8, 0.3, 0.4),
        noise_row(2, 0.8, None, None),
    ]
    single_run(folder / "run", rows, owner)
    sweep = FakeSweep(folder / "sweep", {"cap": [0.4, 0.6], "seed": [0, 1]})
    for seed in (0, 1):
        base = sweep.run("f", seed, {}, summary(0.9), rows[:2])
        for cap in (0.4, 0.6):
            sweep.run(f"n{cap}", seed, {"cap": cap}, summary(0.8), rows[2:], base, cap)
    return {name: fuzz_files.held(folder / name) for name in ("run", "sweep")}


@cases(0.04, 3)
@given(st.data())
def test_any_folder_is_reported_or_refused(reported, data):
    sound = reported[data.draw(st.sampled_from(["run", "sweep", "sweep"]))]
    made = data.draw(fuzz_files.damaged(sound, lambda name: True))
    unharmed_in(
        "experiments.report", report.main, ["out"], {f"out/{n}": x for n, x in made.items()}
    )


@cases(0.03, 3)
@given(st.data())
def test_any_folder_is_drawn_or_refused(reported, data):
    made = data.draw(fuzz_files.damaged(reported["run"], lambda name: True))
    unharmed_in("experiments.plot", plot.main, ["out"], {f"out/{n}": x for n, x in made.items()})


def unharmed_in(
    program: str, main: Any, args: list[str], made: fuzz_files.Made, own: tuple[str, ...] = ()
) -> None:
    """A command line in a folder, of whose files none is harmed; where it is taken, but for its
    own."""
    kind = f"{program.removeprefix('experiments.')}: folders"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        fuzz_files.lay_out(Path(folder), {**made, "beside": b"kept"})
        patch.chdir(folder)
        before = files(Path(folder))
        found = said(program, main, args, kind)
        after = files(Path(folder))
        if found.code:
            assert set(after) == set(before)
        elif found.code is None:
            before = {name: held for name, held in before.items() if not name.startswith(own)}
        assert_unharmed(kind, before, after)


RESUMED = {
    "single": ["--rounds=4"],
    "sweep": ["--rounds=4", "--grid=seed=0:2", "--grid=cap=0.3,0.5", "--thieves=none"],
}
STOLEN = [
    {"run": "noise", "thief": name, "view": view, "members": members, "which": 0, "copies": 1,
     "images": 60, "accuracy": 0.5, "accuracy_best": 0.6, "fidelity": 0.7}
    for name, view, members in (
        ("bare_copy", "V1", 1), ("average", "V3", 2), ("scratch", "", 1), ("server_alone", "", 1)
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def begun_folders(drivers, tmp_path_factory) -> dict[str, tuple[list[str], fuzz_files.Held]]:
    """What the driver left of some command lines: a run that is done or under way, a sweep of which
    two runs are not done."""
    found = {}
    for name, left in (("single", 0), ("single", 1), ("sweep", 2)):
        command = options.parse(["run", *RESUMED[name]])
        assert command is not None
        runs, on = run.planned(command)
        here = run.provenance(on)
        folder = tmp_path_factory.mktemp(name)
        with Store(folder, command.single) as store:
            store.claim(description := run.describe(command, runs, here))
            if left:
                batch = {
                    "runs": [one.path for one in runs[-left:]],
                    "lanes": 2,
                    "rounds_per_chunk": 1,
                }
                store.batch(batch_name(runs[-left:])).mkdir(parents=True)
                store.begin(batch_name(runs[-left:]), {**batch, "provenance": here}, False)
                (store.batch(batch_name(runs[-left:])) / "2").mkdir()
                (store.batch(batch_name(runs[-left:])) / "2" / "state").write_bytes(bytes(9))
            for one in runs[len(runs) - 1 if command.single else 0 : len(runs) - left]:
                more = {
                    "local_accuracy_mean": 0.4,
                    "shared_validation_accuracy": 0.2,
                    "copy_bytes": 9.0,
                }
                rows = [noise_row(t, 0.8, 0.3, 0.4, run=one.kind, **more) for t in (1, 2, 3, 4)]
                if command.single:
                    rows = [{**row, "run": "fedavg"} for row in rows] + rows
                stolen = STOLEN if command.single else []
                done = summarise(rows, one.cap, 10, 4, stolen)
                store.finish(one.path, description, rows, {"seconds": 1}, done, None, stolen)
        found[f"{name}, {left} left"] = RESUMED[name], fuzz_files.held(folder)
    return found


@cases(0.08, 5)
@given(st.data())
def test_any_folder_is_resumed_or_refused(begun_folders, data):
    """Whoever goes on leaves alone what the files of a run and of others say."""
    args, sound = begun_folders[data.draw(st.sampled_from(list(begun_folders)))]
    made = data.draw(fuzz_files.damaged(sound, lambda name: True))
    changing = (
        "out/config.json",
        "out/sweep.json",
        "out/summary.json",
        "out/batches",
        "out/checkpoints",
    )
    unharmed_in(
        "experiments.run",
        run.main,
        [*args, "--out=out"],
        {f"out/{n}": x for n, x in made.items()},
        changing,
    )


def states(t: int) -> Any:
    """Of two lanes, large enough that one leaf has a file of its own."""
    kernel = jax.random.normal(jax.random.key(t), (2, 40, 50))
    tree = {"round": jnp.full(2, t), "base": {"kernel": kernel}}
    return mesh.put(tree, mesh.over_lanes(mesh.make(devices=jax.devices()[:1])))


def columns(t: int) -> dict[str, jax.Array]:
    return {"round": jnp.ones((2, t), jnp.int32), "finite": jnp.ones((2, t), bool)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> fuzz_files.Held:
    """The files of two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        for t in (2, 4):
            checkpoints.save(t, states(t), columns(t))
    return fuzz_files.held(folder)


@cases(0.03, 3)
@given(st.data())
def test_any_checkpoint_is_restored_to_the_bit_or_refused(saved, data):
    made = data.draw(fuzz_files.damaged(saved, lambda name: name[0] == "4"))
    with tempfile.TemporaryDirectory() as folder:
        fuzz_files.lay_out(Path(folder), made)

        def restored() -> tuple[int, Any]:
            with Checkpoints(Path(folder)) as checkpoints:
                return checkpoints.round, checkpoints.restore(states(0))

        before = files(Path(folder))
        found = taken("checkpoints", restored)
        assert_unharmed("checkpoints", before, files(Path(folder)))
    if found is not None:
        t, read = found
        assert_same(read, (states(t), columns(t)))


# Arguments


@cases(0.12, 8)
@given(fuzz_parts.fields())
def test_any_field_of_any_part_is_held_as_it_was_given_or_refused(given):
    cls, values = given
    made = taken("parts", lambda: cls(**values))
    if made is None:
        return
    for name, spec in parts.specs(cls).items():
        if name in values and (cls, name) != (local.Training, "optimizer"):
            held = getattr(made, name)
            if (cls, name) == (owner.ServerClients, "server_clients"):
                assert held == str(values[name]).strip()
            assert fuzz_parts.is_right(cls, name, spec, values[name], held), name
    jax.tree.unflatten(jax.tree.structure(made), jax.tree.leaves(made))


@cases(0.1, 8)
@given(fuzz_parts.calls())
def test_any_call_returns_what_it_should_or_refuses(given):
    name, values = given
    function, _, is_right = fuzz_parts.FUNCTIONS[name]
    found = taken("functions", lambda: function(**values))
    assert found is None or is_right(found, values)


@cases(0.03, 5)
@given(st.sampled_from([*fuzz_parts.UNFIT, *fuzz_parts.FIT]), st.sampled_from(fuzz_parts.AROUND))
def test_any_model_begins_or_is_refused(model, changes):
    made = fuzz_parts.experiment(model, **changes)
    state = taken("models", lambda: noisefl.init(keys.root(0), made, fuzz_parts.FEDERATION))
    assert (state is not None) == any(model is one for one in fuzz_parts.FIT)
    if state is not None:
        assert_same(state.base, state.owner)
        logits = jax.eval_shape(made.functions.apply, state.base, jnp.zeros((5, 4, 4, 1)))
        assert logits.shape[0] == 5
        assert logits.shape[1] >= 3


@pytest.fixture(scope="module")
def stolen(tmp_path_factory) -> tuple[dict[str, Any], fuzz_files.Held, bytes]:
    """The curves of a sweep with thieves, its folder, and its frontier.csv."""
    folder = tmp_path_factory.mktemp("stolen")
    curves = folder_of(folder)
    csv = pd.DataFrame(frontiers.rows(folder, curves, STRENGTHS)).to_csv(index=False)
    return curves, fuzz_files.held(folder), csv.encode()


@cases(0.03, 3)
@given(st.data())
def test_any_folder_has_a_frontier_or_is_refused(stolen, data):
    curves, sound, csv = stolen
    made = data.draw(fuzz_files.damaged(sound, lambda name: True))
    merged = data.draw(fuzz_files.changes)(csv)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        fuzz_files.lay_out(here, {**made, "frontier.csv": merged})
        before = files(here)

        def best(rows: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: len(frontiers.best_thieves(pd.DataFrame(rows())))

        of_folder = taken(
            "frontier: folders", best(lambda: frontiers.rows(here, curves, STRENGTHS))
        )
        of_csv = taken(
            "frontier: merged", best(lambda: frontiers.merged([str(here / "frontier.csv")]))
        )
        assert of_folder != 0
        assert of_csv != 0
        assert_unharmed("frontier: folders", before, files(here))
