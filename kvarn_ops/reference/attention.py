"""Attention over a cache, written out: read everything back, then softmax in fp32."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import KVarNConfig
from ..layout import PackedTiles, TileCache
from .decode import decode_keys, decode_values
from .encode import EncodedTiles

__all__ = ["Visible", "attend", "read_row"]


class Visible(NamedTuple):
    """Which tokens each of S queries sees.

    Of the cache, those at positions from `first` (None: 0) to before `stop` (None: all) that the
    mask shows.
    """

    new: Tensor  # [B, S, N] bool, of the new tokens
    first: Tensor | None = None  # [B, S] int64
    stop: Tensor | None = None  # [B, S] int64
    mask: Tensor | None = None  # [B or 1, H_q or 1, S or 1, T] bool, or float added to the scores

    @property
    def whole_cache(self) -> bool:
        """Whether every query sees every stored token, a mask aside."""
        return self.first is None and self.stop is None

    def queries(self, block: slice) -> Visible:
        """The same for some of the queries."""
        new, *bounds = (None if x is None else x[:, block] for x in self[:3])
        assert new is not None
        mask = self.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, block]
        return Visible(new, *bounds, mask)

    def of(self, positions: Tensor) -> Tensor:
        """`[B, S, T]` bool: which queries see positions `[T]` or `[B, 1, T]` of the cache."""
        seen = torch.ones_like(positions, dtype=torch.bool)
        if self.first is not None:
            seen = seen & (positions >= self.first.unsqueeze(-1))
        if self.stop is not None:
            seen = seen & (positions < self.stop.unsqueeze(-1))
        return seen


def read_row(
    cache: TileCache,
    row: int,
    config: KVarNConfig,
    rotation: Tensor | None = None,
    shared: PackedTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """All keys and values of one batch row, in order of position.

    Parameters
    ----------
    shared : PackedTiles or None
        `[B0, H_kv, N, ...]` tiles between the sinks and the row's own tiles, of row
        `row // (B / B0)`.

    Returns
    -------
    k, v : Tensor
        `[H_kv, length, D]` fp32 in the original frame: sinks, dequantized tiles, tail.
    """
    length = int(cache.seq_lens[row])
    tiles, sinks = config.num_tiles(length), config.num_sink_tokens
    own = PackedTiles(*(tensor[row, :, :tiles] for tensor in cache.packed))
    if shared is not None:
        source = row // (cache.k_codes.shape[0] // shared.k_codes.shape[0])
        pairs = zip(shared, own, strict=True)
        own = PackedTiles(*(torch.cat([before[source], after], dim=1) for before, after in pairs))
    own = own.on(cache.k_tail.device)
    keys = EncodedTiles(own.k_codes, own.k_channel_affine, own.k_token_scale)
    values = EncodedTiles(own.v_codes, own.v_token_affine, own.v_channel_scale)
    body = torch.arange(tiles * config.group_size, max(0, length - sinks))
    slots = (body % config.ring_len).to(cache.k_tail.device)
    k = [
        cache.k_sink[row, :, : min(length, sinks)].float(),
        decode_keys(keys, config, rotation, cache.k_equalizer[row].unsqueeze(1)).flatten(1, 2),
        cache.k_tail[row].index_select(1, slots).float(),
    ]
    v = [
        cache.v_sink[row, :, : min(length, sinks)].float(),
        decode_values(values, config, rotation, cache.v_equalizer[row].unsqueeze(1)).flatten(1, 2),
        cache.v_tail[row].index_select(1, slots).float(),
    ]
    return torch.cat(k, dim=1), torch.cat(v, dim=1)


def attend(
    q: Tensor,
    cache: TileCache,
    k_new: Tensor,
    v_new: Tensor,
    visible: Visible,
    rotation: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    config: KVarNConfig,
    shared: PackedTiles | None = None,
) -> Tensor:
    """Attention of new queries over the cache and over new, not yet stored tokens.

    Parameters
    ----------
    q : Tensor
        `[B, H_q, S, D]` in the original frame.
    cache : TileCache
        What is stored.
    k_new, v_new : Tensor
        `[B, H_kv, N, D]` tokens not in the cache; N may be 0.
    visible : Visible
        Which tokens each query sees.
    rotation : Tensor
        `[D, D]` Hadamard matrix.
    sink_logits : Tensor or None
        `[H_q]` logits of attention sinks, which take weight and give no value.
    scale, softcap : float
        Scores are `softcap * tanh(scale * q @ k / softcap)`; softcap 0 means none.
    shared : PackedTiles or None
        `[B0, H_kv, N, ...]` more tiles, which all queries see: row b reads row `b // (B / B0)`.

    Returns
    -------
    Tensor
        `[B, H_q, S, D]` in q's dtype; zeros where a query sees nothing.
    """
    group = q.shape[1] // cache.k_tail.shape[1]
    rows = []
    for row in range(q.shape[0]):
        k, v = read_row(cache, row, config, rotation, shared)
        positions = torch.arange(k.shape[1], device=k.device)
        stored = visible.of(positions)  # [T], or [B, S, T]
        stored = stored[row] if stored.ndim == 3 else stored.expand(q.shape[2], -1)
        seen = torch.cat([stored, visible.new[row]], dim=-1)
        k = torch.cat([k, k_new[row].float()], dim=1).repeat_interleave(group, dim=0)
        v = torch.cat([v, v_new[row].float()], dim=1).repeat_interleave(group, dim=0)
        scores = q[row].float() @ k.mT * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if visible.mask is not None:
            scores = scores + _added(visible.mask, row, k.shape[1])
        scores = scores.masked_fill(~seen, -torch.inf)
        if sink_logits is not None:
            column = sink_logits.float()[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat([scores, column], dim=-1)
        weights = scores.softmax(dim=-1)[..., : k.shape[1]]
        v = v.masked_fill(~seen.any(0)[:, None], 0.0)
        out = weights.masked_fill(~seen, 0.0) @ v
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        rows.append(torch.where(blind, 0.0, out))
    return torch.stack(rows).to(q.dtype)


def _added(mask: Tensor, row: int, tokens: int) -> Tensor:
    """`[H_q or 1, S or 1, tokens]` fp32: what a mask adds to a row's scores."""
    mask = mask[row if mask.shape[0] > 1 else 0, ..., :tokens]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    return F.pad(mask.float(), (0, tokens - mask.shape[-1]), value=-torch.inf)
