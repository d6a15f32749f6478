"""What the pictures of the package have in common: size, colours, grid, title, no display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["COLORS", "MARKERS", "color", "finish", "marker", "new_figure"]

# Okabe and Ito's, told apart by colour-blind readers, and grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = "osD^vPX"


def color(index: int) -> str:
    """The colour of the n-th series."""
    return COLORS[index % len(COLORS)]


def marker(index: int) -> str:
    """The marker of the n-th series."""
    return MARKERS[index % len(MARKERS)]


def new_figure(
    columns: int = 1, rows: int = 1, size: tuple[float, float] | None = None, share_y: bool = True
) -> tuple[Any, list[Any]]:
    """A figure, and its axes from left to right and top to bottom."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not through pyplot: no display is looked for, and no figure stays alive.
    figure = Figure(figsize=size or (4 + 4 * columns, 1 + 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharey=share_y, squeeze=False)
    return figure, list(axes.flat)


def finish(
    figure: Any,
    panels: Sequence[Any],
    path: Path,
    title: str,
    subtitle: str,
    grid: str = "both",
) -> None:
    """Add grid, legends, title and a line on the conditions, and write the file."""
    for axes in panels:
        if grid:
            axes.grid(axis=grid, which="both", color="0.92", linewidth=0.6)
            axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0] and axes.get_legend() is None:
            axes.legend(facecolor="white", edgecolor="none", framealpha=0.9, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
    # In the layout's way, so that it never lies on a panel.
    figure.text(0.012, -0.01, subtitle, fontsize=8, color="0.35", va="top")
    figure.savefig(path, dpi=140, bbox_inches="tight")
