"""The pages of a sweep and of a frontier: they hold what the other files hold, need nothing else,
and survive names that look like HTML."""

import base64
import functools
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
from PIL import Image
from small_runs import ROOT
from sweep_folder import FakeSweep, noise_row, single_run, small_sweep, summary
from test_frontier_report import STRENGTHS, folder_of

from experiments import frontier as driver
from experiments.report import __main__ as report
from experiments.report import frontier, markup, page

VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = """a<b>&"c'</table><script>alert(1)</script>"""
MADE = {
    "versions": {"jax": "0.10.2", "numpy": "2.4.6"}, "python": "3.11.7", "platform": "cpu",
    "device": "cpu, 2 x 1 of lanes x clients", "git_revision": "64b1b21",
}  # fmt: skip


class Page(HTMLParser):
    """A page as a reader of it has it; fails where tags are not balanced.

    Attributes:
      tables: the text of all cells, by line, headings first; the classes of the cells likewise.
      pictures: the attributes of img.
      terms: dd by dt.
      text: of it all, but for the style.
    """

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.classes: list[list[list[str | None]]] = []
        self.pictures: list[dict[str, Any]] = []
        self.terms: dict[str, str] = {}
        self.text, self.declared, self._term = "", "", ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_decl(self, decl: str) -> None:
        assert not self.tags, "the declaration is first"
        self.declared = decl

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert len(values) == len(attrs), f"{tag} repeats an attribute"
        self.tags.append((tag, values))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
            self.classes.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self.classes[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.classes[-1][-1].append(values.get("class"))
        elif tag == "img":
            self.pictures.append(values)
        elif tag == "dt":
            self._term = ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        elif "dt" in self.open:
            self._term += data
        elif "dd" in self.open:
            self.terms[self._term] = self.terms.get(self._term, "") + data


def tables_of(markdown: str) -> list[list[list[str]]]:
    """Of a file beside the page, as `Page.tables`."""
    found: list[list[list[str]]] = []
    before = False
    for line in markdown.splitlines():
        if table := line.startswith("|"):
            if not before:
                found.append([])
            cells = re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |"))
            found[-1].append([cell.replace("\\|", "|").strip() for cell in cells])
        before = table
    for table in found:
        assert set(table.pop(1)) == {"---"}
    return found


def needs_nothing(found: Page, text: str) -> None:
    """The file is alone, and its links go to places in it."""
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    assert found.declared == "DOCTYPE html"
    assert {tag for tag, _ in found.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "nav", "section"),
        *("p", "pre", "code", "ul", "li", "a", "dl", "div", "dt", "dd", "details", "summary"),
        *("figure", "figcaption", "img", "table", "thead", "tbody", "tr", "th", "td", "span"),
    }  # fmt: skip
    ids = [values["id"] for _, values in found.tags if "id" in values]
    assert len(set(ids)) == len(ids) > 1
    for tag, values in found.tags:
        assert not [name for name in values if name.startswith("on")], tag
        assert (values.get("src") or "data:").startswith("data:"), tag
        if "href" in values:
            assert (values["href"] or "").removeprefix("#") in ids
        assert not {"srcset", "action", "data", "poster"} & set(values), tag
    without = re.sub(r"base64,[\w+/=]*", "", text)
    assert "://" not in without
    assert not re.search(r"url\(|@import", without)


class Drawn(NamedTuple):
    name: str
    size: tuple[int, int]
    dots: float


def drawn(folder: Path, found: Page) -> list[Drawn]:
    """The pictures of a page, which are those of the folder, as they are."""
    contents = {file.read_bytes(): file.name for file in folder.glob("*.png")}
    pictures = []
    for one in found.pictures:
        kind, _, data = one["src"].partition(",")
        assert kind == "data:image/png;base64"
        content = base64.b64decode(data, validate=True)
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            of = Drawn(contents[content], image.size, image.info["dpi"][0])
        shown = [int(one["width"]), int(one["height"])]
        assert shown == pytest.approx([side / of.dots * 96 for side in of.size], abs=0.5)
        assert len(one["alt"]) > 40
        assert f"{of.name}: " in found.text  # its caption
        pictures.append(of)
    return pictures


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Path, str]:
    folder = small_sweep(tmp_path_factory.mktemp("sweep"))
    assert report.main(["report", str(folder), "--html"]) == 0
    return folder, (folder / "report.html").read_text("utf-8")


def test_the_page_of_a_sweep_has_the_other_files(swept):
    folder, text = swept
    found = Page(text)
    needs_nothing(found, text)
    assert found.tables == tables_of((folder / "report.md").read_text("utf-8"))
    assert len(found.tables[0]) == 1 + 4
    names = [one.name for one in drawn(folder, found)]
    assert names == ["figure1.png", "owner_against_cap.png", "cost_against_violations.png"]
    assert set(names) == {file.name for file in folder.glob("*.png")}
    assert f"python -m experiments.report {folder} --html" in found.text
    assert "15 runs planned: 8 complete, 2 failed, 5 unfinished." in found.text
    assert "runs/f/seed=2 (run=fedavg, seed=2): round 2: the model is NaN" in found.text


def test_every_column_is_explained(swept):
    found = Page(swept[1])
    headings = set(found.tables[0][0])
    assert "calibrator" in headings
    assert headings - {"calibrator"} <= set(found.terms)
    assert found.terms["--calibrator"] == "A flag of the driver: sequential, bisection."


def test_numbers_stand_on_the_right(swept):
    (classes,) = Page(swept[1]).classes
    assert {tuple(line) for line in classes} == {(None, *["number"] * (len(classes[0]) - 1))}


@pytest.mark.parametrize(
    ("column", "number"),
    [
        (["0.5", ""], True),
        (["−3", "–"], True),
        (["-1.02 [-2.00, 1.00]", "2"], True),
        (["sequential", "3"], False),
        (["– none"], False),
        (["", ""], False),
    ],
)
def test_what_a_column_of_numbers_is(column, number):
    found = Page(markup.sheet("", [["name", "x"], *(["a", text] for text in column)]))
    assert {line[1] for line in found.classes[0]} == {"number" if number else None}


def test_the_parts_of_a_cell_are_below_each_other():
    text = "61.0, 77.5 (fine tune, twice), 0.56 [0.51, 0.60]"
    found = markup.sheet("", [["name", "x"], ["V3, 2", text]])
    assert Page(found).tables == [[["name", "x"], ["V3, 2", text]]]
    parts = re.findall(r"<span>(.*?)</span>", found)
    assert parts == ["61.0, ", "77.5 (fine tune, twice), ", "0.56 [0.51, 0.60]"]


def test_without_the_flag_there_is_no_page(tmp_path, capsys):
    results = summary(0.8, baseline_accuracy_final=0.9, baseline_failed=None)
    folder = single_run(tmp_path, [], results)
    assert report.main(["report", str(folder)]) == 0
    assert "report.html" not in capsys.readouterr().out
    assert not (folder / "report.html").exists()
    assert report.main(["report", "--html", str(folder)]) == 0
    assert "report.html" in capsys.readouterr().out


def test_names_may_look_like_html(tmp_path):
    """Of the folder, of flags and their values, and in the cause of a failure."""
    folder = tmp_path / HOSTILE.replace("/", "\\")
    cause = f"round 2: {HOSTILE}"
    grid = {"noise_layers": [HOSTILE, "a|b"], f"x{HOSTILE}": [1, 2]}
    sweep = FakeSweep(folder, grid)
    for name, *values in (("a", HOSTILE, 1), ("b", "a|b", 2)):
        named = dict(zip(grid, values, strict=True))
        sweep.run(name, 0, named, summary(0.8), [noise_row(1, 0.8, 0.3, 0.3)], "", 0.5)
    sweep.run("c", 0, named, summary(None, failed={"round": 2, "cause": cause}), [], "", 0.5)
    assert report.main(["report", str(folder), "--html"]) == 0
    text = (folder / "report.html").read_text("utf-8")
    found = Page(text)
    needs_nothing(found, text)
    assert "<b>" not in text
    assert [line[0] for line in found.tables[0]] == ["noise_layers", HOSTILE, "a|b", "a|b"]
    assert found.tables[0][0][1] == f"x{HOSTILE}"
    assert found.terms["--noise_layers"] == f"A flag of the driver: {HOSTILE}, a|b."
    assert cause in found.text
    assert folder.name in found.text
    [title] = re.findall(r"<title>(.*)</title>", text)
    assert title.startswith("Sweep a&lt;b&gt;&amp;&quot;c&#x27;")


def test_what_has_no_place_in_html_is_replaced():
    assert markup.escaped("a\x00b\x1bc\x85\n\td") == "a\ufffdb\ufffdc\ufffd\n\td"
    assert markup.escaped("folder-\udcff").encode() == b"folder-?"  # a byte that is no text


def test_a_single_run_has_the_picture_of_its_driver(tmp_path, capsys):
    results = summary(0.8, baseline_accuracy_final=0.9, baseline_failed=None)
    folder = single_run(tmp_path / "run", [], results)
    assert report.main(["report", str(folder), "--html"]) == 0
    assert Page((folder / "report.html").read_text("utf-8")).pictures == []
    Image.new("RGB", (300, 150)).save(folder / "figure1.png", dpi=(192, 192))
    assert report.main(["report", str(folder), "--html"]) == 0
    text = (folder / "report.html").read_text("utf-8")
    found = Page(text)
    needs_nothing(found, text)
    [(name, size, _)] = drawn(folder, found)
    assert (name, size, found.pictures[0]["width"]) == ("figure1.png", (300, 150), "150")
    assert found.tables == tables_of((folder / "report.md").read_text("utf-8"))
    assert found.text.lstrip().startswith("Run run")
    (folder / "figure1.png").write_text("no picture")
    capsys.readouterr()
    assert report.main(["report", str(folder), "--html"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"html='{folder / 'figure1.png'}': is no PNG" in line
    assert (folder / "report.html").read_text("utf-8") == text


def test_a_sweep_that_has_only_begun(tmp_path):
    sweep = FakeSweep(tmp_path, {"calibrator": ["fixed"]})
    sweep.plan("f", 0, {}, None, 0.6)
    assert report.main(["report", str(tmp_path), "--html"]) == 0
    found = Page((tmp_path / "report.html").read_text("utf-8"))
    assert (found.tables, found.pictures) == ([], [])
    assert "1 runs planned: 0 complete, 0 failed, 1 unfinished." in found.text


def recorded(folder: Path) -> dict[str, str]:
    return Page("".join(page._origin(folder))).terms


def note(file: Path, **values: Any) -> None:
    """Adds to the object in a file, which may be missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**before, **values}))


def test_what_runs_were_made_with(tmp_path):
    """By their own records; by that of a batch where they are under way; else by the plan."""
    sweep = FakeSweep(tmp_path, {"cap": [0.4, 0.5], "momentum": [None, 0.9]})
    done = [sweep.run(f"n{seed}", seed, {}, summary(0.8), baseline="") for seed in (0, 1)]
    begun = sweep.plan("n2", 2, {}, "", 0.6)
    sweep.plan("n3", 3, {}, "", 0.6)
    note(tmp_path / "sweep.json", **{**MADE, "git_revision": "newest"}, options={"rounds": 30})
    for run in done:
        note(tmp_path / run / "config.json", **MADE)
    found = recorded(tmp_path)
    assert (found["number of runs"], found["git revision"]) == ("4", "64b1b21")
    assert found["devices"] == "cpu, 2 x 1 of lanes x clients"
    assert found["versions"] == "jax 0.10.2, numpy 2.4.6"
    assert (found["Python"], found["platform"]) == ("3.11.7", "cpu")
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC( to 20.*)?", found["ended"])
    assert (found["cap"], found["momentum"], found["rounds"]) == ("0.4, 0.5", ", 0.9", "30")
    assert "went on later under" not in found
    # One is under way, by other code, and went on by yet other code.
    other = {**MADE, "git_revision": "beef", "resumed": [{"git_revision": "cafe"}]}
    note(tmp_path / "batches" / "b" / "batch.json", runs=[done[0], begun], provenance=other)
    found = recorded(tmp_path)
    assert found["git revision"] == "64b1b21 (runs: 2); beef (runs: 1)"
    assert found["devices"] == "cpu, 2 x 1 of lanes x clients"
    resumed = "never (runs: 2); git_revision cafe (runs: 1)"
    assert found["went on later under"] == resumed
    for run in done:
        (tmp_path / run / "config.json").unlink()
    (tmp_path / "batches" / "b" / "batch.json").unlink()
    assert recorded(tmp_path)["git revision"] == "newest"
    note(tmp_path / "batches" / "b" / "batch.json", runs=3)
    with pytest.raises(ValueError, match=r"^html=.*its records are not ours"):
        recorded(tmp_path)


def test_a_single_run_is_its_own_record(tmp_path):
    folder = single_run(tmp_path, [], summary(0.8))
    note(folder / "config.json", **MADE)
    found = recorded(folder)
    assert (found["git revision"], found["number of runs"]) == ("64b1b21", "2")
    assert found["scheme.calibrator.cap"] == "0.6"


@pytest.fixture(scope="module")
def stolen(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("frontier")
    curves = folder_of(folder)
    note(folder / "sweep.json", options={"rounds": 30})
    for file in folder.rglob("config.json"):
        note(file, **MADE)
    command = "python -m experiments.frontier --html"
    made = functools.partial(page.of_frontier, command=command, sources=[folder])
    frontier.write(folder, curves, STRENGTHS, made)
    return folder, (folder / "frontier.html").read_text("utf-8")


def test_the_page_of_a_frontier_has_the_other_files(stolen):
    folder, text = stolen
    found = Page(text)
    needs_nothing(found, text)
    markdown = (folder / "frontier.md").read_text("utf-8")
    assert found.tables == tables_of(markdown)
    assert len(found.tables) == 2 * 2
    assert [(one.name, one.dots) for one in drawn(folder, found)] == [
        (name, pytest.approx(150, abs=0.1)) for name in ("frontier-6.png", "shares-6.png")
    ]
    alt = found.pictures[0]["alt"]
    for words in ("V1: one client, one round", "V3: 2 clients", "iid, shards", "pair; FedAvg's"):
        assert words in alt
    assert "mnist, lenet5, K = 6, 60 images at the server. Owner against" in found.text
    for line in markdown.splitlines():
        if line and not line.startswith("|"):
            assert line.lstrip("# ").rstrip(":") in found.text
    assert "python -m experiments.frontier --html" in found.text
    assert (found.terms["git revision"], found.terms["rounds"]) == ("64b1b21", "30")
    assert found.terms["strength"].endswith(": cap of pair.")


@pytest.mark.parametrize("change", [{"strength_name": math.nan}, None])
def test_strengths_may_have_no_names(stolen, change):
    """As of schemes that have no strength; an older table has no such column."""
    frame = pd.read_csv(stolen[0] / "frontier.csv")
    frame = frame.assign(**change) if change else frame.drop(columns="strength_name")
    text = page.of_frontier(stolen[0], frame, [], {}, "", [stolen[0]])
    assert Page(text).terms["strength"].endswith("from weak to strong.")


def test_every_column_of_a_frontier_is_explained(stolen):
    found = Page(stolen[1])
    for by_view, by_thief in zip(found.tables[::2], found.tables[1::2], strict=True):
        for heading in (*by_view[0], *by_thief[0][:2]):
            name, _, parts = heading.partition(": ")
            words = [name.split(",")[0], *(parts.split(", ") if parts else [])]
            assert set(words) <= set(found.terms), heading


def test_merged_frontiers_have_a_page(tmp_path, capsys):
    """Their schemes and models may be called anything. What there is of records lies beside."""
    frame = pd.read_csv(ROOT / "docs" / "frontier" / "pair.csv")
    scheme, model = HOSTILE.replace("/", "\\"), '<i>"&'
    frame = frame.assign(scheme=frame["scheme"].replace("pair", scheme), model=model)
    for name, seeds in (("a", frame["seed"] < 2), ("b & c", frame["seed"] >= 2)):
        (tmp_path / name).mkdir()
        frame[seeds].to_csv(tmp_path / name / "frontier.csv", index=False)
    note(tmp_path / "a" / "sweep.json", **MADE, runs={}, grid={}, options={})
    files = ",".join(str(tmp_path / name / "frontier.csv") for name in ("a", "b & c"))
    args = [f"--merge={files}", f"--out={tmp_path / 'out'}"]
    assert driver.main(["frontier", *args]) == 0
    assert not (tmp_path / "out" / "frontier.html").exists()
    assert driver.main(["frontier", "--html", *args]) == 0
    text = (tmp_path / "out" / "frontier.html").read_text("utf-8")
    found = Page(text)
    needs_nothing(found, text)
    assert "<b>" not in text
    assert "<i>" not in text
    assert found.tables == tables_of((tmp_path / "out" / "frontier.md").read_text("utf-8"))
    assert scheme in {line[0] for line in found.tables[0]}
    assert f"mnist, {model}, K = 100" in found.text
    assert [one.name for one in drawn(tmp_path / "out", found)] == [
        "frontier-100.png", "shares-100.png",
    ]  # fmt: skip
    assert scheme in found.pictures[0]["alt"]
    assert f"--merge={files}" in found.text
    assert found.terms["git revision"] == "64b1b21"
    assert f"{tmp_path}/b & c/frontier.csv: nothing beside it says" in found.text
    (tmp_path / "a" / "sweep.json").write_text('{"runs": 3}')
    capsys.readouterr()
    assert driver.main(["frontier", "--html", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"html='{tmp_path / 'a'}': its records are not ours" in line
