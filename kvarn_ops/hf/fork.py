"""Forks of a packed layer: n continuations of one prompt that store its finished tiles once.

A fork reads the finished tiles of the layer it came from and has sinks, tail and later tiles of its
own. Its own storage is that of a sequence from which the shared tokens were taken out: tiles are
whole, so nothing but the ring of the tail is renumbered. Shared tiles are never written: what would
write them (a deep crop) is refused, what replaces them (reset, reordering) takes new memory.

    layer   sinks | tile 0 | tile 1 | tile 2 | tail
    fork    sinks | (shared: 0, 1)  | tile 2 | tail      tail_tokens keeps tile 2 open for `crop`
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import KVarNConfig
from ..layout import PackedTiles, TileCache
from .frame import take_frame
from .layer import KVarNLayer

__all__ = ["copy_live", "forked", "merged"]


def forked(layer: KVarNLayer, copies: int, max_cache_len: int) -> KVarNLayer:
    """A layer of `copies` rows for every row of `layer`, side by side, sharing finished tiles."""
    fork = KVarNLayer(
        max_cache_len,
        layer.forms[False].config,
        layer.backend,
        layer._rotations,
        layer.offload_tiles,
    )
    take_frame(fork, layer.frame)
    fork.is_compileable = layer.is_compileable
    fork.cumulative_length = layer.cumulative_length.clone()
    if layer.tiles is None:
        return fork
    config, old, shared = layer.config, layer.tiles, layer.shared
    settled = taken = 0
    if shared is None:
        # Tiles that no legal crop opens again.
        settled = config.num_tiles(int(old.seq_lens.min()) - config.tail_tokens)
        shared = old.tiles(0, settled) if settled else None
        layer.frozen_tiles = max(layer.frozen_tiles, settled)
    else:
        taken = shared.k_codes.shape[2]
    batch, heads, _, head_dim = old.k_tail.shape
    slots = max_cache_len - (settled + taken) * config.group_size
    new = fork.allocated(batch * copies, heads, head_dim, layer.dtype, layer.device, slots)
    copy_live(old, new, config, settled, copies)
    high_water = layer._high_water.repeat_interleave(copies) - settled * config.group_size
    fork.adopt(new, shared, high_water)
    return fork


def copy_live(
    old: TileCache, new: TileCache, config: KVarNConfig, skipped: int = 0, copies: int = 1
) -> None:
    """Copy what is live to larger or other storage: `copies` rows for each, side by side, without
    the first `skipped` tiles.
    """
    live = config.num_tiles(int(old.seq_lens.max())) - skipped
    for source, target in zip(old.tiles(skipped, live), new.tiles(0, live), strict=True):
        target.copy_(source.repeat_interleave(copies, dim=0))
    new.k_sink.copy_(old.k_sink.repeat_interleave(copies, dim=0))
    new.v_sink.copy_(old.v_sink.repeat_interleave(copies, dim=0))
    shift = skipped * config.group_size
    new.k_tail.copy_(_rolled(old.k_tail, shift).repeat_interleave(copies, dim=0))
    new.v_tail.copy_(_rolled(old.v_tail, shift).repeat_interleave(copies, dim=0))
    new.k_equalizer.copy_(old.k_equalizer.repeat_interleave(copies, dim=0))
    new.v_equalizer.copy_(old.v_equalizer.repeat_interleave(copies, dim=0))
    new.seq_lens.copy_(old.seq_lens.repeat_interleave(copies) - shift)


def merged(layer: KVarNLayer) -> tuple[TileCache, Tensor]:
    """Live tiles, shared ones included, as a layer without fork would hold them.

    Returns
    -------
    tiles : TileCache
        With `N` live tiles.
    high_water : Tensor
        `[B]` int64, the most tokens that each row held since tokens were last removed.
    """
    assert layer.tiles is not None
    config, own = layer.config, layer.tiles
    live = own.tiles(0, config.num_tiles(int(own.seq_lens.max())))
    if layer.shared is None:
        return TileCache(*live, *own[len(PackedTiles._fields) :]), layer._high_water
    copies = layer.batch_size // layer.shared.k_codes.shape[0]
    packed = PackedTiles(
        *(
            torch.cat([before.repeat_interleave(copies, dim=0), after], dim=2)
            for before, after in zip(layer.shared, live, strict=True)
        )
    )
    shift = layer.shared.k_codes.shape[2] * config.group_size
    tiles = TileCache(
        *packed,
        own.k_sink,
        own.v_sink,
        _rolled(own.k_tail, -shift),
        _rolled(own.v_tail, -shift),
        own.k_equalizer,
        own.v_equalizer,
        own.seq_lens + shift,
    )
    return tiles, layer._high_water + shift


def _rolled(ring: Tensor, tokens: int) -> Tensor:
    """The ring `[B, H, ring_len, D]` after positions have become smaller by `tokens`."""
    return torch.roll(ring, -tokens, dims=2)
