"""Attention masks over a cache: columns are positions in the row, tokens lie elsewhere.

A mask `[B or 1, H_q or 1, S or 1, T]` is bool (True: is seen) or float (added to the scores). A
token at a position beyond T is not seen. Results broadcast against scores of a KV head's M query
rows, which are ordered by query head, then by query.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import KVarNConfig

__all__ = ["hide", "mask_of_slots", "mask_of_tiles"]


def hide(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with a mask of `mask_of_slots` or `mask_of_tiles` applied."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.float()


def mask_of_slots(
    mask: Tensor, positions: Tensor, num_kv_heads: int, q_per_kv: int, num_queries: int
) -> Tensor:
    """`[B, H_kv or 1, M or 1, slots]`: the mask of the tokens at `positions` `[B, slots]`."""
    batch, count = positions.shape
    inside = (positions >= 0) & (positions < mask.shape[-1])
    index = positions.clamp(0, mask.shape[-1] - 1)[:, None, None, :]
    mask = mask.expand(batch, -1, -1, -1)
    picked = mask.gather(-1, index.expand(-1, mask.shape[1], mask.shape[2], count))
    picked = picked.masked_fill(~inside[:, None, None, :], _hidden(mask))
    return _by_kv_head(picked, num_kv_heads, q_per_kv, num_queries)


def mask_of_tiles(
    mask: Tensor,
    tiles: int,
    config: KVarNConfig,
    num_kv_heads: int,
    q_per_kv: int,
    num_queries: int,
) -> Tensor:
    """`[B or 1, H_kv or 1, tiles, M or 1, group_size]`: the mask of the first `tiles` tiles."""
    group, first = config.group_size, config.num_sink_tokens
    missing = first + tiles * group - mask.shape[-1]
    if missing > 0:
        mask = F.pad(mask, (0, missing), value=_hidden(mask))
    mask = mask.narrow(-1, first, tiles * group)
    mask = _by_kv_head(mask, num_kv_heads, q_per_kv, num_queries)
    return mask.unflatten(-1, (tiles, group)).transpose(2, 3)


def _hidden(mask: Tensor) -> float:
    """What hides a token."""
    return 0.0 if mask.dtype == torch.bool else -torch.inf


def _by_kv_head(mask: Tensor, num_kv_heads: int, q_per_kv: int, num_queries: int) -> Tensor:
    """`[B, H_q or 1, S or 1, T]` to `[B, H_kv or 1, M or 1, T]`."""
    batch, heads, queries, columns = mask.shape
    if heads == 1 and queries == 1:
        return mask
    kv_heads = 1 if heads == 1 else num_kv_heads
    mask = mask.unflatten(1, (kv_heads, -1)).expand(-1, -1, q_per_kv, num_queries, -1)
    return mask.reshape(batch, kv_heads, q_per_kv * num_queries, columns)
