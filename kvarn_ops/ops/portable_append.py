"""Storing new tokens without custom ops: one straight graph, tiles encoded behind a conditional."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import KVarNConfig
from ..layout import TileCache
from ..reference.encode import encode_keys, encode_values, first_equalizer
from .dense import tail_positions, tiles_of
from .formula import materialized

__all__ = ["append_portable", "as_operand"]


class _Span(NamedTuple):
    """Where the new tokens of each row go; all `[B]` int64."""

    start: Tensor  # tokens before
    count: Tensor  # new ones, padding aside

    @property
    def stop(self) -> Tensor:
        return self.start + self.count


def append_portable(
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    cache: TileCache,
    rotation: Tensor,
    config: KVarNConfig,
    max_new_tokens: int,
) -> TileCache:
    """The cache with new tokens; arguments as in `portable.step_portable`."""
    span = _Span(cache.seq_lens, _count(k, valid))
    if valid is not None:
        order = _order_of_valid(valid)
        k, v = _pick(k, order), _pick(v, order)
    sinks, tiles, device = config.num_sink_tokens, cache.k_codes.shape[2], k.device

    position = torch.arange(sinks, device=device).expand(k.shape[0], -1)
    k_sink = _updated(cache.k_sink, k, position, span)
    v_sink = _updated(cache.v_sink, v, position, span)

    body = tail_positions(span.stop, config)
    position = torch.where(body < 0, -1, body + sinks)
    k_tail = _updated(cache.k_tail, k, position, span)
    v_tail = _updated(cache.v_tail, v, position, span)

    # More tiles than there are cannot be finished; the places below stay distinct.
    most = min(-(-max_new_tokens // config.group_size), tiles)
    tile = tiles_of(span.start, config)[:, None] + torch.arange(most, device=device)  # [B, most]
    finished = (tile < tiles_of(span.stop, config)[:, None]) & (tile < tiles)
    encoded = _encoded_if_any(k, v, tile, finished, span, cache, rotation, config)
    place = tile % tiles
    packed = [
        _with_tiles(old, new, place, finished)
        for old, new in zip(cache.packed, encoded[:-2], strict=True)
    ]
    return TileCache(*packed, k_sink, v_sink, k_tail, v_tail, *encoded[-2:], span.stop)


def as_operand(x: Tensor) -> Tensor:
    """`x` as the operand of a conditional: memory of its own, with the strides that it has.

    Operands may not share memory, as parts of one projection do, and Inductor 2.13 computes them in
    an order of axes of its choice, while the branches read the strides that were traced.
    """
    return materialized(x.clone(memory_format=torch.contiguous_format))


def _count(k: Tensor, valid: Tensor | None) -> Tensor:
    """`[B]` int64: new tokens of each row."""
    if valid is not None:
        return valid.sum(-1)
    return torch.full((k.shape[0],), k.shape[2], dtype=torch.int64, device=k.device)


def _order_of_valid(valid: Tensor) -> Tensor:
    """`[B, S]` int64: the index of the j-th valid token; any index where there are fewer."""
    before = valid.long().cumsum(-1)  # [B, S]
    rank = torch.arange(valid.shape[1], device=valid.device)
    return (before.unsqueeze(1) <= rank[:, None]).sum(-1).clamp_max(valid.shape[1] - 1)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `[B, H, n, D]` of `x` `[B, H, S, D]` at `index` `[B, n]`."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _updated(held: Tensor, new: Tensor, position: Tensor, span: _Span) -> Tensor:
    """Slots `[B, H, n, D]` that belong to `position` `[B, n]`, with the new tokens in theirs."""
    rank = position - span.start[:, None]
    fresh = (rank >= 0) & (rank < span.count[:, None])
    picked = _pick(new, rank.clamp_min(0).clamp_max(new.shape[2] - 1))
    return torch.where(fresh[:, None, :, None], picked, held)


def _encoded_if_any(
    k: Tensor,
    v: Tensor,
    tile: Tensor,
    finished: Tensor,
    span: _Span,
    cache: TileCache,
    rotation: Tensor,
    config: KVarNConfig,
) -> tuple[Tensor, ...]:
    """Fields of the tiles `tile` `[B, n]`, and both equalizers; zeros if no tile is finished."""
    group, sinks, ring = config.group_size, config.num_sink_tokens, cache.k_tail.shape[2]
    batch, most = tile.shape

    def encode(
        k: Tensor, v: Tensor, k_tail: Tensor, v_tail: Tensor, k_equalizer: Tensor,
        v_equalizer: Tensor, tile: Tensor, finished: Tensor, start: Tensor, rotation: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        body = (tile[..., None] * group + torch.arange(group, device=k.device)).flatten(1)
        rank = body + sinks - start[:, None]  # [B, n * G] among the new tokens

        def tokens(new: Tensor, tail: Tensor) -> Tensor:
            fresh = _pick(new, rank.clamp_min(0).clamp_max(new.shape[2] - 1))
            held = _pick(tail, body % ring)
            chosen = torch.where((rank >= 0)[:, None, :, None], fresh, held)
            return chosen.unflatten(2, (most, group))

        keys, values = tokens(k, k_tail), tokens(v, v_tail)
        if config.equalizes:
            opens = ((tile[:, 0] == 0) & finished[:, 0])[:, None, None]
            k_equalizer = torch.where(opens, first_equalizer(keys[:, :, 0], config), k_equalizer)
            v_equalizer = torch.where(opens, first_equalizer(values[:, :, 0], config), v_equalizer)
        of_k = encode_keys(keys, config, rotation, k_equalizer.unsqueeze(2))
        of_v = encode_values(values, config, rotation, v_equalizer.unsqueeze(2))
        return tuple(
            x.contiguous() for x in (*of_k, *of_v, k_equalizer.clone(), v_equalizer.clone())
        )

    def nothing(
        k: Tensor, v: Tensor, k_tail: Tensor, v_tail: Tensor, k_equalizer: Tensor,
        v_equalizer: Tensor, *rest: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        fields = cache.packed
        made = [
            torch.zeros((batch, field.shape[1], most, *field.shape[3:]), dtype=field.dtype,
                        device=k.device)
            for field in fields
        ]  # fmt: skip
        return (*made, k_equalizer.clone(), v_equalizer.clone())

    operands = (
        k, v, cache.k_tail, cache.v_tail, cache.k_equalizer, cache.v_equalizer, as_operand(tile),
        as_operand(finished), span.start, rotation,
    )  # fmt: skip
    return torch.ops.higher_order.cond(finished.any(), encode, nothing, operands)


def _with_tiles(old: Tensor, new: Tensor, place: Tensor, finished: Tensor) -> Tensor:
    """`old` `[B, H, N, ...]` with tiles `new` `[B, H, n, ...]` in their places, if finished."""
    row = torch.arange(place.shape[0], device=place.device)[:, None]
    index = [row, None, place]
    shape = (*place.shape, *[1] * (old.ndim - 2))
    kept = torch.ops.aten.index.Tensor(old, index)  # [B, n, H, ...]
    chosen = torch.where(finished.reshape(shape), new.transpose(1, 2), kept)
    return torch.ops.aten.index_put.default(old, index, chosen)
