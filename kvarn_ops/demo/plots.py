"""The demo's two pictures: quality against bits, and KL against position."""

from __future__ import annotations

from pathlib import Path

import torch

from ..figures import color, finish, marker, new_figure
from .decode import Plan
from .report import Row, Scores

__all__ = ["plot_kl_by_position", "plot_quality"]

_BIN = 32  # positions per point; divides every tile


def plot_quality(path: Path, rows: list[Row], floor: float | None, subtitle: str) -> None:
    """KL to dense against all bits of the cache per element.

    `floor` is the KL that rounding causes without quantization, if it is known.
    """
    figure, (axes,) = new_figure()
    for index, row in enumerate(rows[1:]):
        axes.errorbar(
            row.total_bits,
            row.kl,
            yerr=None if row.kl_se != row.kl_se else row.kl_se,
            color=color(index),
            marker=marker(index),
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
            color=color(index),
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
    finish(figure, [axes], path, "Quality against cache size", subtitle)


def plot_kl_by_position(path: Path, scores: dict[str, Scores], plan: Plan, subtitle: str) -> None:
    """KL to dense against the number of cached tokens, in bins that end where tiles do."""
    figure, (axes,) = new_figure()
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
            color=color(index),
            marker=marker(index),
            markersize=3,
            linewidth=1.4,
            label=name,
        )
    axes.set_yscale("log")
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("KL(dense ‖ quantized), nats")
    title = f"Quality by position (means of {_BIN} positions)"
    finish(figure, [axes], path, title, subtitle, grid="y")
