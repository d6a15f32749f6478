"""Attention over a cache by partial softmaxes: dense tokens, then tiles in chunks, then one merge.

Memory does not grow with the context in eager mode: tiles are read in chunks, queries in blocks.
The compiled decode step reads all live tiles at once, since Inductor fuses it into few loops; its
largest intermediate is one layer's scores, 4 bytes per token and query head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat import hint_size, trace_scalars
from ..config import KVarNConfig
from ..layout import PackedTiles, TileCache
from ..reference.attention import Visible
from .dense import Partial, dense_part, dense_part_traced, exponentials, softcapped, tiles_of
from .formula import Dot, dot_matmul, dot_unrolled, materialized, tile_output, tile_scores
from .mask import hide, mask_of_tiles

__all__ = ["attend", "attend_decode_traced", "attend_traced", "tiles_of"]

_QUERIES_PER_BLOCK = 256
_TYPICAL_TILES = 64  # what Inductor assumes of the number of live tiles when it weighs fusions


class _Form(NamedTuple):
    """What the eager form and the traced ones do differently."""

    dot: Dot
    dense: Callable[..., Partial]
    tiles_per_chunk: int | None  # None: all at once
    rows_together: float  # query rows that share a pass over the codes, at most


_EAGER = _Form(dot_matmul, dense_part, 16, math.inf)
_TRACED = _Form(dot_unrolled, dense_part_traced, None, 16)  # the rows are unrolled
_ANY_COUNT = _Form(dot_matmul, dense_part, None, math.inf)


class _Context(NamedTuple):
    """What all blocks of queries of a call attend to, and how."""

    cache: TileCache
    shared: PackedTiles | None
    k_new: Tensor
    v_new: Tensor
    rotation: Tensor
    sink_logits: Tensor | None
    scale: float
    softcap: float
    config: KVarNConfig


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
    """Eager form; arguments and result as in `kvarn_ops.reference.attention.attend`."""
    live_tiles = config.num_tiles(int(cache.seq_lens.max()))
    context = _Context(cache, shared, k_new, v_new, rotation, sink_logits, scale, softcap, config)
    outs = []
    for start in range(0, q.shape[2], _QUERIES_PER_BLOCK):
        block = slice(start, start + _QUERIES_PER_BLOCK)
        outs.append(
            _attend_block(q[:, :, block], visible.queries(block), live_tiles, context, _EAGER)
        )
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def attend_first(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Dense attention among new tokens, for an empty cache; `visible` None means causal."""
    if visible is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    seen = visible.any(-1, keepdim=True).unsqueeze(1)
    mask = visible.unsqueeze(1) | ~seen
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.masked_fill(~seen, 0.0)


def attend_decode_traced(
    q: Tensor,
    cache: TileCache,
    k_new: Tensor,
    v_new: Tensor,
    rotation: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    config: KVarNConfig,
    shared: PackedTiles | None = None,
    first: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """One query per row, for compilers: straight-line code, work proportional to live tiles.

    `k_new`, `v_new` are one token per row that is not in the cache yet, or none.
    """
    new = torch.ones(q.shape[0], 1, k_new.shape[2], dtype=torch.bool, device=q.device)
    context = _Context(cache, shared, k_new, v_new, rotation, sink_logits, scale, softcap, config)
    visible = Visible(new, first, mask=mask)
    return _attend_block(q, visible, _live_tiles_traced(cache, config), context, _TRACED)


def _chunks(tiles: Any, form: _Form) -> list[tuple[int, Any]]:
    """Starts and lengths of chunks of `tiles` tiles, an int or a SymInt."""
    step = form.tiles_per_chunk
    if step is None:
        return [(0, tiles)]
    return [(start, min(step, tiles - start)) for start in range(0, tiles, step)]


def attend_traced(
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
) -> Tensor:
    """`attend` for any number of queries that a graph does not know, by matrix products.

    All live tiles are unpacked at once, plane by plane: in fp32, up to 4 bytes per code.
    """
    context = _Context(cache, None, k_new, v_new, rotation, sink_logits, scale, softcap, config)
    return _attend_block(q, visible, _live_tiles_traced(cache, config), context, _ANY_COUNT)


def _live_tiles_traced(cache: TileCache, config: KVarNConfig) -> int:
    """Live tiles of the longest row, a symbolic number.

    At least one keeps shapes non-empty; the mask hides it while none is live.
    """
    most = cache.k_codes.shape[2]
    trace_scalars()
    live = tiles_of(cache.seq_lens, config).max().clamp(1, most).item()
    hint_size(live, _TYPICAL_TILES)
    torch._check(live >= 1)
    torch._check(live <= most)
    return live  # type: ignore[return-value]


def _attend_block(
    q: Tensor, visible: Visible, live_tiles: Any, context: _Context, form: _Form
) -> Tensor:
    cache, shared, k_new, v_new, rotation, sink_logits, scale, softcap, config = context
    batch, num_q_heads, queries, head_dim = q.shape
    num_kv_heads = cache.k_tail.shape[1]
    q_per_kv = num_q_heads // num_kv_heads
    rows = q.float().reshape(batch, num_kv_heads, q_per_kv * queries, head_dim) * scale

    parts = [form.dense(rows, cache, k_new, v_new, visible, softcap, config)]

    rotated = rows
    if config.equalizes:
        rotated = rotated * torch.exp2(cache.k_equalizer.float()).unsqueeze(2)
    if config.rotate_keys:
        rotated = rotated @ rotation
    packed = tile_mask = None
    if visible.mask is not None:
        tile_mask = mask_of_tiles(
            visible.mask, cache.k_codes.shape[2], config, num_kv_heads, q_per_kv, queries
        )
    for start, count in _chunks(live_tiles, form):
        tiles = cache.tiles(start, count).on(q.device)
        hidden = _tiles_hidden(cache, visible, start, count, config)
        scores = tile_scores(rotated, tiles, config, form.dot)  # [B, H, n, M, G]
        scores = softcapped(scores, softcap)
        if tile_mask is not None:
            scores = hide(scores, tile_mask.narrow(2, start, count))
        if hidden.shape[2] > 1:
            hidden = hidden.repeat(1, 1, q_per_kv, 1)
        scores = scores.masked_fill(hidden.unsqueeze(1), -torch.inf)
        peak, weights, total = exponentials(scores, (2, 4))
        out = tile_output(weights, tiles, config, form.dot)
        part = Partial(peak.squeeze(2), total.squeeze(2), out)
        packed = part if packed is None else _merge(packed, part)
    if shared is not None:
        part = _attend_shared(rotated, shared, softcap, config, form)
        packed = part if packed is None else _merge(packed, part)
    if packed is not None:
        out = packed.out @ rotation.mT if config.rotate_values else packed.out
        if config.equalizes:
            out = out * torch.exp2(cache.v_equalizer.float()).unsqueeze(2)
        parts.append(packed._replace(out=out))

    merged = parts[0] if len(parts) == 1 else _merge(*parts)
    total = merged.total
    if sink_logits is not None:
        logits = sink_logits.float().view(num_kv_heads, q_per_kv, 1)
        logits = logits.expand(-1, -1, queries).reshape(1, num_kv_heads, -1, 1)
        peak = torch.maximum(merged.peak, logits)
        shrink = torch.exp(merged.peak - peak)
        merged = merged._replace(out=merged.out * shrink)
        total = total * shrink + torch.exp(logits - peak)
    out = torch.where(total > 0, merged.out / total.where(total > 0, 1.0), 0.0)
    # NaN scores make `total` NaN, which the comparison above would hide.
    out = torch.where(total.isnan(), total, out)
    return out.reshape(batch, num_q_heads, queries, head_dim).to(q.dtype)


def _attend_shared(
    rotated: Tensor, shared: PackedTiles, softcap: float, config: KVarNConfig, form: _Form
) -> Partial:
    """Tiles `[B0, H, N, ...]` that every query sees; row b of the batch reads row b // (B / B0).

    The queries of rows that share tiles are put side by side, so that a code is unpacked once for
    several rows: all of them in eager mode, a few where each is unrolled.
    """
    batch, heads, queries, head_dim = rotated.shape
    sources = shared.k_codes.shape[0]
    copies = batch // sources
    divisors = [n for n in range(1, copies + 1) if copies % n == 0]
    together = max((n for n in divisors if n * queries <= form.rows_together), default=1)
    lead = (sources, copies // together)
    rows = rotated.reshape(*lead, together, heads, queries, head_dim).transpose(2, 3)
    rows = rows.reshape(*lead, heads, together * queries, head_dim)
    total = None
    for start, count in _chunks(shared.k_codes.shape[2], form):
        tiles = shared.tiles(start, count).on(rotated.device)
        tiles = PackedTiles(*(tensor.unsqueeze(1) for tensor in tiles))
        scores = softcapped(tile_scores(rows, tiles, config, form.dot), softcap)
        peak, weights, weight_sum = exponentials(scores, (-3, -1))
        out = tile_output(weights, tiles, config, form.dot)
        part = Partial(peak.squeeze(-3), weight_sum.squeeze(-3), out)
        total = part if total is None else _merge(total, part)
    assert total is not None

    def by_row(x: Tensor) -> Tensor:
        x = x.reshape(*lead, heads, together, queries, -1).transpose(2, 3)
        return x.reshape(batch, heads, queries, -1)

    return Partial(*(by_row(x) for x in total))


def _tiles_hidden(
    cache: TileCache, visible: Visible, start: int, count: int, config: KVarNConfig
) -> Tensor:
    """Which quantized tokens queries do not see: `[B, n, S, G]`, or `[B, n, 1, 1]`.

    The latter if a query sees every quantized token, so whole tiles are live or not, which keeps
    position arithmetic out of the inner loop.
    """
    live = tiles_of(cache.seq_lens, config)[:, None]
    tile = start + torch.arange(count, device=live.device)
    # Written out, or compilers put the integer division into the loop over scores.
    dead = materialized(tile >= live)[:, :, None, None]  # [B, n, 1, 1]
    if visible.whole_cache:
        return dead
    token = torch.arange(config.group_size, device=live.device)
    position = config.num_sink_tokens + tile[:, None, None] * config.group_size + token
    seen = visible.of(position.flatten())  # [B, S, n * G]
    return dead | ~seen.unflatten(-1, (count, -1)).transpose(1, 2)


def _merge(a: Partial, b: Partial) -> Partial:
    peak = torch.maximum(a.peak, b.peak)
    base = peak.masked_fill(peak == -torch.inf, 0.0)
    weight_a, weight_b = torch.exp(a.peak - base), torch.exp(b.peak - base)
    return Partial(
        peak,
        a.total * weight_a + b.total * weight_b,
        a.out * weight_a + b.out * weight_b,
    )
