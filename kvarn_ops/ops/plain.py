"""Attention over a packed cache in the arithmetic that inference engines have.

Sums, products, comparisons, `floor` and matrix products, on tensors whose shapes are known but for
the number of new tokens: no bit operations, no integer division, no reading of values. Codes are
taken apart by `floor` of halves, which fp16 does exactly for bytes.

Partial softmaxes are `part` `[B, H, slots, rows, D]`, `peak` and `weight` `[B, H, slots, rows]`
fp32: the weighted sum of values, the largest score in units of log 2, and the sum of weights. Where
`weight` is 0 the others may be anything. Rows are the queries of a KV head, head by head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import KVarNConfig
from ..layout import PackedTiles, TileCache, center

__all__ = ["combined", "dense_slot", "prepared", "tile_slot", "unpacked"]

_HIDDEN = -1e30  # a score that counts nothing: engines need not know what infinity minus itself is
_LN2 = math.log(2)

Slot = tuple[Tensor, Tensor, Tensor]


def unpacked(codes: Tensor, bits: int, n: int) -> Tensor:
    """Codes `[..., n]` fp16 of packed rows `[..., n * bits / 8]`, uint8 or int8."""
    whole = codes.to(torch.float16)
    if codes.dtype == torch.int8:
        whole = torch.where(whole < 0, whole + 256.0, whole)
    if bits == 3:
        high = _digits(whole.narrow(-1, n // 4, n // 8), 1, 8)  # [..., bytes, 8]
        return _two_byte_words(whole.narrow(-1, 0, n // 4), 2) + high.mT.flatten(-2) * 4.0
    return _two_byte_words(whole, bits)


def _two_byte_words(whole: Tensor, bits: int) -> Tensor:
    """Plane by plane: the low byte's fields of all words, then the high byte's."""
    digits = _digits(whole.unflatten(-1, (-1, 2)), bits, 8 // bits)  # [..., word, byte, field]
    order = (*range(digits.ndim - 3), digits.ndim - 2, digits.ndim - 1, digits.ndim - 3)
    return digits.permute(order).flatten(-3)


def _digits(whole: Tensor, bits: int, count: int) -> Tensor:
    """`[..., count]`: digits of numbers below 256 in base `2**bits`, the lowest first."""
    base = float(1 << bits)
    digits = []
    for _ in range(count):
        rest = torch.floor(whole * (1 / base))
        digits.append(whole - rest * base)
        whole = rest
    return torch.stack(digits, dim=-1)


def prepared(
    rows: Tensor, k_equalizer: Tensor, rotation: Tensor, config: KVarNConfig
) -> tuple[Tensor, Tensor]:
    """Queries `[B, H, rows, D]` in the frame of stored keys, of norm 1, and their norms.

    Returns
    -------
    rotated : Tensor
        `[B, H, rows, D]` fp32.
    unit : Tensor
        `[B, H, rows]` fp32, 1 where the query is 0.
    """
    x = rows.float()
    if config.equalizes:
        x = x * torch.exp(k_equalizer.float() * _LN2).unsqueeze(2)
    unit = torch.sqrt((x * x).sum(-1))
    unit = torch.where(unit > 0, unit, 1.0)
    if config.rotate_keys:
        x = F.linear(x, rotation.mT)  # `@` asks for strides, unknown for a symbolic size
    return x / unit.unsqueeze(-1), unit


def dense_slot(
    rows: Tensor, ratio: int, cache: TileCache, k_new: Tensor, v_new: Tensor, rank: Tensor,
    lag: int, scale: float, softcap: float,
) -> Slot:  # fmt: skip
    """Sinks, tail and new tokens.

    Parameters
    ----------
    rows : Tensor
        `[B, H, rows, D]` queries, `ratio` heads of S each.
    k_new, v_new : Tensor
        `[B, H, S, D]` tokens that the cache does not hold; each query sees those up to its own.
    rank : Tensor
        `[S]` fp32, 0 to S - 1.
    """
    keys = torch.cat([cache.k_sink, cache.k_tail], dim=2).float()
    values = torch.cat([cache.v_sink, cache.v_tail], dim=2).float()
    held = _held(cache, lag)  # [B, sinks + ring]
    x = rows.float() * scale
    stored = _softcapped(x @ keys.mT, softcap)
    stored = torch.where(held[:, None, None, :], stored, _HIDDEN)
    fresh = _softcapped(x @ k_new.float().mT, softcap)
    earlier = torch.cat([rank[None, :] <= rank[:, None]] * ratio)  # [rows, S]
    fresh = torch.where(earlier, fresh, _HIDDEN)
    # Every query sees its own token: the peak is a real score.
    peak = torch.maximum(stored.amax(-1, keepdim=True), fresh.amax(-1, keepdim=True))
    stored, fresh = torch.exp(stored - peak), torch.exp(fresh - peak)
    weight = stored.sum(-1) + fresh.sum(-1)
    # A slot that is not held may hold anything, and 0 * NaN is NaN.
    values = torch.where(held[:, None, :, None], values, 0.0)
    part = stored @ values + fresh @ v_new.float()
    return part.unsqueeze(2), (peak.squeeze(-1) / _LN2).unsqueeze(2), weight.unsqueeze(2)


def _held(cache: TileCache, lag: int) -> Tensor:
    """`[B, sinks + ring]` bool: which slots hold a token that no tile holds.

    In fp32, which counts exactly up to 2**24 tokens.
    """
    sinks, ring, group = cache.k_sink.shape[2], cache.k_tail.shape[2], cache.k_token_scale.shape[3]
    length = cache.seq_lens.float()[:, None]
    place = torch.arange(ring, dtype=torch.float32, device=length.device)
    newest = length - (sinks + 1.0)  # position after the sinks
    position = place + torch.floor((newest - place) / ring) * ring
    first = _live_tiles(length, sinks, lag, group) * group
    sink = torch.arange(sinks, dtype=torch.float32, device=length.device)
    # Distances rather than a conjunction of comparisons: positive where a token is held.
    tail = torch.minimum(position - first, position)
    return torch.cat([length - 1.0 - sink, tail], dim=-1) >= 0


def _live_tiles(length: Tensor, sinks: int, lag: int, group: int) -> Tensor:
    return torch.floor((length - float(sinks + lag)) / group).clamp_min(0.0)


def tile_slot(
    rotated: Tensor, unit: Tensor, tiles: PackedTiles, lengths: Tensor, sinks: int, lag: int,
    scale: float, softcap: float,
) -> Slot:  # fmt: skip
    """Quantized tiles, all that are allocated: `rotated`, `unit` as `prepared` gives them.

    Codes are unpacked at once: in fp32, 4 bytes per code.
    """
    head_dim, group = tiles.v_channel_scale.shape[-1], tiles.k_token_scale.shape[-1]
    key_bits = tiles.k_codes.shape[-1] * 8 // head_dim
    value_bits = tiles.v_codes.shape[-1] * 8 // group
    number = torch.arange(tiles.k_codes.shape[2], dtype=torch.float32, device=rotated.device)
    live = number < _live_tiles(lengths.float()[:, None], sinks, lag, group)  # [B, N]
    live = live[:, None, :, None, None]
    x = (rotated.float() * (unit * scale).unsqueeze(-1)).unsqueeze(2)  # [B, H, 1, rows, D]
    channel, zero = _affine(tiles.k_channel_affine, key_bits)  # [B, H, N, 1, D]
    x = x * channel
    codes = unpacked(tiles.k_codes, key_bits, head_dim).float()  # [B, H, N, G, D]
    scores = x @ codes.mT + (x * zero).sum(-1, keepdim=True)
    scores = _softcapped(scores * tiles.k_token_scale.float().unsqueeze(3), softcap)
    scores = torch.where(live, scores, _HIDDEN)  # [B, H, N, rows, G]
    peak = scores.amax((2, 4), keepdim=True)
    weights = torch.where(live, torch.exp(scores - peak), 0.0)
    # Tiles that are not live may hold anything.
    token, zero = (torch.where(live, y, 0.0) for y in _affine(tiles.v_token_affine, value_bits))
    channel = torch.where(live, tiles.v_channel_scale.float().unsqueeze(3), 0.0)
    folded = weights * token
    codes = unpacked(tiles.v_codes, value_bits, group).float()  # [B, H, N, D, G]
    out = folded @ codes.mT + (folded * zero).sum(-1, keepdim=True)
    part = (out * channel).sum(2, keepdim=True)
    return part, peak.squeeze(-1).squeeze(2).unsqueeze(2) / _LN2, weights.sum((2, 4)).unsqueeze(2)


def _affine(affine: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[B, H, N, 1, n]` of `[B, H, N, 2, n]`."""
    scale, offset = affine.float().split(1, dim=3)
    return scale, offset - center(bits)


def _softcapped(scores: Tensor, softcap: float) -> Tensor:
    return torch.tanh(scores / softcap) * softcap if softcap else scores


def combined(
    part: Tensor, peak: Tensor, weight: Tensor, dense_slots: int, rotation: Tensor,
    v_equalizer: Tensor, sink_logits: Tensor | None, config: KVarNConfig,
) -> Tensor:  # fmt: skip
    """`[B, H, rows, D]` fp32: one softmax of all slots, of which the first `dense_slots` are not in
    the frame of stored values. `sink_logits` `[B or 1, H, rows]` take weight and give no value.
    """
    peak = peak.clamp_min(_HIDDEN)
    highest = peak.amax(2, keepdim=True)
    if sink_logits is not None:
        sink_logits = sink_logits.unsqueeze(2) / _LN2
        highest = torch.maximum(highest, sink_logits)
    share = torch.exp((peak - highest) * _LN2)
    total = (weight * share).sum(2)  # [B, H, rows]
    if sink_logits is not None:
        total = total + torch.exp((sink_logits - highest) * _LN2).squeeze(2)
    # What a slot without weight wrote, if anything, is not a number.
    counted = torch.where((weight > 0).unsqueeze(-1), part, 0.0) * share.unsqueeze(-1)
    packed_slots = part.shape[2] - dense_slots
    dense = counted.narrow(2, 0, dense_slots).sum(2)
    packed = counted.narrow(2, dense_slots, packed_slots).sum(2)
    if config.rotate_values:
        packed = F.linear(packed, rotation)
    if config.equalizes:
        packed = packed * torch.exp(v_equalizer.float() * _LN2).unsqueeze(2)
    return (dense + packed) / total.unsqueeze(-1)
