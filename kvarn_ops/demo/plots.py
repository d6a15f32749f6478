"""The demo's two pictures: quality against bits, and KL against position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .decode import Plan
from .report import Row, Scores

__all__ = ["plot_kl_by_position", "plot_quality"]

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_MARKERS = "osD^vPX"
_BIN = 32  # positions per point; divides every tile


def plot_quality(path: Path, rows: list[Row], floor: float | None, subtitle: str) -> None:
    """KL to dense against all bits of the cache per element.

    `floor` is the KL that rounding causes without quantization, if it is known.
    """
    figure, axes = _figure()
    for index, row in enumerate(rows[1:]):
        axes.errorbar(
            row.total_bits,
            row.kl,
            yerr=None if row.kl_se != row.kl_se else row.kl_se,
            color=_color(index),
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=8,
            capsize=4,
            linestyle="none",
            label=f"{row.method}: {row.compression:.2f}× smaller than dense",
        )
        axes.annotate(
            row.method,
            (row.total_bits, row.kl),
            xytext=(8, 8),
            textcoords="offset points",
            color=_color(index),
        )
    if floor is not None:
        axes.axhline(
            floor,
            color="0.45",
            linestyle=":",
            linewidth=1.2,
            label="rounding only: no tile quantized",
        )
    axes.set_yscale("log")
    axes.margins(x=0.25, y=0.2)
    axes.set_xlabel(
        f"bits per cached element, scales, sinks and tail included (dense: {rows[0].total_bits:g})"
    )
    axes.set_ylabel("KL(dense ‖ quantized), nats")
    _finish(figure, axes, path, "Quality against cache size", subtitle)


def plot_kl_by_position(path: Path, scores: dict[str, Scores], plan: Plan, subtitle: str) -> None:
    """KL to dense against the number of cached tokens, in bins that end where tiles do."""
    figure, axes = _figure()
    if len(plan.tile_starts) > 1:
        for start in plan.tile_starts[1:]:
            axes.axvline(start, color="0.8", linestyle=":", linewidth=0.9)
    firsts = sorted(set(plan.first_tiles.values()))
    for index, first in enumerate(firsts):
        names = [name for name, value in plan.first_tiles.items() if value == first]
        which = "" if len(firsts) == 1 else f" ({', '.join(names)})"
        others = "; dotted: further tiles" if plan.tile_starts else ""
        axes.axvline(
            first,
            color="0.45",
            linestyle=("--", ":", "-.")[index % 3],
            linewidth=1,
            label=f"first tile quantized{which}{others}",
        )
    presets = [name for name, score in scores.items() if score.kl is not None]
    for index, name in enumerate(presets):
        kl = scores[name].kl
        assert kl is not None
        skip = (plan.first_scored - plan.prefix) % _BIN
        bins = kl[skip:].mean(1).split(_BIN)
        bins = [part for part in bins if len(part) == _BIN]
        centers = plan.prefix + skip + _BIN * (torch.arange(len(bins)) + 0.5)
        axes.plot(
            centers.tolist(),
            [part.mean().item() for part in bins],
            color=_color(index),
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=3,
            linewidth=1.4,
            label=name,
        )
    axes.set_yscale("log")
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("KL(dense ‖ quantized), nats")
    title = f"Quality by position (means of {_BIN} positions)"
    _finish(figure, axes, path, title, subtitle, grid="y")


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not through pyplot: no display is looked for, and no figure stays alive.
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _finish(
    figure: Any, axes: Any, path: Path, title: str, subtitle: str, grid: str = "both"
) -> None:
    axes.set_title(title, loc="left", fontweight="bold", pad=24)
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, fontsize=9, color="0.35")
    axes.grid(axis=grid, which="both", color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(facecolor="white", edgecolor="none", framealpha=0.9, fontsize=9)
    figure.savefig(path, dpi=150)


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]
