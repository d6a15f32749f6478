"""Attention to what a cache holds in the model's dtype: sinks, tail and the new tokens.

`dense_part` is two matrix products over copies in fp32, for any number of queries. The compiled
decode step uses `dense_part_traced`, which reads the buffers where they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import KVarNConfig
from ..layout import TileCache
from ..reference.attention import Visible
from .formula import materialized
from .mask import hide, mask_of_slots

__all__ = [
    "Partial",
    "dense_part",
    "dense_part_traced",
    "exponentials",
    "softcapped",
    "tail_positions",
    "tiles_of",
]


class Partial(NamedTuple):
    """Softmax over a part of the keys, before normalization; M = query rows of a KV head."""

    peak: Tensor  # [B, H, M, 1]; -inf if nothing is visible
    total: Tensor  # [B, H, M, 1] sum of exp(score - peak)
    out: Tensor  # [B, H, M, D]


def tiles_of(lengths: Tensor, config: KVarNConfig) -> Tensor:
    """Quantized tiles of sequences of these lengths, elementwise."""
    body = lengths - (config.num_sink_tokens + config.tail_tokens)
    return torch.div(body, config.group_size, rounding_mode="floor").clamp_min(0)


def tail_positions(lengths: Tensor, config: KVarNConfig) -> Tensor:
    """Which token each slot of the tail's ring holds, `[B, ring]` int64 for `lengths` `[B]`.

    Counted from the end of the sinks; negative for a slot that was never written.
    """
    ring = config.ring_len
    slot = torch.arange(ring, device=lengths.device)
    newest = lengths.unsqueeze(1) - config.num_sink_tokens - 1
    return slot + ring * torch.div(newest - slot, ring, rounding_mode="floor")


def dense_part(
    rows: Tensor,
    cache: TileCache,
    k_new: Tensor,
    v_new: Tensor,
    visible: Visible,
    softcap: float,
    config: KVarNConfig,
) -> Partial:
    """Attention to sinks, tail and new tokens by two matrix products: the eager form."""
    queries = visible.new.shape[1]
    positions, held = _slots(cache, visible, config)
    stored = held.expand(-1, queries, -1)
    seen = torch.cat([stored, visible.new], dim=-1)
    keys = torch.cat([cache.k_sink, cache.k_tail, k_new], dim=2).float()
    values = torch.cat([cache.v_sink, cache.v_tail, v_new], dim=2).float()
    # A slot that no query sees may hold anything, and 0 * NaN is NaN.
    values = values.masked_fill(~seen.any(1)[:, None, :, None], 0.0)
    scores = softcapped(rows @ keys.mT, softcap)
    if visible.mask is not None:
        of_stored, of_new = scores.tensor_split([stored.shape[-1]], dim=-1)
        of_stored = hide(of_stored, _mask(rows, cache, visible, positions))
        scores = torch.cat([of_stored, of_new], dim=-1)
    hidden = ~seen.repeat(1, rows.shape[2] // queries if queries > 1 else 1, 1).unsqueeze(1)
    peak, weights, total = exponentials(scores.masked_fill(hidden, -torch.inf), (-1,))
    return Partial(peak, total, weights @ values)


def dense_part_traced(
    rows: Tensor,
    cache: TileCache,
    k_new: Tensor,
    v_new: Tensor,
    visible: Visible,
    softcap: float,
    config: KVarNConfig,
) -> Partial:
    """`dense_part` for at most one new token per row, without copies of the keys and values."""
    sinks = config.num_sink_tokens
    positions, held = _slots(cache, visible, config)
    held = materialized(held)  # [B, 1, sinks + ring]
    mask = None
    if visible.mask is not None:
        mask = materialized(_mask(rows, cache, visible, positions))
    stored = [(cache.k_tail, cache.v_tail, slice(sinks, None))]
    if sinks:
        stored.append((cache.k_sink, cache.v_sink, slice(0, sinks)))
    own = peak = None
    if k_new.shape[2]:
        own = peak = softcapped((rows * k_new.float()).sum(-1, keepdim=True), softcap)
    scores = []
    for keys, _, part in stored:
        score = (rows.unsqueeze(3) * keys.float().unsqueeze(2)).sum(-1)  # [B, H, M, T]
        score = softcapped(score, softcap)
        if mask is not None:
            score = hide(score, mask[..., part])
        score = score.masked_fill(~held[:, :, part].unsqueeze(1), -torch.inf)
        scores.append(score)
        highest = score.amax(-1, keepdim=True)
        peak = highest if peak is None else torch.maximum(peak, highest)
    assert peak is not None
    base = peak.masked_fill(peak == -torch.inf, 0.0)
    total, out = torch.zeros_like(base), torch.zeros_like(rows)
    if own is not None:
        total = torch.exp(own - base)
        out = total * v_new.float()
    for score, (_, values, part) in zip(scores, stored, strict=True):
        weights = materialized(torch.exp(score - base))
        # A slot that is not seen may hold anything, and 0 * NaN is NaN.
        values = values.float().masked_fill(~held[:, :, part].unsqueeze(-1), 0.0)
        out = out + (weights.unsqueeze(-1) * values.unsqueeze(2)).sum(3)
        total = total + weights.sum(-1, keepdim=True)
    return Partial(peak, total, out)


def _slots(cache: TileCache, visible: Visible, config: KVarNConfig) -> tuple[Tensor, Tensor]:
    """Positions `[B, sinks + ring]` int64 of the sinks' and the tail's slots, and which are seen.

    The latter is `[B, S or 1, sinks + ring]` bool, a mask aside. Empty slots have any position.
    """
    sinks = config.num_sink_tokens
    lengths = cache.seq_lens.unsqueeze(1)  # [B, 1]
    position = tail_positions(cache.seq_lens, config)
    first = tiles_of(lengths, config) * config.group_size
    sink_positions = torch.arange(sinks, device=lengths.device).expand(lengths.shape[0], -1)
    held = torch.cat(
        [sink_positions < lengths, (position >= first) & (position >= 0)], dim=-1
    ).unsqueeze(1)
    positions = torch.cat([sink_positions, position + sinks], dim=-1)
    if visible.whole_cache:
        return positions, held
    return positions, held & visible.of(positions.unsqueeze(1))


def _mask(rows: Tensor, cache: TileCache, visible: Visible, positions: Tensor) -> Tensor:
    """`[B, H_kv or 1, M or 1, sinks + ring]`: the mask of sinks and tail."""
    queries = visible.new.shape[1]
    assert visible.mask is not None
    return mask_of_slots(
        visible.mask, positions, cache.k_tail.shape[1], rows.shape[2] // queries, queries
    )


def softcapped(scores: Tensor, softcap: float) -> Tensor:
    """`softcap * tanh(scores / softcap)`; 0 means none."""
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def exponentials(scores: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Peak of the scores over `dims`, `exp(scores - peak)`, and its sum; -inf scores weigh 0."""
    peak = scores.amax(dims, keepdim=True)
    weights = torch.exp(scores - peak.masked_fill(peak == -torch.inf, 0.0))
    return peak, weights, weights.sum(dims, keepdim=True)
