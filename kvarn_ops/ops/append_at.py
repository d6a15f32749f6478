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
from ..layout import TileCache
from .append import drop_open_equalizers, store
from .library import CACHE_ARGS, CACHE_MUTATED_ARGS, CACHE_RETURNS, define
from .portable import append_at_portable, portable_target
from .position import check_start, checked_start
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
        check_start(int(start), count, cache.seq_lens, high_water, max_cache_len, config)
        check_capacity(cache, int(start) + count, config)
        lengths = start.expand_as(cache.seq_lens)
    else:
        lengths = checked_start(start, count, cache, high_water, max_cache_len, config)
    if backend == "triton":
        check_for_kernels(cache, k, v, config)
    high_water.copy_(torch.maximum(high_water, cache.seq_lens).masked_fill_(lengths == 0, 0))
    cache.seq_lens.copy_(lengths)
    drop_open_equalizers(cache, config)
    if backend == "triton":
        dispatch.append(cache, k, v, None, rotation, config)
    else:
        store(cache, k, v, None, rotation, config)


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


def _append_at_traced(mode: Any, op: Any, types: Any, args: tuple, kwargs: dict | None) -> Any:
    """Written out for programs without custom ops; else one op."""
    k, v, position, high_water, *rest = args
    cache, target = TileCache(*rest[:_CACHE_LEN]), portable_target()
    if target is None or cache.k_codes.device != k.device:
        return mode.__torch_dispatch__(op, types, args, kwargs)
    rotation, config_line, _, max_cache_len = rest[_CACHE_LEN:]
    config = KVarNConfig.from_string(config_line)
    with mode:
        fresh_water, fresh = append_at_portable(
            k, v, position, high_water, cache, rotation, config, max_cache_len, target
        )
        for tensor, new in zip((high_water, *cache), (fresh_water, *fresh), strict=True):
            tensor.copy_(new)


_OPTIONS = "Tensor rotation, str config, str backend, int max_cache_len"

append_at_ = define(
    "append_at_",
    f"(Tensor k, Tensor v, Tensor position, Tensor(z!) high_water, {CACHE_MUTATED_ARGS}, "
    f"{_OPTIONS}) -> ()",
    _append_at_kernel,
    _append_at_fake,
    traced=_append_at_traced,
)
append_at = define(
    "append_at",
    f"(Tensor k, Tensor v, Tensor position, Tensor high_water, {CACHE_ARGS}, {_OPTIONS}) "
    f"-> (Tensor, {CACHE_RETURNS})",
    _append_at_functional,
    _append_at_functional_fake,
)
