"""What the demo shows: one table, the continuations, and files of them."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..eval.data import Codec
from ..eval.scores import mean_of_rows
from ..tables import with_error

__all__ = [
    "Row",
    "Scores",
    "agreeing",
    "continuation_panels",
    "results_table",
    "write_continuations",
    "write_positions",
]

_SHOWN_PROMPT = 240  # characters


@dataclass(frozen=True)
class Scores:
    """Per position and window: `kl` `[T, B]` nats (None for dense), `hits` `[T, B]` bool."""

    kl: Tensor | None
    hits: Tensor

    def summary(self, dense: Scores, first: int) -> dict[str, float]:
        """Means with standard errors over windows, from row `first` on."""
        accuracy, accuracy_se = mean_of_rows(self.hits[first:].T)
        change = self.hits[first:].double() - dense.hits[first:].double()
        delta, delta_se = mean_of_rows(change.T)
        values = dict(
            accuracy=accuracy, accuracy_se=accuracy_se, delta=delta, delta_se=delta_se,
            kl=0.0, kl_se=0.0,
        )  # fmt: skip
        if self.kl is not None:
            values["kl"], values["kl_se"] = mean_of_rows(self.kl[first:].T)
        return values


@dataclass(frozen=True)
class Row:
    """One line of the table. NaN: the error of one window alone, bits of a cache without tiles."""

    method: str
    cache_bytes: int
    tile_bits: float  # per element of a quantized tile, scales included
    total_bits: float  # per element of the whole cache: sinks, tail and state included
    compression: float
    tokens_per_second: float
    kl: float
    kl_se: float
    accuracy: float
    accuracy_se: float
    delta: float  # accuracy minus that of dense on the same bytes
    delta_se: float


def results_table(rows: list[Row], unit: str) -> Table:
    """The table; the first row is dense."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("cache", style="bold", no_wrap=True)
    for head in (
        "size\nMiB",
        "tile\nbits",
        "times\nsmaller",
        "tokens\nper s",
        "KL to dense\n10⁻³ nats",
        f"next-{unit}\naccuracy, %",
        "minus dense\n%",
    ):
        table.add_column(head, justify="right")
    for row in rows:
        dense = row is rows[0]
        table.add_row(
            row.method,
            f"{row.cache_bytes / 2**20:,.2f}",
            "-" if math.isnan(row.tile_bits) else f"{row.tile_bits:.2f}",
            f"{row.compression:.2f}×",
            f"{row.tokens_per_second:,.0f}",
            "0" if dense else with_error(1000 * row.kl, 1000 * row.kl_se),
            with_error(100 * row.accuracy, 100 * row.accuracy_se),
            "" if dense else with_error(100 * row.delta, 100 * row.delta_se, signed=True),
        )
    return table


def agreeing(dense: list[int], other: list[int]) -> int:
    """Number of leading tokens in which two continuations agree."""
    pairs = zip(dense, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(dense), len(other)))


def _verdict(dense: list[int], other: list[int], unit: str) -> str:
    same = agreeing(dense, other)
    if dense == other:
        return f"the same as dense over all {len(other)} {unit}s"
    return f"differs from dense at {unit} {same + 1} of {len(other)}"


def continuation_panels(
    prompt: list[int], texts: dict[str, list[int]], codec: Codec, console: Console
) -> RenderableType:
    """One panel per method; a mark stands before the first token that differs from dense."""
    mark = "◆" if "utf" in console.encoding.lower() else "<#>"
    head = codec.decode(prompt)[-_SHOWN_PROMPT:]
    panels = [Panel(Text(f"…{head}", style="dim"), title=f"prompt, the end of {len(prompt)} "
                    f"{codec.unit}s", title_align="left")]  # fmt: skip
    dense = next(iter(texts.values()))
    for method, ids in texts.items():
        same = agreeing(dense, ids)
        text = Text(codec.decode(ids[:same]))
        title = method
        if ids is not dense:
            title = f"{method}: {_verdict(dense, ids, codec.unit)}"
            if ids != dense:
                text.append(mark, style="bold red")
                text.append(codec.decode(ids[same:]), style="yellow")
        panels.append(Panel(text, title=title, title_align="left"))
    return Group(*panels)


def write_positions(path: Path, scores: dict[str, Scores], prefix: int) -> None:
    """Write KL and accuracy by position, averaged over the windows."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "cached_tokens", "kl_nats", "accuracy"])
        for method, score in scores.items():
            kl = torch.zeros(len(score.hits)) if score.kl is None else score.kl.mean(1)
            hits = score.hits.double().mean(1)
            for index, pair in enumerate(zip(kl.tolist(), hits.tolist(), strict=True)):
                writer.writerow([method, prefix + index, *(f"{value:.6g}" for value in pair)])


def write_continuations(
    path: Path, prompt: list[int], texts: dict[str, list[int]], codec: Codec, source: str
) -> None:
    """Write prompt and continuations as plain text."""
    dense = next(iter(texts.values()))
    parts = [f"=== prompt: {len(prompt)} {codec.unit}s of {source} ===", codec.decode(prompt)]
    for method, ids in texts.items():
        verdict = "" if ids is dense else f": {_verdict(dense, ids, codec.unit)}"
        parts += [f"=== {method}{verdict} ===", codec.decode(ids)]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def describe(header: dict[str, str]) -> RenderableType:
    """The lines above the table."""
    grid: Any = Table.grid(padding=(0, 2))
    for key, value in header.items():
        grid.add_row(Text(key, style="bold"), Text(value))
    return grid
