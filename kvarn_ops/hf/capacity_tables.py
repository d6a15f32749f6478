"""What `kvarn-ops inspect` found, as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .capacity import GIB, Inspection

__all__ = ["summary"]


def summary(found: Inspection) -> RenderableType:
    """Tables for the terminal."""
    head = (
        f"{found.name}: {found.model_class}, keys and values {found.dtype}, weights "
        f"{found.weight_bytes / GIB:,.2f} GiB ({found.weight_source})"
    )
    parts: list[Any] = [Text(head, style="bold"), _layer_table(found), _size_table(found)]
    if found.memory_bytes is not None:
        parts.append(_fit_table(found))
    parts += [Text(f"! {line}", style="yellow") for line in found.warnings]
    if found.memory_bytes is not None:
        parts.append(
            Text("Activations and the framework's own memory are not counted.", style="dim")
        )
    return Group(*parts)


def _layer_table(found: Inspection) -> RenderableType:
    table = _table("layers")
    for head in ("KV heads", "head_dim", "dense B/token"):
        table.add_column(head, justify="right")
    presets = [size.preset for size in found.sizes[1:]]
    for name in presets:
        table.add_column(f"{name} B/token", justify="right")
    table.add_column("what happens")
    for group in found.layers:
        span = f"{group.first}" if group.first == group.last else f"{group.first}-{group.last}"
        kvarn = [
            f"{group.kvarn_bytes_per_token.get(name, group.dense_bytes_per_token):,.0f}"
            for name in presets
        ]
        table.add_row(
            span,
            str(group.num_kv_heads or "-"),
            str(group.head_dim or "-"),
            f"{group.dense_bytes_per_token:,.0f}",
            *kvarn,
            group.reason,
        )
    return table


def _size_table(found: Inspection) -> RenderableType:
    table = _table("cache")
    for head in ("B/token", "fixed, MiB/row", "smaller from"):
        table.add_column(head, justify="right")
    contexts = list(found.sizes[0].bytes_at_context)
    for n in contexts:
        table.add_column(f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}", justify="right")
    for size in found.sizes:
        dense = size.preset == "dense"
        table.add_row(
            size.preset,
            f"{size.bytes_per_token:,.0f}",
            "-" if dense else f"{size.fixed_bytes / 2**20:,.1f}",
            "-" if size.break_even is None else f"{size.break_even:,}",
            *(
                _mib(size.bytes_at_context[n]) if dense else f"{size.compression[n]:.2f}×"
                for n in contexts
            ),
        )
    return table


def _fit_table(found: Inspection) -> RenderableType:
    memory, left = found.memory_bytes or 0, (found.memory_bytes or 0) - found.weight_bytes
    table = _table(f"tokens per row that fit in {memory / GIB:g} GiB, {left / GIB:,.2f} left")
    batches = list(found.sizes[0].tokens_that_fit or {})
    for rows in batches:
        table.add_column(f"batch {rows}", justify="right")
    for size in found.sizes:
        fits = [(size.tokens_that_fit or {})[rows] for rows in batches]
        table.add_row(size.preset, *("any" if fit is None else f"{fit:,}" for fit in fits))
    return table


def _table(first_column: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first_column)
    return table


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size < 10 * GIB else f"{size / GIB:,.1f} GiB"
