"""Checks that eager kernels run before they touch anything. Fakes check nothing, by design."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import KVarNConfig
from ..errors import CacheError, InputError
from ..layout import PackedTiles, TileCache, capacity
from ..reference.encode import refuse_nonfinite

__all__ = [
    "check_attention",
    "check_capacity",
    "check_for_kernels",
    "check_kernel_arguments",
    "check_mask",
    "check_new_tokens",
    "check_room",
    "check_shared",
    "check_tiles",
    "check_window",
    "waits",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_tiles(x: Tensor, config: KVarNConfig) -> None:
    """Whole tiles `[..., group_size, head_dim]` of a supported dtype."""
    if x.ndim < 2 or x.shape[-2] != config.group_size:
        raise InputError(
            f"tiles have shape {tuple(x.shape)}: give [..., group_size={config.group_size}, "
            "head_dim]."
        )
    _check_dtype("tiles", x)


def check_new_tokens(
    k: Tensor, v: Tensor, valid: Tensor | None, cache: TileCache, config: KVarNConfig
) -> None:
    """New keys and values fit the cache in shape, dtype and device."""
    batch, heads, _, head_dim = cache.k_tail.shape
    for name, x in (("k", k), ("v", v)):
        _check_dtype(name, x)
        if x.ndim != 4 or x.shape[1] != heads or x.shape[3] != head_dim:
            raise InputError(
                f"{name} has shape {tuple(x.shape)}: this cache takes [batch, {heads}, tokens, "
                f"{head_dim}]."
            )
        if x.shape[0] != batch:
            raise InputError(
                f"{name} has batch size {x.shape[0]}, the cache was allocated for {batch} rows: "
                "make a new cache, or call reset() on one that was made by hand."
            )
        if x.dtype != cache.k_tail.dtype:
            raise InputError(
                f"{name} is {x.dtype}, the cache holds {cache.k_tail.dtype}: make the cache after "
                "casting the model."
            )
        if x.device != cache.k_tail.device:
            raise InputError(
                f"{name} is on {x.device}, the cache on {cache.k_tail.device}: move one of them."
            )
    if k.shape != v.shape:
        raise InputError(f"k {tuple(k.shape)} and v {tuple(v.shape)} differ in shape.")
    if valid is not None and (valid.shape != (batch, k.shape[2]) or valid.dtype != torch.bool):
        raise InputError(
            f"valid is {valid.dtype} {tuple(valid.shape)}: give bool [{batch}, {k.shape[2]}]."
        )


def check_attention(q: Tensor, cache: TileCache, sink_logits: Tensor | None) -> None:
    """Queries match the cache's heads, width and device."""
    batch, heads, _, head_dim = cache.k_tail.shape
    _check_dtype("q", q)
    if q.ndim != 4 or q.shape[0] != batch or q.shape[1] % heads or q.shape[3] != head_dim:
        raise InputError(
            f"q has shape {tuple(q.shape)}: this cache takes [{batch}, a multiple of {heads}, "
            f"queries, {head_dim}]."
        )
    if q.device != cache.k_tail.device:
        raise InputError(f"q is on {q.device}, the cache on {cache.k_tail.device}.")
    if sink_logits is not None and sink_logits.shape != (q.shape[1],):
        raise InputError(
            f"sink_logits has shape {tuple(sink_logits.shape)}: give one logit per query head, "
            f"[{q.shape[1]}]."
        )


def check_mask(mask: Tensor | None, q: Tensor) -> None:
    """A mask broadcasts against scores `[B, H_q, S, T]` for some T."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        _check_dtype("mask", mask)
    lead = zip(mask.shape[:3], q.shape[:3], strict=False)
    if mask.ndim != 4 or any(given not in (1, full) for given, full in lead) or not mask.shape[3]:
        raise InputError(
            f"mask has shape {tuple(mask.shape)}: give [batch {q.shape[0]} or 1, heads "
            f"{q.shape[1]} or 1, queries {q.shape[2]} or 1, positions]."
        )
    if mask.device != q.device:
        raise InputError(f"mask is on {mask.device}, the queries on {q.device}: move one of them.")


def check_shared(shared: PackedTiles, cache: TileCache, config: KVarNConfig, tokens: int) -> None:
    """Shared tiles have the cache's geometry, and its rows are whole copies of their rows."""
    for name, tensor in zip(PackedTiles._fields, shared, strict=True):
        own = getattr(cache, name)
        if tensor.shape[1:2] + tensor.shape[3:] != own.shape[1:2] + own.shape[3:]:
            raise InputError(
                f"shared_{name} has shape {tuple(tensor.shape)}, the cache's own "
                f"{tuple(own.shape)}: only rows and tiles may differ in number."
            )
    rows, sources = cache.k_tail.shape[0], shared.k_codes.shape[0]
    if not sources or rows % sources:
        raise InputError(f"{rows} rows cannot share the tiles of {sources}: give a multiple.")
    if waits(cache, tokens) and int(cache.seq_lens.min()) < config.num_sink_tokens:
        raise InputError("a row with shared tiles holds all its sinks: seq_lens is too small.")


def check_capacity(cache: TileCache, needed: int, config: KVarNConfig) -> None:
    """The longest row still fits after the append."""
    limit = capacity(config, cache.k_codes.shape[2])
    if needed > limit:
        raise CacheError(
            f"the KVarN cache is full: it has room for {limit} tokens per row and {needed} are "
            f"needed. Create it with max_cache_len={needed} or more."
        )


def check_window(window: int, causal: bool, shared: PackedTiles | None) -> None:
    """A sliding window goes with causal attention, and not with shared tiles."""
    if window < 0:
        raise InputError(f"window={window}: give the number of visible tokens, or 0 for all.")
    if window and not causal:
        raise InputError("a sliding window needs causal=True.")
    if window and shared is not None:
        raise InputError("a sliding window over tiles that rows share is not supported.")


def check_for_kernels(
    cache: TileCache, k: Tensor, v: Tensor, config: KVarNConfig, scale: float = 1.0
) -> None:
    """What Triton kernels cannot check themselves, room aside."""
    check_kernel_arguments(cache, scale)
    if cache.k_codes.device != k.device:
        raise InputError(
            f"tiles are offloaded to {cache.k_codes.device}, which Triton kernels do not read: use "
            'backend="aten" for this cache.'
        )
    if config.check_finite:
        refuse_nonfinite(k)
        refuse_nonfinite(v)


def check_room(cache: TileCache, tokens: int, config: KVarNConfig) -> None:
    """The longest row still fits after `tokens` more, as far as it costs no synchronization.

    A decode step on a GPU is not checked, and neither is a graph that is being captured: tokens
    too many make the row's outputs NaN there, and nothing else is touched.
    """
    if waits(cache, tokens):
        check_capacity(cache, int(cache.seq_lens.max()) + tokens, config)


def check_kernel_arguments(cache: TileCache, scale: float) -> None:
    """Kernels address a cache by its shape, and fold the scale into a maximum."""
    if scale <= 0:
        raise InputError(f"scale={scale}: kernels need a positive one; negate the queries instead.")
    for name, tensor in zip(TileCache._fields, cache, strict=True):
        if not tensor.is_contiguous():
            raise InputError(f"{name} is not contiguous: give kernels a whole cache, not a view.")


def waits(cache: TileCache, tokens: int) -> bool:
    """Whether values may be read on the host: not in a GPU's decode step, nor while capturing."""
    if not cache.seq_lens.is_cuda:
        return True
    return tokens > 1 and not torch.cuda.is_current_stream_capturing()


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise InputError(f"{name} is {x.dtype}: give float16, bfloat16 or float32.")
