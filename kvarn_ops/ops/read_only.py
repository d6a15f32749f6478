"""`kvarn::step_attention`, `kvarn::attend_slots`: attention of a step that stores its tokens later.

Inference engines do not change their inputs, so that a step is split: the engine attends to the
cache and to the new tokens, and `append_` stores these afterwards. Both ops take the codes as int8
or uint8 and the lengths as int32 or int64.

`step_attention` is the attention of `step_` without a mask. `attend_slots` is the part of it that
one kernel does: partial softmaxes of dense tokens and of quantized tiles (`plain` says what they
are) in `dense_slots + splits` slots. How tokens are dealt to slots is up to the implementation.
There are `ratio` query heads per KV head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..config import KVarNConfig
from ..errors import InputError
from ..layout import PackedTiles, TileCache
from ..reference.attention import Visible
from .library import CACHE_ARGS, define
from .plain import dense_slot, tile_slot
from .validate import check_attention, check_kernel_arguments, check_new_tokens
from .visible import new_visible

__all__ = ["as_engines_take", "as_stored", "attend_slots", "step_attention"]

_CACHE_LEN = len(TileCache._fields)


def as_stored(cache: TileCache) -> TileCache:
    """The cache with codes and lengths of the dtypes that it is stored in; codes are views."""
    return cache._replace(
        k_codes=cache.k_codes.view(torch.uint8),
        v_codes=cache.v_codes.view(torch.uint8),
        seq_lens=cache.seq_lens.long(),
    )


def as_engines_take(cache: TileCache) -> TileCache:
    """The cache with codes viewed as int8 and a copy of the lengths in int32."""
    return cache._replace(
        k_codes=cache.k_codes.view(torch.int8),
        v_codes=cache.v_codes.view(torch.int8),
        seq_lens=cache.seq_lens.int(),
    )


def _step_attention_kernel(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    cache = as_stored(TileCache(*rest[:_CACHE_LEN]))
    rotation, sink_logits, scale, softcap, config_line, backend = rest[_CACHE_LEN:]
    config = KVarNConfig.from_string(config_line)
    check_new_tokens(k, v, None, cache, config)
    check_attention(q, cache, sink_logits)
    if backend == "triton":
        check_kernel_arguments(cache, scale)
        return dispatch.step_attention(
            q, k, v, cache, rotation, sink_logits, scale, softcap, config
        )
    attend = dispatch.attend(backend)
    visible = Visible(new_visible(q, k, None, True))
    out = attend(q, cache, k, v, visible, rotation, sink_logits, scale, softcap, config)
    return out.contiguous()


def _step_attention_fake(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


step_attention = define(
    "step_attention",
    f"(Tensor q, Tensor k, Tensor v, {CACHE_ARGS}, Tensor rotation, Tensor? sink_logits, "
    "float scale, float softcap, str config, str backend) -> Tensor",
    _step_attention_kernel,
    _step_attention_fake,
)


def _attend_slots_kernel(
    q: Tensor, rotated: Tensor, unit: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, scale, softcap, lag, ratio, dense_slots, splits = rest
    *fields, k_new, v_new, lengths = tensors
    if min(dense_slots, splits) < 1:
        raise InputError(f"{dense_slots} and {splits} slots: give at least one of each kind.")
    if q.device.type == "cuda":
        return dispatch.attend_slots(
            (q, rotated, unit, *tensors), scale, softcap, lag, ratio, dense_slots, splits
        )
    # Equalizers are applied outside.
    cache = TileCache(*fields, unit, unit, lengths)
    rank = torch.arange(k_new.shape[2], dtype=torch.float32)
    dense = dense_slot(q, ratio, cache, k_new, v_new, rank, lag, scale, softcap)
    tiles = PackedTiles(*fields[: len(PackedTiles._fields)])
    packed = tile_slot(rotated, unit, tiles, lengths, cache.k_sink.shape[2], lag, scale, softcap)
    made = _attend_slots_fake(q, rotated, unit, *rest)
    for whole, one, other in zip(made, dense, packed, strict=True):
        whole.zero_()
        whole.narrow(2, 0, 1).copy_(one)
        whole.narrow(2, dense_slots, 1).copy_(other)
    return made


def _attend_slots_fake(
    q: Tensor, rotated: Tensor, unit: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, head_dim = q.shape
    lead = (batch, heads, rest[-2] + rest[-1], rows)
    sizes = ((*lead, head_dim), lead, lead)
    part, peak, weight = (q.new_empty(size, dtype=torch.float32) for size in sizes)
    return part, peak, weight


_SLOT_FIELDS = ", ".join(f"Tensor {name}" for name in TileCache._fields[:-3])

attend_slots = define(
    "attend_slots",
    f"(Tensor q, Tensor rotated, Tensor unit, {_SLOT_FIELDS}, Tensor k_new, Tensor v_new, "
    "Tensor lengths, float scale, float softcap, int tail_tokens, int ratio, int dense_slots, "
    "int splits) "
    "-> (Tensor, Tensor, Tensor)",
    _attend_slots_kernel,
    _attend_slots_fake,
)
