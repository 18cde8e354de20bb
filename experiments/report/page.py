"""report.html and frontier.html: what the other files say, on one page with the pictures in it."""

import datetime
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.report import frontier, markup, owners, table
from experiments.report.markup import Html
from experiments.report.results import Frame, Row, Sweep, last_part, shown
from experiments.sweep.provenance import git_revision
from noisefl.errors import refuse

SWEEP_COLUMNS = {  # of report.md, after the grid's flags
    "cap": "The accuracy that no copy handed out to clients is to exceed.",
    "owner": "Owner O: the accuracy of the model that the server keeps, after the last round.",
    "FedAvg − owner, points": "What protection costs: the accuracy of the same training without "
    "it, less the owner's.",
    "highest shared": "The best copy that was handed out in any protected round of a run; the mean "
    "over seeds.",
    "highest of all seeds": "The same; the highest instead of the mean.",
    "rounds over cap": "Protected rounds of a run whose copy was above the cap on test; the mean "
    "over seeds.",
    "infeasible rounds": "Rounds of a run for which calibration does not vouch: it found no noise "
    "that holds the cap; the mean over seeds.",
    "images a round": "Images that calibration put through a model, in a protected round.",
    "seeds": "Runs that are complete, those that broke down among them.",
}
FRONTIER_COLUMNS = {  # of frontier.md
    "scheme": "What is done to the copies that clients get; none is FedAvg, which hands out the "
    "model itself. In brackets: its seeds, where others have more.",
    "strength": "The value of the flag along which a scheme goes from weak to strong",
    "cap": "A strength: the accuracy that no copy handed out to clients is to exceed. What a thief "
    "makes of a copy may.",
    "O": "The owner: the model that the server keeps.",
    "copy": "A copy as a client gets it, before a thief does anything to it.",
    "kB a copy": "What is sent to a client for it, in 1,000 bytes.",
    "calibration / training": "Images that calibration put through a model, for each image that "
    "clients trained on.",
    "S": "Scratch: the thief, or its coalition, trains on its own images without any copy.",
    "T": "The best thief: what the best attack makes of the copies in view, with the thief's own "
    "images; its name is in brackets.",
    "λ": "λ = (T − S) / (O − S), the share of the owner that is stolen: 0 is nothing, 1 is all of "
    "it, less than 0 worse than without the copy. In square brackets: its 95 % interval.",
    "thief": "An attack, in the smallest view that it needs.",
    "view": "What a thief has seen, V1 to V5, and of coalitions how many clients pool it.",
    **{view: f"{seen.format('several')}." for view, seen in owners.SEEN.items()},
    "FedAvg": "The owner of the same training without protection.",
    "the server alone": "A model trained on nothing but the server's own images: federated "
    "learning is worth what it is above that.",
}
DRAWN = {  # what a picture of a sweep shows, and how it is read
    "figure1.png": (
        "Test accuracy against the round: the owner, FedAvg, the highest copy handed out, the cap.",
        "Accuracies by round. A scheme does well where the owner is close to FedAvg and the copies "
        "stay below the cap.",
    ),
    "owner_against_cap.png": (
        "The owner's last test accuracy against the cap, a line for each combination of the other "
        "flags, FedAvg dashed.",
        "What each cap costs the owner.",
    ),
    "cost_against_violations.png": (
        "Images forwarded by calibration in a protected round against the share of rounds over the "
        "cap, a mark for each calibrator.",
        "What a calibrator costs and how often it fails: left and below is better.",
    ),
}
RECORDED = {  # of a run, by its name in config.json, sweep.json and batch.json
    "git_revision": "git revision", "device": "devices", "platform": "platform",
    "python": "Python", "versions": "versions", "resumed": "went on later under",
}  # fmt: skip
WRITERS = ("pandas", "scipy", "matplotlib")  # on which the page's own figures depend


def of_sweep(sweep: Sweep, found: Frame, command: str) -> str:
    """report.html.

    Args:
      sweep: whose pictures are drawn.
      found: `table.statistics` of it.
      command: the command line that asks for the page.

    Raises:
      ValueError: a file of the pictures' names is no PNG, or a record of runs is not one of ours.
    """
    folder = sweep.folder
    pictures = [
        _picture(folder / name, *words) for name, words in DRAWN.items() if (folder / name).exists()
    ]
    headings, lines = table.cells(sweep, found)
    sections: list[tuple[str, Sequence[Html]]] = [("Pictures", pictures)] if pictures else []
    if lines:
        flags = {  # some are called as columns are
            f"--{flag}": f"A flag of the driver: {', '.join(map(shown, sweep.grid[flag]))}."
            for flag in sweep.flags
            if last_part(flag) != "cap"
        }
        sheet = markup.sheet("A line for each configuration", [headings, *lines])
        sections += [
            ("Table", [markup.paragraph(table.NOTE), sheet]),
            ("What the columns mean", [markup.terms(flags | SWEEP_COLUMNS)]),
        ]
    if failed := table.failures(sweep):
        sections.append(("Failed runs", [markup.items(failed)]))
    sections.append(("Where this comes from", [*_written(), *_origin(folder)]))
    lead = [markup.typed(command), markup.paragraph(table.counts(sweep))]
    return markup.page(f"{'Sweep' if sweep.grid else 'Run'} {_name(folder)}", lead, sections)


def of_frontier(
    folder: Path, frame: Frame, settings: Sequence[frontier.Setting],
    pictures: Mapping[str, Figure], command: str, sources: Sequence[Path],
) -> str:  # fmt: skip
    """frontier.html.

    Args:
      folder: where the pictures are.
      frame: all rows.
      settings: the tables.
      pictures: by the name of their file.
      command: the command line that makes the page.
      sources: where the runs are, or what is left of them: folders, or frontier.csv files.

    Raises:
      ValueError: a file of the pictures' names is no PNG, or a record of runs is not one of ours.
    """
    drawn = [_picture(folder / name, *_seen(figure)) for name, figure in pictures.items()]
    meanings = dict(FRONTIER_COLUMNS)
    if "strength_name" in frame:  # not of every older frontier.csv
        known = frame[frame["strength_name"].notna() & (frame["strength_name"] != "")]
        of = known.groupby("strength_name", sort=False)["scheme"].unique().items()
        said = "; ".join(f"{flag} of {', '.join(schemes)}" for flag, schemes in of)
        meanings["strength"] += f": {said}" if said else ""
    meanings["strength"] += "."
    sections: list[tuple[str, Sequence[Html]]] = [
        ("Pictures", drawn),
        ("What the columns mean", [markup.terms(meanings)]),
    ]
    for one in settings:
        sections.append((one.name, [
            markup.paragraph(one.controls),
            markup.sheet(f"{one.name}: the best thief of each view", one.by_view),
            markup.sheet(f"{one.name}: {frontier.BY_THIEF}", one.by_thief),
        ]))  # fmt: skip
    origins = [part for source in sources for part in _origin(source)]
    sections.append(("Where this comes from", [*_written(), *origins]))
    lead = [markup.typed(command), markup.paragraph(frontier.NOTE)]
    return markup.page(f"The frontier, {_name(folder)}", lead, sections)


def _name(folder: Path) -> str:
    return folder.resolve().name or str(folder)


def _picture(file: Path, alt: str, caption: str) -> Html:
    try:
        return markup.picture(file.read_bytes(), alt, f"{file.name}: {caption}")
    except ValueError as error:
        raise refuse("html", str(file), str(error)) from None


def _seen(figure: Figure) -> tuple[str, str]:
    """What a picture of the frontier shows, and how it is read."""
    views = [title for axes in figure.axes if (title := axes.get_title())]
    partitions = [label.partition("\n")[0] for axes in figure.axes if (label := axes.get_ylabel())]
    curves = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    alt = (
        "The owner's test accuracy against that of the best thief. "
        f"Panels from left to right: {'; '.join(views)}. From top to bottom: "
        f"{', '.join(partitions)}. Lines: {'; '.join(curves)}."
    )
    caption = (
        f"{figure.get_label()}. Owner against best thief, along the strengths of each scheme: "
        "above and to the left is better. In the grey band a thief is no better than scratch."
    )
    return alt, caption


def _written() -> list[Html]:
    """When the page was written, and with what."""
    now = datetime.datetime.now(datetime.UTC)
    versions = {"Python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in WRITERS}
    words = {
        "page written": _date(now.timestamp()), "with": _in_words(versions),
        "by git revision": git_revision() or "not recorded",
    }  # fmt: skip
    return [markup.terms(words)]


def _date(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _origin(source: Path) -> list[Html]:
    """What is recorded about the runs of a folder, or about those that lie beside a file.

    Raises:
      ValueError: a record there is not one of ours.
    """
    folder = source if source.is_dir() else source.parent
    plan = _read(folder / "sweep.json") or _read(folder / "config.json")
    if not plan:
        return [markup.paragraph(f"{source}: nothing beside it says how its runs were made.")]
    try:
        runs, records = _records(folder, plan)
        words = {"runs of": str(source), "number of runs": str(len(plan["runs"]))}
        files = [file for run in runs if (file := run / "summary.json").exists()]
        if ends := [file.stat().st_mtime for file in files]:
            words["ended"] = " to ".join(dict.fromkeys(map(_date, (min(ends), max(ends)))))
        words |= {said: _counted(name, records) for name, said in RECORDED.items()}
        tables = {
            "The grid": plan.get("grid", {}).items(),
            "All other flags, of the last run of the plan": plan["options"].items(),
        }
        parts = [markup.terms({name: text for name, text in words.items() if text})]
        for heading, flags in tables.items():
            said = {flag: ", ".join(map(shown, _listed(value))) or "–" for flag, value in flags}
            if said:
                parts.append(markup.folded(heading, markup.terms(said)))
        return parts
    except (KeyError, TypeError, AttributeError) as error:
        raise refuse("html", str(folder), f"its records are not ours ({error!r})") from None


def _records(folder: Path, plan: Row) -> tuple[list[Path], list[Row]]:
    """The folders of all planned runs, and what is recorded about them: by config.json of those
    that are complete, by batch.json of others that have begun, else by the plan itself."""
    if not (folder / "sweep.json").exists():
        return [folder], [plan]
    records = {}
    for file in sorted(folder.glob("batches/*/batch.json")):
        if batch := _read(file):
            records |= dict.fromkeys(batch["runs"], batch["provenance"])
    records |= {
        run: record for run in plan["runs"] if (record := _read(folder / run / "config.json"))
    }
    return [folder / run for run in plan["runs"]], list(records.values()) or [plan]


def _counted(name: str, records: Sequence[Row]) -> str:
    """The value of a record, or each value and how many runs have it where they differ; empty
    where no run has any."""
    counts = Counter(_in_words(record.get(name)) for record in records)
    if len(counts) == 1:
        return next(iter(counts))
    none = "never" if name == "resumed" else "not recorded"
    return "; ".join(f"{value or none} (runs: {count})" for value, count in counts.items())


def _in_words(value: Any) -> str:
    """Of a recorded JSON value."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(each)}" for name, each in value.items())
    return "; ".join(map(_in_words, value)) if isinstance(value, list) else shown(value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read(file: Path) -> Row:
    """The object in a file; empty where there is none, as of a batch that has just ended."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
