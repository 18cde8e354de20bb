"""The table of a sweep as CSV, Markdown, Parquet and on the terminal."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from experiments.sweep_results import Row, Sweep, describe, shown
from experiments.sweep_statistics import COUNTS, MEASURES

NOTE = (
    "Accuracies are on test, the owner's after the last round: mean ± half of the 95 % interval "
    "(Student's t) over the runs that did not fail. FedAvg is paired by seed. Shared accuracies "
    "are the highest of a run's protected rounds. Seeds count complete runs, failed ones included."
)

ALONE = " (1 seed, no interval)"
FOLDED = 9  # columns to which cells are folded: "95.40 ±" and below it "1.17 %"
MOST_LINES = 50  # on the terminal
NOT_ON_TERMINAL = ("highest of all seeds", "infeasible rounds")


def csv_text(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Numbers in full precision; what is missing is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([shown(row[column]) for column in columns] for row in rows)
    return text.getvalue()


def write_parquet(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """The same columns and rows; null where a value is missing."""
    import pyarrow
    from pyarrow import parquet

    def array(column: str) -> Any:
        values = [row[column] for row in rows]
        if column in MEASURES:
            return pyarrow.array(values, "int64" if column in COUNTS else "float64")
        try:
            return pyarrow.array(values)
        except pyarrow.ArrowException:  # a flag of numbers and words, such as --server_clients
            return pyarrow.array([None if value is None else shown(value) for value in values])

    parquet.write_table(pyarrow.table({column: array(column) for column in columns}), path)


def counts(sweep: Sweep) -> str:
    """How far the sweep has come, FedAvg's runs included."""
    complete = len(sweep.runs) - len(sweep.failed)
    return (
        f"{sweep.planned} runs planned: {complete} complete, {len(sweep.failed)} failed, "
        f"{sweep.unfinished} unfinished."
    )


def markdown(sweep: Sweep, rows: Sequence[Row]) -> str:
    """The report."""
    headings, cells = _cells(sweep, rows)
    lines = [headings, ["---"] * len(headings), *cells]
    parts = [counts(sweep)]
    if cells:
        parts += ["\n".join(f"| {' | '.join(map(_in_cell, line))} |" for line in lines), NOTE]
    if sweep.failed:
        parts += ["## Failed runs", "\n".join(f"- {line}" for line in failures(sweep))]
    return "\n\n".join(parts) + "\n"


def failures(sweep: Sweep) -> list[str]:
    """A line a failed run."""
    lines = []
    for run in sweep.failed:
        failed = run.failed or {}
        which = describe({"run": run.kind, **run.values, "seed": run.seed})
        cause = " ".join(str(failed["cause"]).split())
        lines.append(f"{run.path} ({which}): round {failed['round']}: {cause}")
    return lines


def show(console: Console, sweep: Sweep, rows: Sequence[Row]) -> None:
    """Prints the report's table without the columns for which a terminal is too narrow.

    Where the others do not fit either, cells are folded between words, never within: a number
    that is cut off is another number.
    """
    table = Table(
        title=counts(sweep), title_justify="left", caption=NOTE, caption_justify="left",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    headings, lines = _cells(sweep, rows[:MOST_LINES])
    kept = [at for at, heading in enumerate(headings) if heading not in NOT_ON_TERMINAL]
    for at in kept:
        flag = headings[at] in sweep.grid and headings[at] != "cap"
        table.add_column(escape(headings[at]), justify="left" if flag else "right")
    for line in lines:
        table.add_row(*(escape(line[at]) for at in kept))
    boundless = console.options.update(max_width=10_000)
    if Measurement.get(console, boundless, table).maximum > console.width:
        for at, column in zip(kept, table.columns, strict=True):
            words = [word for line in [headings, *lines] for word in line[at].split()]
            column.width = max([*map(len, words), *(min(len(line[at]), FOLDED) for line in lines)])
        console.width = max(console.width, Measurement.get(console, boundless, table).maximum)
    console.print(table)
    if len(rows) > MOST_LINES:
        console.print(f"The first {MOST_LINES} of {len(rows)} lines; report.md has all.")


def _cells(sweep: Sweep, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells. The cap stands beside the owner's accuracy, in the grid or not."""
    flags = [flag for flag in sweep.grid if flag not in ("seed", "cap")]
    headings = [
        *flags, "cap", "owner", "FedAvg − owner, points", "highest shared",
        "highest of all seeds", "rounds over cap", "infeasible rounds", "images a round", "seeds",
    ]  # fmt: skip
    return headings, [[*(shown(row[flag]) for flag in flags), *_measured(row)] for row in rows]


def _measured(row: Row) -> list[str]:
    gap = _interval(row, "baseline_gap")
    owner = _interval(row, "owner_accuracy", " %")
    if ALONE in owner:  # said once is enough
        gap = gap.removesuffix(ALONE)
    return [
        "–" if row["cap"] is None else f"{100 * row['cap']:g} %",
        owner,
        gap,
        _number(row["max_shared_accuracy_mean"], ".2f", " %", 100),
        _number(row["max_shared_accuracy_max"], ".2f", " %", 100),
        _number(row["rounds_over_cap_mean"], ".1f", f" of {row['protected_rounds_mean'] or 0:g}"),
        _number(row["infeasible_rounds_mean"], ".1f"),
        _number(row["images_per_round_mean"], ",.0f"),
        f"{row['seeds']}{_some(row, 'failed')}{_some(row, 'unfinished')}",
    ]


def _interval(row: Row, name: str, unit: str = "") -> str:
    mean, half = row[f"{name}_mean"], row[f"{name}_ci95"]
    if mean is None:
        return "–"
    if half is None:
        return f"{100 * mean:.2f}{unit}{ALONE}"
    return f"{100 * mean:.2f} ± {100 * half:.2f}{unit}"


def _some(row: Row, which: str) -> str:
    count = row[f"{which}_runs"]
    return f", {count} {which}" if count else ""


def _number(value: float | None, form: str, unit: str = "", scale: float = 1) -> str:
    return "–" if value is None else f"{scale * value:{form}}{unit}"


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|")
