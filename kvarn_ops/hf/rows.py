"""Rows of what a packed layer stores: reordered, repeated or left out, in new memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..layout import PackedTiles

__all__ = ["selected", "selected_shared"]


def selected(tensors: Iterable[Tensor], rows: Tensor) -> list[Tensor]:
    """Rows `rows` `[n]` int64 of every tensor `[B, ...]`, on the tensor's device."""
    return [tensor.index_select(0, rows.to(tensor.device)) for tensor in tensors]


def selected_shared(shared: PackedTiles, rows: Tensor, batch_size: int) -> PackedTiles:
    """Tiles that several rows share, for rows `rows` `[n]` int64 of `batch_size`.

    They stay shared if every new row comes from the same one, or in the same order.
    """
    sources = shared.k_codes.shape[0]
    if sources == 1:
        return shared
    origin = rows // (batch_size // sources)
    regular = torch.arange(sources, device=rows.device)
    regular = regular.repeat_interleave(-(-len(rows) // sources))
    return shared if torch.equal(origin, regular) else PackedTiles(*selected(shared, origin))
