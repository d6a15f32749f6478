"""`kvarn::attention`, `kvarn::step_` and `kvarn::step`: attention with or without an append.

`step_` attends to the old cache and the new tokens, then appends them: one op per layer and
forward, and each cache buffer is read first and mutated once, which compilers do without a copy.
When it is compiled for one token per row it becomes plain arithmetic plus `append_`; otherwise it
stays whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .._compat import keeps_custom_ops
from ..config import KVarNConfig
from ..layout import TileCache
from .append import append_, store
from .attend import attend_decode_traced, attend_first
from .library import CACHE_ARGS, CACHE_MUTATED_ARGS, CACHE_RETURNS, define
from .validate import check_attention, check_new_tokens

__all__ = ["attention", "step", "step_"]

_CACHE_LEN = len(TileCache._fields)


def _attention_kernel(q: Tensor, *rest: Any) -> Tensor:
    cache = TileCache(*rest[:_CACHE_LEN])
    rotation, sink_logits, scale, softcap, causal, config_line, backend = rest[_CACHE_LEN:]
    config = KVarNConfig.from_string(config_line)
    check_attention(q, cache, sink_logits)
    nothing = cache.k_tail[:, :, :0]
    new_visible = torch.ones(q.shape[0], q.shape[2], 0, dtype=torch.bool, device=q.device)
    limit = None
    if causal and q.shape[2] > 1:
        limit = cache.seq_lens[:, None] - torch.arange(q.shape[2] - 1, -1, -1, device=q.device)
    return dispatch.attend(backend)(
        q,
        cache,
        nothing,
        nothing,
        new_visible,
        limit,
        rotation,
        sink_logits,
        scale,
        softcap,
        config,
    )


def _step_kernel(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any) -> Tensor:
    cache = TileCache(*rest[:_CACHE_LEN])
    rotation, sink_logits, scale, softcap, causal, config_line, backend = rest[_CACHE_LEN:]
    config = KVarNConfig.from_string(config_line)
    check_new_tokens(k, v, valid, cache, config)
    check_attention(q, cache, sink_logits)
    attend = dispatch.attend(backend)
    plain = softcap == 0 and sink_logits is None and q.dtype == k.dtype
    if plain and backend == "aten" and causal and not bool(cache.seq_lens.any()):
        visible = None if valid is None else _new_visible(q, k, valid, causal)
        out = attend_first(q, k, v, visible, scale)
    else:
        visible = _new_visible(q, k, valid, causal)
        out = attend(q, cache, k, v, visible, None, rotation, sink_logits, scale, softcap, config)
    store(cache, k, v, valid, rotation, config)
    return out.contiguous()  # SDPA returns a transposed view on CPU


def _new_visible(q: Tensor, k: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
    """`[B, S, S]` bool: which new tokens each query sees."""
    batch, count = q.shape[0], k.shape[2]
    visible = torch.ones(count, count, dtype=torch.bool, device=q.device)
    visible = (visible.tril() if causal else visible).expand(batch, -1, -1)
    return visible if valid is None else visible & valid.unsqueeze(1)


def _step_functional(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    fresh = tuple(tensor.clone() for tensor in rest[:_CACHE_LEN])
    return (_step_kernel(q, k, v, valid, *fresh, *rest[_CACHE_LEN:]), *fresh)


def _attention_fake(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _step_fake(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _step_functional_fake(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return (out, *(torch.empty_like(tensor) for tensor in rest[:_CACHE_LEN]))


def _step_traced(mode: Any, op: Any, types: Any, args: tuple, kwargs: dict | None) -> Any:
    """Decompose a compiled decode step; anything else stays one op."""
    q, k, v, valid, *rest = args
    rotation, sink_logits, scale, softcap, _, config_line, backend = rest[_CACHE_LEN:]
    decode = q.shape[2] == 1 and valid is None
    if kwargs or not decode or backend != "aten" or keeps_custom_ops():
        return mode.__torch_dispatch__(op, types, args, kwargs)
    with mode:
        cache = TileCache(*rest[:_CACHE_LEN])
        config = KVarNConfig.from_string(config_line)
        out = attend_decode_traced(q, cache, k, v, rotation, sink_logits, scale, softcap, config)
        append_(k, v, None, *cache, rotation, config_line)
        return out


_TAIL_ARGS = (
    "Tensor rotation, Tensor? sink_logits, float scale, float softcap, bool causal, str config, "
    "str backend"
)

attention = define(
    "attention",
    f"(Tensor q, {CACHE_ARGS}, {_TAIL_ARGS}) -> Tensor",
    _attention_kernel,
    _attention_fake,
)
step_ = define(
    "step_",
    f"(Tensor q, Tensor k, Tensor v, Tensor? valid, {CACHE_MUTATED_ARGS}, {_TAIL_ARGS}) -> Tensor",
    _step_kernel,
    _step_fake,
    traced=_step_traced,
)
step = define(
    "step",
    f"(Tensor q, Tensor k, Tensor v, Tensor? valid, {CACHE_ARGS}, {_TAIL_ARGS}) "
    f"-> (Tensor, {CACHE_RETURNS})",
    _step_functional,
    _step_functional_fake,
)
