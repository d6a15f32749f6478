"""A step without custom ops, for programs that leave Python: AOTInductor, ONNX, engines.

The arithmetic of `kvarn::step_` as one straight graph for any number of new tokens up to a limit.
Lengths are read by the graph and never by Python. Tiles are encoded behind a conditional, so that a
step that finishes none does not pay for it. Nothing can be raised there: a row with more tokens
than fit gives NaN, and its tiles are written no more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import KVarNConfig
from ..layout import PackedTiles, TileCache, capacity
from ..reference.attention import Visible
from .attend import attend_decode_traced, attend_traced
from .dense import tiles_of
from .portable_append import append_portable, as_operand
from .position import checked_start
from .visible import first_visible, new_visible

__all__ = [
    "PortableTarget",
    "append_at_portable",
    "attention_portable",
    "portable",
    "portable_target",
    "step_portable",
]

_NOT_PACKED = [name for name in TileCache._fields if name not in PackedTiles._fields]

Branch = Callable[..., "tuple[Tensor]"]


class PortableTarget(NamedTuple):
    """What a program without custom ops is traced for.

    Without a limit of new tokens, `append_at_` takes what the shapes of the program allow.
    `fast_decode` adds a branch for one new token in the form that Inductor fuses. `on_step` is
    called whenever the attention of a layer has been traced.
    """

    max_new_tokens: int | None
    fast_decode: bool
    on_step: Callable[[], None] | None = None


_target: ContextVar[PortableTarget | None] = ContextVar("kvarn_portable_target", default=None)


@contextmanager
def portable(
    max_new_tokens: int | None, *, fast_decode: bool, on_step: Callable[[], None] | None = None
) -> Iterator[None]:
    """Steps traced in this block, by `run_decompositions` say, contain none of our ops."""
    token = _target.set(PortableTarget(max_new_tokens, fast_decode, on_step))
    try:
        yield
    finally:
        _target.reset(token)


def portable_target() -> PortableTarget | None:
    """The target of the block `portable` that is open."""
    return _target.get()


def step_portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    cache: TileCache,
    rotation: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    causal: bool,
    config: KVarNConfig,
    window: int,
    target: PortableTarget,
) -> tuple[Tensor, TileCache]:
    """Attend to the cache and to the new tokens, and the cache with them.

    Parameters
    ----------
    q, k, v : Tensor
        `[B, H_q, S, D]` and `[B, H_kv, S, D]`, S at most `target.max_new_tokens`.
    valid : Tensor or None
        `[B, S]` bool, False for padding.
    window : int
        How many tokens a query sees; 0 means all.

    Returns
    -------
    out : Tensor
        `[B, H_q, S, D]`.
    cache : TileCache
        New tensors; the old ones are not written.
    """
    q, k, v = as_operand(q), as_operand(k), as_operand(v)
    cache = _variable(cache)
    operands = [q, k, v, valid, *cache, rotation, sink_logits]

    # Conditionals give tuples: Inductor takes a lone tensor for a sequence of results.
    def one(*given: Tensor) -> tuple[Tensor]:
        q, k, v, _, *tensors, rotation, sinks = _absent_as_none(operands, given)
        cache = TileCache(*tensors)
        first = first_visible(cache, k, None, window)
        first = None if first is None else first.narrow(1, 0, 1)
        q, k, v = (x.narrow(2, 0, 1) for x in (q, k, v))
        out = attend_decode_traced(
            q, cache, k, v, rotation, sinks, scale, softcap, config, None, first
        )
        return (out.expand(-1, -1, given[0].shape[2], -1).contiguous(),)

    def several(*given: Tensor) -> tuple[Tensor]:
        q, k, v, valid, *tensors, rotation, sinks = _absent_as_none(operands, given)
        cache = TileCache(*tensors)
        visible = Visible(
            new_visible(q, k, valid, causal, window), first_visible(cache, k, valid, window)
        )
        options = (rotation, sinks, scale, softcap, config)
        return (attend_traced(q, cache, k, v, visible, *options).contiguous(),)

    fast = target.fast_decode and valid is None
    out = _either(q.shape[2], one if fast else None, several, operands)
    after = append_portable(k, v, valid, cache, rotation, config, _most(target, k))
    if target.on_step is not None:
        target.on_step()
    return _unless_full(out, after, config), after


def attention_portable(
    q: Tensor,
    cache: TileCache,
    rotation: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    causal: bool,
    config: KVarNConfig,
    window: int,
    mask: Tensor | None,
    target: PortableTarget,
) -> Tensor:
    """Attend to what a cache holds, as `kvarn::attention` does; q `[B, H_q, S, D]`.

    The queries are those of the newest tokens; `mask` is `[B or 1, H_q or 1, S or 1, T]`.
    """
    q, cache = as_operand(q), _variable(cache)
    # What an append has just computed; tiles are where they always are.
    small = {name: as_operand(getattr(cache, name)) for name in _NOT_PACKED}
    cache = cache._replace(**small)
    mask = None if mask is None else as_operand(mask)
    operands = [q, *cache, rotation, sink_logits, mask]

    def one(*given: Tensor) -> tuple[Tensor]:
        q, *tensors, rotation, sinks, mask = _absent_as_none(operands, given)
        cache = TileCache(*tensors)
        nothing = cache.k_tail[:, :, :0]
        first = cache.seq_lens[:, None] - window if window else None
        mask = None if mask is None else mask.narrow(2, 0, 1)
        q = q.narrow(2, 0, 1)
        out = attend_decode_traced(
            q, cache, nothing, nothing, rotation, sinks, scale, softcap, config, None, first, mask
        )
        return (out.expand(-1, -1, given[0].shape[2], -1).contiguous(),)

    def several(*given: Tensor) -> tuple[Tensor]:
        q, *tensors, rotation, sinks, mask = _absent_as_none(operands, given)
        cache = TileCache(*tensors)
        nothing, queries = cache.k_tail[:, :, :0], q.shape[2]
        stop = cache.seq_lens[:, None] + torch.arange(1 - queries, 1, device=q.device)
        none_new = torch.ones(q.shape[0], queries, 0, dtype=torch.bool, device=q.device)
        visible = Visible(
            none_new, stop - window if window else None, stop if causal else None, mask
        )
        options = (rotation, sinks, scale, softcap, config)
        return (attend_traced(q, cache, nothing, nothing, visible, *options).contiguous(),)

    out = _either(q.shape[2], one if target.fast_decode else None, several, operands)
    if target.on_step is not None:
        target.on_step()
    return _unless_full(out, cache, config)


def append_at_portable(
    k: Tensor,
    v: Tensor,
    position: Tensor,
    high_water: Tensor,
    cache: TileCache,
    rotation: Tensor,
    config: KVarNConfig,
    max_cache_len: int,
    target: PortableTarget,
) -> tuple[Tensor, TileCache]:
    """`high_water` and the cache with new tokens at `position`, as `kvarn::append_at_` has them.

    A row that cannot continue there becomes too long, and gives NaN until it starts again at 0.
    """
    k, v, cache = as_operand(k), as_operand(v), _variable(cache)
    start = checked_start(
        position.flatten()[0], k.shape[2], cache, high_water, max_cache_len, config
    )
    high_water = torch.maximum(high_water, cache.seq_lens).masked_fill(start == 0, 0)
    open_again = (tiles_of(start, config) == 0)[:, None, None]
    cache = cache._replace(
        seq_lens=start,
        k_equalizer=cache.k_equalizer.masked_fill(open_again, 0.0),
        v_equalizer=cache.v_equalizer.masked_fill(open_again, 0.0),
    )
    most = min(_most(target, k), max_cache_len)
    return high_water, append_portable(k, v, None, cache, rotation, config, most)


def _most(target: PortableTarget, k: Tensor) -> int:
    """New tokens `k` `[B, H, S, D]` of a call: the target's limit, or what the shapes allow."""
    if target.max_new_tokens is not None:
        return target.max_new_tokens
    size: Any = k.shape[2]
    if isinstance(size, int):
        return size
    upper = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(upper) if upper.is_finite else sys.maxsize


def _variable(cache: TileCache) -> TileCache:
    """The cache with lengths that nobody takes for a constant.

    Fake tensors of torch 2.13 do so with a buffer of one element, also if it changes; a sum with
    something else is none.
    """
    batch, device = cache.seq_lens.shape[0], cache.seq_lens.device
    return cache._replace(
        seq_lens=cache.seq_lens + torch.zeros(batch, dtype=torch.int64, device=device)
    )


def _either(
    queries: Any, one: Branch | None, several: Branch, operands: list[Tensor | None]
) -> Tensor:
    """Attention by `one` where there is one query, if such a branch is wanted."""
    present = tuple(x for x in operands if x is not None)
    if one is None:
        return several(*present)[0]
    if isinstance(queries, int):  # known when it is traced
        return (one if queries == 1 else several)(*present)[0]
    return torch.ops.higher_order.cond(queries == 1, one, several, present)[0]


def _unless_full(out: Tensor, cache: TileCache, config: KVarNConfig) -> Tensor:
    """NaN for rows with more tokens than fit."""
    full = cache.seq_lens > capacity(config, cache.k_codes.shape[2])
    return out.masked_fill(full[:, None, None, None], torch.nan)


def _absent_as_none(operands: list[Tensor | None], present: tuple[Tensor, ...]) -> list[Any]:
    """`present` in the places of `operands` that are not None."""
    rest = iter(present)
    return [None if x is None else next(rest) for x in operands]
