"""`kvarn::append_`: store new tokens and quantize the tiles that they finish.

Before: rows of lengths L. After: rows of lengths L + (valid new tokens). Padding is dropped here,
so that sinks and tiles are counted from a row's first real token and a row of a padded batch is
stored as the row alone would be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..config import KVarNConfig
from ..layout import TileCache
from ..reference.encode import encode_keys, encode_values, first_equalizer
from .dense import tiles_of
from .library import CACHE_ARGS, CACHE_MUTATED_ARGS, CACHE_RETURNS, define
from .validate import check_capacity, check_for_kernels, check_new_tokens, check_room

__all__ = ["append", "append_"]

_TILES_PER_ENCODE = 4  # keeps the encoder's fp32 temporaries in cache, and small in a long prefill


def _append_kernel(k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any) -> None:
    *tensors, rotation, config_line, backend = rest
    cache, config = TileCache(*tensors), KVarNConfig.from_string(config_line)
    check_new_tokens(k, v, valid, cache, config)
    if backend == "triton":
        check_for_kernels(cache, k, v, config)
        check_room(cache, k.shape[2], config)
        dispatch.append(cache, k, v, valid, rotation, config)
    else:
        store(cache, k, v, valid, rotation, config)


def store(
    cache: TileCache,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    rotation: Tensor,
    config: KVarNConfig,
) -> None:
    """Eager append of checked tokens. Rows of equal length go together, the common case."""
    lengths = cache.seq_lens.tolist()
    if valid is None and k.shape[2] == 1 and _only_tail(lengths, config):
        check_capacity(cache, max(lengths) + 1, config)
        _store_in_tail(cache, k, v, lengths, config)
        cache.seq_lens.add_(1)
        return
    if valid is not None and bool(valid.all()):
        valid = None
    if valid is None:
        counts = [k.shape[2]] * len(lengths)
    else:
        counts = valid.sum(-1).tolist()
    check_capacity(cache, max(a + b for a, b in zip(lengths, counts, strict=True)), config)
    if valid is None and len(set(lengths)) == 1:
        _store_rows(cache, k, v, lengths[0], rotation, config)
    else:
        for row, length in enumerate(lengths):
            one = slice(row, row + 1)
            k_row, v_row = k[one], v[one]
            if valid is not None:
                k_row, v_row = k_row[:, :, valid[row]], v_row[:, :, valid[row]]
            _store_rows(cache.rows(row, 1), k_row, v_row, length, rotation, config)
    cache.seq_lens.add_(k.shape[2] if valid is None else valid.sum(-1))


def _only_tail(lengths: list[int], config: KVarNConfig) -> bool:
    """Whether one more token per row changes nothing but the tail: most decode steps."""
    sinks, lag, group = config.num_sink_tokens, config.tail_tokens, config.group_size
    return all(
        length >= sinks and (length + 1 - sinks - lag <= 0 or (length + 1 - sinks - lag) % group)
        for length in lengths
    )


def _store_in_tail(
    cache: TileCache, k: Tensor, v: Tensor, lengths: list[int], config: KVarNConfig
) -> None:
    """Write one token per row to the tail's ring."""
    sinks, ring = config.num_sink_tokens, cache.k_tail.shape[2]
    if min(lengths) == max(lengths):
        slot = (lengths[0] - sinks) % ring
        cache.k_tail.narrow(2, slot, 1).copy_(k)
        cache.v_tail.narrow(2, slot, 1).copy_(v)
    else:
        rows = torch.arange(len(lengths), device=k.device)
        slots = (cache.seq_lens - sinks).remainder(ring)
        cache.k_tail[rows, :, slots] = k[:, :, 0]
        cache.v_tail[rows, :, slots] = v[:, :, 0]


def _store_rows(
    cache: TileCache, k: Tensor, v: Tensor, length: int, rotation: Tensor, config: KVarNConfig
) -> None:
    """Append `k`, `v` `[b, H, n, D]` to rows that all hold `length` tokens."""
    count, sinks, group = k.shape[2], config.num_sink_tokens, config.group_size
    if length < sinks and count:
        head = min(count, sinks - length)
        cache.k_sink.narrow(2, length, head).copy_(k.narrow(2, 0, head))
        cache.v_sink.narrow(2, length, head).copy_(v.narrow(2, 0, head))
    first_tile, last_tile = config.num_tiles(length), config.num_tiles(length + count)
    body_old, body_new = max(0, length - sinks), max(0, length + count - sinks)
    skip = max(0, sinks - length)  # new tokens that became sinks
    for start in range(first_tile, last_tile, _TILES_PER_ENCODE):
        stop = min(start + _TILES_PER_ENCODE, last_tile)
        span = (start * group, stop * group)
        keys = _body(cache.k_tail, k, span, body_old, skip).unflatten(2, (-1, group))
        values = _body(cache.v_tail, v, span, body_old, skip).unflatten(2, (-1, group))
        _write_tiles(cache, start, keys, values, rotation, config)
    ring = cache.k_tail.shape[2]
    position = max(body_old, body_new - ring)
    while position < body_new:  # at most two pieces: up to the ring's end, then from its start
        slot, source = position % ring, position - body_old + skip
        piece = min(body_new - position, ring - slot)
        cache.k_tail.narrow(2, slot, piece).copy_(k.narrow(2, source, piece))
        cache.v_tail.narrow(2, slot, piece).copy_(v.narrow(2, source, piece))
        position += piece


def _body(ring: Tensor, new: Tensor, span: tuple[int, int], body_old: int, skip: int) -> Tensor:
    """Tokens at positions `span` after the sinks, from the ring and from the new ones."""
    start, stop = span
    held = min(max(body_old - start, 0), stop - start)
    if held == 0:
        return new.narrow(2, start - body_old + skip, stop - start)
    slots = torch.arange(start, start + held, device=ring.device) % ring.shape[2]
    fresh = new.narrow(2, max(start - body_old, 0) + skip, stop - start - held)
    return torch.cat([ring.index_select(2, slots), fresh], dim=2)


def _write_tiles(
    cache: TileCache,
    start: int,
    keys: Tensor,
    values: Tensor,
    rotation: Tensor,
    config: KVarNConfig,
) -> None:
    if start == 0 and config.equalizes:
        _equalize(cache.k_equalizer, keys[:, :, 0], config)
        _equalize(cache.v_equalizer, values[:, :, 0], config)
    encoded_k = encode_keys(keys, config, rotation, cache.k_equalizer.unsqueeze(2))
    encoded_v = encode_values(values, config, rotation, cache.v_equalizer.unsqueeze(2))
    live = cache.tiles(start, keys.shape[2])
    for target, source in (
        (live.k_codes, encoded_k.codes),
        (live.k_channel_affine, encoded_k.affine),
        (live.k_token_scale, encoded_k.other_scale),
        (live.v_codes, encoded_v.codes),
        (live.v_token_affine, encoded_v.affine),
        (live.v_channel_scale, encoded_v.other_scale),
    ):
        target.copy_(source)


def _equalize(stored: Tensor, first_tile: Tensor, config: KVarNConfig) -> None:
    """Set the equalizers `[b, H, D]` of rows that have none; a fork keeps that of its origin."""
    fresh = first_equalizer(first_tile, config)
    made = ((stored != 0) | stored.signbit()).any(-1, keepdim=True)
    stored.copy_(torch.where(made, stored, fresh))


def drop_open_equalizers(cache: TileCache, config: KVarNConfig) -> None:
    """After tokens were removed: a first tile that is open again may become another one."""
    no_tile = (tiles_of(cache.seq_lens, config) == 0)[:, None, None]
    cache.k_equalizer.masked_fill_(no_tile, 0.0)
    cache.v_equalizer.masked_fill_(no_tile, 0.0)


def _append_functional(
    k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    *tensors, rotation, config_line, backend = rest
    fresh = tuple(tensor.clone() for tensor in tensors)
    _append_kernel(k, v, valid, *fresh, rotation, config_line, backend)
    return fresh


def _append_fake(k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any) -> None:
    return None


def _append_functional_fake(
    k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in rest[: len(TileCache._fields)])


append_ = define(
    "append_",
    f"(Tensor k, Tensor v, Tensor? valid, {CACHE_MUTATED_ARGS}, Tensor rotation, str config, "
    "str backend) -> ()",
    _append_kernel,
    _append_fake,
)
append = define(
    "append",
    f"(Tensor k, Tensor v, Tensor? valid, {CACHE_ARGS}, Tensor rotation, str config, "
    f"str backend) -> ({CACHE_RETURNS})",
    _append_functional,
    _append_functional_fake,
)
