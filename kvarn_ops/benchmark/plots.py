"""Pictures of measured rows. Everything is drawn from the rows of a CSV, nothing is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..figures import color, finish, marker, new_figure

__all__ = ["plot_decode_attention", "save"]

_LINES = ("-", "--", ":", "-.")


def plot_decode_attention(path: Path, rows: list[dict[str, str]]) -> None:
    """Speed relative to dense attention against the context, a line per preset and shape."""
    batches = sorted({int(row["batch"]) for row in rows})
    figure, panels = new_figure(columns=len(batches))
    dims = sorted({row["head_dim"] for row in rows}, key=int, reverse=True)
    kinds = list(dict.fromkeys((row["preset"], row["q_heads"], row["kv_heads"]) for row in rows))
    for axes, batch in zip(panels, batches, strict=True):
        for kind_index, kind in enumerate(kinds):
            for dim_index, dim in enumerate(dims):
                points = sorted(
                    (int(row["context"]), float(row["speedup"]))
                    for row in rows
                    if (row["preset"], row["q_heads"], row["kv_heads"]) == kind
                    and row["head_dim"] == dim
                    and int(row["batch"]) == batch
                )
                if not points:
                    continue
                preset, q_heads, kv_heads = kind
                axes.plot(
                    *zip(*points, strict=True),
                    color=color(kind_index),
                    marker=marker(kind_index),
                    linestyle=_LINES[dim_index % len(_LINES)],
                    markersize=5,
                    label=f"{preset}, {q_heads}/{kv_heads} heads, head_dim {dim}",
                )
        axes.axhline(1, color="0.45", linewidth=1)
        axes.set_xscale("log", base=2)
        contexts = sorted({int(row["context"]) for row in rows})
        axes.set_xticks(contexts, [_short(context) for context in contexts])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens in the cache")
        axes.set_title(f"batch {batch}", fontsize=10)
    panels[0].set_ylabel("dense bf16 SDPA time / KVarN time")
    save(figure, panels, path, "Decode attention of one layer: above 1 KVarN is faster", rows[-1])


def save(
    figure: Any, panels: list[Any], path: Path, title: str, conditions: dict[str, str]
) -> None:
    """Write the file, with the conditions of the run under the title."""
    where = (
        f"{conditions['device']}, threads: {conditions['threads']}, torch {conditions['torch']}, "
        f"kvarn_ops {conditions['kvarn_ops']}, {conditions['date'].split()[0]}"
    )
    finish(figure, panels, path, title, where)


def _short(context: int) -> str:
    return f"{context // 1024}K" if context % 1024 == 0 else str(context)
