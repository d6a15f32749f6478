"""`kvarn::attention`, `kvarn::step_`, `kvarn::step_shared_`: attention with or without an append.

`step_` attends to the old cache and the new tokens, then appends them: one op per layer and
forward, and each cache buffer is read first and mutated once, which compilers do without a copy.
When it is compiled for one token per row it becomes plain arithmetic plus `append_`; otherwise it
stays whole. `step_shared_` reads, besides, tiles that belong to several caches and never change:
the cache itself then holds the sequence without the tokens of those tiles. With a `window` a query
sees its own position and the `window - 1` before it; 0 means all. `attention` also takes a mask
`[B or 1, H_q or 1, S or 1, T]`, bool (True: is seen) or float (added to the scores), whose columns
are positions; a token at T or later is not seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .._compat import keeps_custom_ops
from ..config import KVarNConfig
from ..layout import PackedTiles, TileCache
from ..reference.attention import Visible
from .append import append_, store
from .attend import attend_decode_traced, attend_first
from .library import CACHE_ARGS, CACHE_MUTATED_ARGS, CACHE_RETURNS, SHARED_ARGS, define
from .portable import attention_portable, portable_target, step_portable
from .validate import (
    check_attention,
    check_for_kernels,
    check_kernel_arguments,
    check_mask,
    check_new_tokens,
    check_room,
    check_shared,
    check_window,
    waits,
)
from .visible import first_visible, new_visible

__all__ = ["attention", "step", "step_", "step_shared", "step_shared_"]

_CACHE_LEN = len(TileCache._fields)
_SHARED_LEN = len(PackedTiles._fields)


def _attention_kernel(q: Tensor, *rest: Any) -> Tensor:
    cache = TileCache(*rest[:_CACHE_LEN])
    rotation, sink_logits, scale, softcap, causal, config_line, backend, *more = rest[_CACHE_LEN:]
    config = KVarNConfig.from_string(config_line)
    window, mask = _window_and_mask(more)
    check_attention(q, cache, sink_logits)
    check_window(window, causal, None)
    check_mask(mask, q)
    later = causal and q.shape[2] > 1  # queries before the last one see less than the whole cache
    first = stop = None
    if later or window:
        stop = cache.seq_lens[:, None] - torch.arange(q.shape[2] - 1, -1, -1, device=q.device)
        first = stop - window if window else None
    if backend == "triton":
        check_kernel_arguments(cache, scale)
        return dispatch.attention(
            q, cache, rotation, sink_logits, scale, softcap, causal, config, first, mask
        )
    nothing = cache.k_tail[:, :, :0]
    new = torch.ones(q.shape[0], q.shape[2], 0, dtype=torch.bool, device=q.device)
    visible = Visible(new, first, stop if later else None, mask)
    return dispatch.attend(backend)(
        q,
        cache,
        nothing,
        nothing,
        visible,
        rotation,
        sink_logits,
        scale,
        softcap,
        config,
    )


def _window_and_mask(more: list[Any]) -> tuple[int, Tensor | None]:
    """The arguments with defaults: the dispatcher leaves out those that have them."""
    return (more[0] if more else 0), (more[1] if len(more) > 1 else None)


def _step_kernel(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any) -> Tensor:
    return _step(q, k, v, valid, None, *rest)


def _step_shared_kernel(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any
) -> Tensor:
    return _step(q, k, v, valid, PackedTiles(*rest[:_SHARED_LEN]), *rest[_SHARED_LEN:])


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    shared: PackedTiles | None,
    *rest: Any,
) -> Tensor:
    cache = TileCache(*rest[:_CACHE_LEN])
    rotation, sinks, scale, softcap, causal, config_line, backend, *more = rest[_CACHE_LEN:]
    config, window = KVarNConfig.from_string(config_line), more[0] if more else 0
    check_window(window, causal, shared)
    check_new_tokens(k, v, valid, cache, config)
    check_attention(q, cache, sinks)
    if shared is not None:
        check_shared(shared, cache, config, k.shape[2])
    if backend == "triton":
        check_for_kernels(cache, k, v, config, scale)
        check_room(cache, k.shape[2], config)
    plain = softcap == 0 and sinks is None and q.dtype == k.dtype and shared is None
    plain = plain and causal and backend != "reference"
    if plain and _may_look(backend, cache, k) and not bool(cache.seq_lens.any()):
        seen = None
        if valid is not None or 0 < window < k.shape[2]:
            seen = new_visible(q, k, valid, causal, window)
        out = attend_first(q, k, v, seen, scale)
    elif backend == "triton":
        return dispatch.step(
            q, k, v, valid, shared, cache, rotation, sinks, scale, softcap, causal, config,
            first_visible(cache, k, valid, window),
        )  # fmt: skip
    else:
        first = first_visible(cache, k, valid, window)
        visible = Visible(new_visible(q, k, valid, causal, window), first)
        attend = dispatch.attend(backend)
        out = attend(q, cache, k, v, visible, rotation, sinks, scale, softcap, config, shared)
    if backend == "triton":
        dispatch.append(cache, k, v, valid, rotation, config)
    else:
        store(cache, k, v, valid, rotation, config)
    return out.contiguous()  # SDPA returns a transposed view on CPU


def _may_look(backend: str, cache: TileCache, k: Tensor) -> bool:
    """Whether the lengths may be read to see if this is a prompt: kernels never wait in a step."""
    return backend != "triton" or (k.shape[2] > 1 and waits(cache, k.shape[2]))


def _step_functional(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    fresh = tuple(tensor.clone() for tensor in rest[:_CACHE_LEN])
    return (_step_kernel(q, k, v, valid, *fresh, *rest[_CACHE_LEN:]), *fresh)


def _step_shared_functional(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    shared, rest = rest[:_SHARED_LEN], rest[_SHARED_LEN:]
    fresh = tuple(tensor.clone() for tensor in rest[:_CACHE_LEN])
    return (_step_shared_kernel(q, k, v, valid, *shared, *fresh, *rest[_CACHE_LEN:]), *fresh)


def _attention_fake(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _step_fake(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _step_functional_fake(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return (out, *(torch.empty_like(tensor) for tensor in rest[:_CACHE_LEN]))


def _step_shared_functional_fake(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return _step_functional_fake(q, k, v, valid, *rest[_SHARED_LEN:])


def _step_traced(mode: Any, op: Any, types: Any, args: tuple, kwargs: dict | None) -> Any:
    """Decompose a compiled decode step; anything else stays one op."""
    q, k, v, valid, *rest = args
    shared = None
    if op is step_shared_:
        shared, rest = PackedTiles(*rest[:_SHARED_LEN]), rest[_SHARED_LEN:]
    cache = TileCache(*rest[:_CACHE_LEN])
    rotation, sinks, scale, softcap, causal, config_line, backend, *more = rest[_CACHE_LEN:]
    window = more[0] if more else 0
    decode = q.shape[2] == 1 and valid is None
    offloaded = cache.k_codes.device != q.device
    config, target = KVarNConfig.from_string(config_line), portable_target()
    if target is not None and shared is None and not offloaded:
        options = (cache, rotation, sinks, scale, softcap, causal, config, window, target)
        with mode:
            out, fresh = step_portable(q, k, v, valid, *options)
            for tensor, new in zip(cache, fresh, strict=True):
                tensor.copy_(new)
            return out
    whole = kwargs or not decode or offloaded or keeps_custom_ops()
    if backend == "triton":
        whole = whole or not dispatch.traces_kernels()
    if whole or backend == "reference":
        return mode.__torch_dispatch__(op, types, args, kwargs)
    with mode:
        first = first_visible(cache, k, None, window)
        if backend == "triton":
            return dispatch.step(
                q, k, v, None, shared, cache, rotation, sinks, scale, softcap, True, config,
                first, traced=True,
            )  # fmt: skip
        out = attend_decode_traced(
            q, cache, k, v, rotation, sinks, scale, softcap, config, shared, first
        )
        append_(k, v, None, *cache, rotation, config_line, backend)
        return out


def _attention_traced(mode: Any, op: Any, types: Any, args: tuple, kwargs: dict | None) -> Any:
    """Decompose compiled attention of one query per row; anything else stays one op."""
    q, *rest = args
    cache = TileCache(*rest[:_CACHE_LEN])
    rotation, sinks, scale, softcap, causal, config_line, backend, *more = rest[_CACHE_LEN:]
    window, mask = _window_and_mask(more)
    offloaded, target = cache.k_codes.device != q.device, portable_target()
    if target is not None and not offloaded and not kwargs:
        config = KVarNConfig.from_string(config_line)
        options = (rotation, sinks, scale, softcap, causal, config, window, mask, target)
        with mode:
            return attention_portable(q, cache, *options)
    whole = kwargs or q.shape[2] != 1 or offloaded or keeps_custom_ops()
    if whole or backend != "aten":
        return mode.__torch_dispatch__(op, types, args, kwargs)
    config = KVarNConfig.from_string(config_line)
    with mode:
        first = cache.seq_lens[:, None] - window if window else None
        nothing = cache.k_tail[:, :, :0]
        return attend_decode_traced(
            q, cache, nothing, nothing, rotation, sinks, scale, softcap, config, None, first, mask
        )


_TAIL_ARGS = (
    "Tensor rotation, Tensor? sink_logits, float scale, float softcap, bool causal, str config, "
    "str backend, int window=0"
)

attention = define(
    "attention",
    f"(Tensor q, {CACHE_ARGS}, {_TAIL_ARGS}, Tensor? mask=None) -> Tensor",
    _attention_kernel,
    _attention_fake,
    traced=_attention_traced,
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
step_shared_ = define(
    "step_shared_",
    f"(Tensor q, Tensor k, Tensor v, Tensor? valid, {SHARED_ARGS}, {CACHE_MUTATED_ARGS}, "
    f"{_TAIL_ARGS}) -> Tensor",
    _step_shared_kernel,
    _step_fake,
    traced=_step_traced,
)
step_shared = define(
    "step_shared",
    f"(Tensor q, Tensor k, Tensor v, Tensor? valid, {SHARED_ARGS}, {CACHE_ARGS}, {_TAIL_ARGS}) "
    f"-> (Tensor, {CACHE_RETURNS})",
    _step_shared_functional,
    _step_shared_functional_fake,
)
