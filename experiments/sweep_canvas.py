"""What the pictures of a sweep have in common: their size, axes and captions."""

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MOST_NAMED = 4  # of those left out; report.md has all
SIZES: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "text.parse_math": False,  # --noise_layers may hold a $
}


def blank(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def clean(axes: Axes) -> None:
    axes.grid(color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def left_out(names: Sequence[str], most: int) -> str:
    """Says which of the configurations are not drawn; empty if all are."""
    if len(names) <= most:
        return ""
    rest = names[most:]
    more = f"; and {len(rest) - MOST_NAMED} more" if len(rest) > MOST_NAMED else ""
    return (
        f"The first {most} of {len(names)}, in the order of the grid. "
        f"Left out: {'; '.join(rest[:MOST_NAMED])}{more}."
    )


def caption(figure: Figure, text: str) -> None:
    if text:
        columns = int(17 * figure.get_figwidth())
        figure.supxlabel(textwrap.fill(text, columns), x=0.01, ha="left", fontsize=8)
