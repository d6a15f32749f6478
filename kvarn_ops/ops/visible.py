"""Which tokens the queries of new tokens see: causal order, padding, a sliding window."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import TileCache

__all__ = ["first_visible", "new_visible"]


def _ranks(k: Tensor, valid: Tensor | None) -> Tensor:
    """`[B or 1, S]` int64: how many new tokens of its row come before each one, padding aside."""
    if valid is None:
        return torch.arange(k.shape[2], device=k.device).unsqueeze(0)
    return valid.cumsum(-1) - valid.long()


def first_visible(cache: TileCache, k: Tensor, valid: Tensor | None, window: int) -> Tensor | None:
    """`[B, S]` int64: the first position that each new token sees; None without a window."""
    return cache.seq_lens[:, None] + _ranks(k, valid) + (1 - window) if window else None


def new_visible(
    q: Tensor, k: Tensor, valid: Tensor | None, causal: bool, window: int = 0
) -> Tensor:
    """`[B, S, S]` bool: which new tokens each query sees."""
    batch, count = q.shape[0], k.shape[2]
    visible = torch.ones(count, count, dtype=torch.bool, device=q.device)
    visible = (visible.tril() if causal else visible).expand(batch, -1, -1)
    if window:
        rank = _ranks(k, valid)
        visible = visible & (rank.unsqueeze(1) > rank.unsqueeze(2) - window)
    return visible if valid is None else visible & valid.unsqueeze(1)
