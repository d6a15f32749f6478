"""Where new tokens may go, for caches that are told where they write."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import KVarNConfig
from ..crop import check_crop
from ..errors import CacheError
from ..layout import TileCache, capacity
from .dense import tiles_of

__all__ = ["check_start", "checked_start"]


def check_start(
    start: int,
    count: int,
    lengths: Tensor,
    high_water: Tensor,
    max_cache_len: int,
    config: KVarNConfig,
) -> None:
    """Raise unless every row can continue at `start`."""
    if start < 0 or start + count > max_cache_len:
        raise CacheError(
            f"tokens at positions {start} to {start + count - 1} do not fit a cache of "
            f"{max_cache_len} tokens: make it with a larger max_cache_len, or start at position 0."
        )
    if start == 0:
        return
    for row, length in enumerate(lengths.tolist()):
        if start > length:
            raise CacheError(
                f"position {start} leaves a gap: row {row} holds {length} tokens. Append at "
                f"position {length}, or start a new sequence at position 0."
            )
        if start < length:
            one = slice(row, row + 1)
            most = torch.maximum(high_water, lengths)[one]
            check_crop(length - start, lengths[one], most, config, None)


def checked_start(
    start: Tensor,
    count: int,
    cache: TileCache,
    high_water: Tensor,
    max_cache_len: int,
    config: KVarNConfig,
) -> Tensor:
    """`[B]` int64: `start`, or more than fits where `check_start` would raise.

    Rows that are too long give NaN and are written no more, until they start again at 0.
    """
    sinks, tail = config.num_sink_tokens, config.tail_tokens
    lengths = cache.seq_lens
    tail_start = tiles_of(start, config) * config.group_size
    oldest_held = torch.maximum(high_water, lengths) - sinks - config.ring_len
    exact = (lengths - start <= tail) & (
        (tail_start >= oldest_held) | (tail_start >= start - sinks)
    )
    fits = (start >= 0) & (start + count <= max_cache_len)
    good = fits & ((start == 0) | ((start <= lengths) & exact))
    too_long = capacity(config, cache.k_codes.shape[2]) + tail + 1
    return torch.where(good, start, too_long)
