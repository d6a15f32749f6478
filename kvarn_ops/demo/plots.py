"""The demo's two pictures: quality against bits, and KL against position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .decode import Plan
from .report import Row, Scores

__all__ = ["plot_kl_by_position", "plot_quality"]

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
_MARKERS = "osD^vP"
_BIN = 32  # positions per point; divides every tile


def plot_quality(path: Path, rows: list[Row], subtitle: str) -> None:
    """KL to dense against all bits of the cache per element."""
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
    axes.set_yscale("log")
    axes.margins(x=0.2, y=0.35)
    axes.set_xlabel(
        f"bits per cached element, scales, sinks and tail included (dense: {rows[0].total_bits:g})"
    )
    axes.set_ylabel("KL(dense ‖ KVarN), nats")
    _finish(figure, axes, path, "Quality against cache size", subtitle)


def plot_kl_by_position(path: Path, scores: dict[str, Scores], plan: Plan, subtitle: str) -> None:
    """KL to dense against the number of cached tokens, in bins that end where tiles do."""
    figure, axes = _figure()
    firsts = sorted(set(plan.first_tiles.values()))
    for index, first in enumerate(firsts):
        names = [name for name, value in plan.first_tiles.items() if value == first]
        which = "" if len(firsts) == 1 else f" ({', '.join(names)})"
        axes.axvline(
            first,
            color="0.45",
            linestyle=("--", ":", "-.")[index % 3],
            linewidth=1,
            label=f"first tile quantized{which}",
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
    axes.set_ylabel("KL(dense ‖ KVarN), nats")
    _finish(figure, axes, path, f"Quality by position (means of {_BIN} positions)", subtitle)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not through pyplot: no display is looked for, and no figure stays alive.
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _finish(figure: Any, axes: Any, path: Path, title: str, subtitle: str) -> None:
    axes.set_title(f"{title}\n", loc="left", fontweight="bold")
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color="0.35")
    axes.grid(which="both", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]
