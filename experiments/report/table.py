"""The statistics of a sweep, a line a configuration: as CSV, Markdown, Parquet, on the terminal."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from scipy import stats

from experiments.report.results import Frame, Row, Sweep, describe, last_part, shown


def ci95(values: Any) -> float:
    """Half the width of the mean's 95 % interval by Student's t; NaN for one value."""
    return float(stats.t.ppf(0.975, values.count() - 1)) * values.sem()


# Columns after the grid's flags: of which column of the runs, and what of it. Accuracies and gaps
# are shares of 1; numbers are over the runs that did not fail.
MEASURES = {
    "seeds": ("complete", "sum"),  # failed ones among them
    "owner_accuracy_mean": ("owner_accuracy_final", "mean"),
    "owner_accuracy_std": ("owner_accuracy_final", "std"),
    "owner_accuracy_ci95": ("owner_accuracy_final", ci95),
    "baseline_gap_mean": ("gap", "mean"),
    "shared_accuracy_max_test_mean": ("shared_accuracy_max_test", "mean"),
    "rounds_over_cap_test_mean": ("rounds_over_cap_test", "mean"),
    "infeasible_rounds_mean": ("infeasible_rounds", "mean"),
    "failed_runs": ("failed", "sum"),
    "baseline_gap_ci95": ("gap", ci95),
    "baseline_gap_seeds": ("gap", "count"),  # those of which both runs are there
    "shared_accuracy_max_test_max": ("shared_accuracy_max_test", "max"),
    "protected_rounds_mean": ("protected_rounds", "mean"),
    "images_per_round_mean": ("images", "mean"),  # that calibration forwarded, a protected round
    "unfinished_runs": ("unfinished", "sum"),
    "cap": ("cap", "first"),
}
NOTE = (
    "Accuracies are on test, the owner's after the last round: mean ± half of the 95 % interval "
    "(Student's t) over the runs that did not fail. FedAvg is paired by seed. Shared accuracies "
    "are the highest of a run's protected rounds. Seeds count complete runs, failed ones included."
)
ALONE = " (1 seed)"  # of which there is no interval
FOLDED = 9  # columns to which cells are folded: "95.40 ±" and below it "1.17 %"
MOST_LINES = 50  # on the terminal
NOT_ON_TERMINAL = ("highest of all seeds", "infeasible rounds")


def statistics(sweep: Sweep) -> Frame:
    """A row a configuration in the order of the grid: its flags, `MEASURES`, the cap."""
    noise, rounds = sweep.noise, sweep.noise["protected_rounds"]
    fedavg = noise["baseline"].map(sweep.runs["owner_accuracy_final"]).astype(float)
    groups = noise.assign(
        gap=fedavg - noise["owner_accuracy_final"],
        images=(noise["calibration_samples"] / rounds).where(rounds > 0),
        unfinished=~noise["complete"],
    ).groupby("configuration", sort=False)
    table = groups.agg(**{name: of for name, of in MEASURES.items() if name not in sweep.flags})
    for place, flag in enumerate(sweep.flags):
        values = [grid.get(flag) for grid in groups["grid"].first()]
        table.insert(place, flag, pd.Series(values, table.index, dtype=object))
    return table


def csv_text(sweep: Sweep, table: Frame) -> str:
    """Numbers in full precision; what is missing is empty."""
    words = {flag: table[flag].map(shown) for flag in sweep.flags}
    return table.assign(**words).to_csv(index=False, lineterminator="\n")


def write_parquet(path: Path, sweep: Sweep, table: Frame) -> None:
    """The same columns and rows; null where a value is missing."""
    for flag in sweep.flags:
        try:
            pyarrow.array(list(table[flag]))
        except pyarrow.ArrowException:  # a flag of numbers and words, such as --server_clients
            table = table.assign(**{flag: table[flag].map(shown)})
    table.to_parquet(path, engine="pyarrow", index=False)


def counts(sweep: Sweep) -> str:
    """How far the sweep has come, FedAvg's runs included."""
    failed, unfinished = sum(sweep.runs["failed"]), sum(~sweep.runs["complete"])
    complete = f"{len(sweep.runs)} runs planned: {len(sweep.sound)} complete"
    return f"{complete}, {failed} failed, {unfinished} unfinished."


def failures(sweep: Sweep) -> list[str]:
    """A line a failed run."""
    lines = []
    for path, run in sweep.runs[sweep.runs["failed"]].iterrows():
        which = describe({"run": run["run"], **run["grid"], "seed": run["seed"]})
        at = f"round {run['round']:g}: "  # a cause may begin with it
        lines.append(f"{path} ({which}): {at}{' '.join(run['cause'].split()).rpartition(at)[2]}")
    return lines


def markdown(sweep: Sweep, table: Frame) -> str:
    """The report."""
    headings, entries = cells(sweep, table)
    parts = [counts(sweep)]
    if entries:
        lines = [headings, ["---"] * len(headings), *entries]
        texts = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines]
        parts += ["\n".join(f"| {text} |" for text in texts), NOTE]
    if failed := failures(sweep):
        parts += ["## Failed runs", "\n".join(f"- {line}" for line in failed)]
    return "\n\n".join(parts) + "\n"


def show(console: Console, sweep: Sweep, table: Frame) -> None:
    """Prints the report's table without the columns for which a terminal is too narrow.

    Where the others do not fit either, cells are folded between words, never within: a number
    that is cut off is another number.
    """
    sheet = Table(
        title=counts(sweep), title_justify="left", caption=NOTE, caption_justify="left",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    headings, lines = cells(sweep, table[:MOST_LINES])
    kept = [at for at, heading in enumerate(headings) if heading not in NOT_ON_TERMINAL]
    flags = headings.index("cap")  # stand before it
    for at in kept:
        sheet.add_column(escape(headings[at]), justify="left" if at < flags else "right")
    for line in lines:
        sheet.add_row(*(escape(line[at]) for at in kept))
    texts = [[line[at] for line in [headings, *lines]] for at in kept]
    boundless = console.options.update(max_width=10_000)
    if Measurement.get(console, boundless, sheet).maximum > console.width:
        room = console.width - 2 * len(kept) - 1  # the table's own spaces
        for column, width in zip(sheet.columns, _widths(texts, room), strict=True):
            column.width = width
        console.width = max(console.width, Measurement.get(console, boundless, sheet).maximum)
    console.print(sheet)
    if len(table) > MOST_LINES:
        console.print(f"The first {MOST_LINES} of {len(table)} lines; report.md has all.")


def _widths(columns: list[list[str]], room: int) -> list[int]:
    """Of columns, the heading first: as folded as they can be, and what room is left to those that
    lack least."""
    widths = [
        max(len(word) for text in texts for word in text.split() or [""]) for texts in columns
    ]
    widths = [
        max(width, *(min(len(text), FOLDED) for text in texts[1:]), 1)
        for width, texts in zip(widths, columns, strict=True)
    ]
    lacks = [max(map(len, texts)) - width for width, texts in zip(widths, columns, strict=True)]
    left = room - sum(widths)
    for at in sorted(range(len(widths)), key=lacks.__getitem__):
        more = max(min(lacks[at], left), 0)
        widths[at], left = widths[at] + more, left - more
    return widths


def cells(sweep: Sweep, table: Frame) -> tuple[list[str], list[list[str]]]:
    """Headings and cells. The cap stands beside the owner's accuracy, in the grid or not."""
    flags = [flag for flag in sweep.flags if last_part(flag) != "cap"]
    headings = [
        *flags, "cap", "owner", "FedAvg − owner, points", "highest shared",
        "highest of all seeds", "rounds over cap", "infeasible rounds", "images a round", "seeds",
    ]  # fmt: skip
    lines = table.to_dict("records")
    return headings, [[*(shown(line[flag]) for flag in flags), *_measured(line)] for line in lines]


def _measured(line: Row) -> list[str]:
    owner, gap = _interval(line, "owner_accuracy", " %"), _interval(line, "baseline_gap")
    if ALONE in owner:  # said once is enough
        gap = gap.removesuffix(ALONE)
    some = {of: line[f"{of}_runs"] for of in ("failed", "unfinished")}
    return [
        _number(line["cap"], "g", " %", 100),
        owner,
        gap,
        _number(line["shared_accuracy_max_test_mean"], ".2f", " %", 100),
        _number(line["shared_accuracy_max_test_max"], ".2f", " %", 100),
        _number(line["rounds_over_cap_test_mean"], ".1f", f" of {line['protected_rounds_mean']:g}"),
        _number(line["infeasible_rounds_mean"], ".1f"),
        _number(line["images_per_round_mean"], ",.0f"),
        ", ".join([str(line["seeds"]), *(f"{n} {of}" for of, n in some.items() if n)]),
    ]


def _interval(line: Row, name: str, unit: str = "") -> str:
    mean, half = line[f"{name}_mean"], line[f"{name}_ci95"]
    if pd.isna(half):
        return _number(mean, "z.2f", f"{unit}{ALONE}", 100)
    return f"{100 * mean:z.2f} ± {100 * half:.2f}{unit}"


def _number(value: float, form: str, unit: str = "", scale: float = 1) -> str:
    return "–" if pd.isna(value) else f"{scale * value:{form}}{unit}"
