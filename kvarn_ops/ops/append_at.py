"""`kvarn::append_at_`: store new tokens at a given position of every row.

For caches that are told where they write: position 0 starts a new sequence, a position before the
end removes the tokens from there on (exactly, up to `tail_tokens` of them), the end appends, and a
gap is an error. `high_water` `[B]` int64 is the most tokens that each row held since its start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..config import KVarNConfig
from ..crop import check_crop
from ..errors import CacheError
from ..layout import TileCache, capacity
from .append import drop_open_equalizers, store
from .dense import tiles_of
from .library import CACHE_ARGS, CACHE_MUTATED_ARGS, CACHE_RETURNS, define
from .validate import check_capacity, check_for_kernels, check_new_tokens, waits

__all__ = ["append_at", "append_at_"]

_CACHE_LEN = len(TileCache._fields)


def _append_at_kernel(
    k: Tensor, v: Tensor, position: Tensor, high_water: Tensor, *rest: Any
) -> None:
    cache = TileCache(*rest[:_CACHE_LEN])
    rotation, config_line, backend, max_cache_len = rest[_CACHE_LEN:]
    config = KVarNConfig.from_string(config_line)
    check_new_tokens(k, v, None, cache, config)
    # Compiled code may pass `seq_lens` itself, although the caller cloned it.
    start, count = position.flatten()[0].clone(), k.shape[2]
    if backend != "triton" or waits(cache, count):
        _check_start(int(start), count, cache.seq_lens, high_water, max_cache_len, config)
        check_capacity(cache, int(start) + count, config)
        lengths = start.expand_as(cache.seq_lens)
    else:
        lengths = _checked_on_device(start, count, cache, high_water, max_cache_len, config)
    if backend == "triton":
        check_for_kernels(cache, k, v, config)
    high_water.copy_(torch.maximum(high_water, cache.seq_lens).masked_fill_(lengths == 0, 0))
    cache.seq_lens.copy_(lengths)
    drop_open_equalizers(cache, config)
    if backend == "triton":
        dispatch.append(cache, k, v, None, rotation, config)
    else:
        store(cache, k, v, None, rotation, config)


def _check_start(
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


def _checked_on_device(
    start: Tensor,
    count: int,
    cache: TileCache,
    high_water: Tensor,
    max_cache_len: int,
    config: KVarNConfig,
) -> Tensor:
    """`[B]` int64: `start`, or more than fits where `_check_start` would raise.

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


def _append_at_functional(
    k: Tensor, v: Tensor, position: Tensor, high_water: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    fresh = tuple(tensor.clone() for tensor in (high_water, *rest[:_CACHE_LEN]))
    _append_at_kernel(k, v, position, *fresh, *rest[_CACHE_LEN:])
    return fresh


def _append_at_fake(*args: Any) -> None:
    return None


def _append_at_functional_fake(
    k: Tensor, v: Tensor, position: Tensor, high_water: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in (high_water, *rest[:_CACHE_LEN]))


_OPTIONS = "Tensor rotation, str config, str backend, int max_cache_len"

append_at_ = define(
    "append_at_",
    f"(Tensor k, Tensor v, Tensor position, Tensor(z!) high_water, {CACHE_MUTATED_ARGS}, "
    f"{_OPTIONS}) -> ()",
    _append_at_kernel,
    _append_at_fake,
)
append_at = define(
    "append_at",
    f"(Tensor k, Tensor v, Tensor position, Tensor high_water, {CACHE_ARGS}, {_OPTIONS}) "
    f"-> (Tensor, {CACHE_RETURNS})",
    _append_at_functional,
    _append_at_functional_fake,
)
