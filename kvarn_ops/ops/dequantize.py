"""`kvarn::dequantize`: everything a cache holds, in order of position, as a dense cache would.

For code that wants keys and values; passes replace it and the attention that reads it by
`kvarn::attention`. `backend` names the backend of that attention and changes nothing here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import KVarNConfig
from ..errors import CacheError
from ..layout import PackedTiles, TileCache
from ..reference.decode import decode_keys, decode_values
from ..reference.encode import EncodedTiles
from .dense import tiles_of
from .library import CACHE_ARGS, define

__all__ = ["dequantize"]

_CACHE_LEN = len(TileCache._fields)
_TILES_PER_CHUNK = 16  # bounds the temporaries in fp32


def _dequantize_kernel(*args: Any) -> tuple[Tensor, Tensor]:
    cache = TileCache(*args[:_CACHE_LEN])
    rotation, config_line, _, max_cache_len = args[_CACHE_LEN:]
    config = KVarNConfig.from_string(config_line)
    sinks, group = config.num_sink_tokens, config.group_size
    batch, heads, _, head_dim = cache.k_tail.shape
    live = cache.k_codes.shape[2]
    if not cache.seq_lens.is_cuda:  # elsewhere, reading a length would stall every step
        longest = int(cache.seq_lens.max()) if batch else 0
        live = config.num_tiles(longest)
        if longest > max_cache_len:
            raise CacheError(
                f"a row holds {longest} tokens and {max_cache_len} were asked for: give a "
                "max_cache_len that holds all of them."
            )
    shape = (batch, heads, max_cache_len, head_dim)
    k, v = cache.k_tail.new_zeros(shape), cache.k_tail.new_zeros(shape)
    for start in range(0, live, _TILES_PER_CHUNK):
        tiles = cache.tiles(start, min(_TILES_PER_CHUNK, live - start)).on(k.device)
        _write(k, sinks + start * group, _keys(tiles, cache, config, rotation))
        _write(v, sinks + start * group, _values(tiles, cache, config, rotation))
    position = torch.arange(max_cache_len, device=k.device)
    lengths = cache.seq_lens[:, None]
    in_tail = position >= sinks + tiles_of(lengths, config) * group
    slot = (position - sinks).clamp_min(0) % cache.k_tail.shape[2]
    for out, sink, tail in ((k, cache.k_sink, cache.k_tail), (v, cache.v_sink, cache.v_tail)):
        held = tail.index_select(2, slot)
        out.copy_(torch.where(in_tail[:, None, :, None], held, out))
        _write(out, 0, sink)
        out.masked_fill_((position >= lengths)[:, None, :, None], 0.0)
    return k, v


def _keys(tiles: PackedTiles, cache: TileCache, config: KVarNConfig, rotation: Tensor) -> Tensor:
    encoded = EncodedTiles(tiles.k_codes, tiles.k_channel_affine, tiles.k_token_scale)
    return decode_keys(encoded, config, rotation, cache.k_equalizer.unsqueeze(2)).flatten(2, 3)


def _values(tiles: PackedTiles, cache: TileCache, config: KVarNConfig, rotation: Tensor) -> Tensor:
    encoded = EncodedTiles(tiles.v_codes, tiles.v_token_affine, tiles.v_channel_scale)
    return decode_values(encoded, config, rotation, cache.v_equalizer.unsqueeze(2)).flatten(2, 3)


def _write(out: Tensor, start: int, tokens: Tensor) -> None:
    """Put tokens `[B, H, n, D]` at a position, as far as there is room."""
    room = min(tokens.shape[2], out.shape[2] - start)
    if room > 0:
        out.narrow(2, start, room).copy_(tokens.narrow(2, 0, room))


def _dequantize_fake(*args: Any) -> tuple[Tensor, Tensor]:
    cache, max_cache_len = TileCache(*args[:_CACHE_LEN]), args[-1]
    batch, heads, _, head_dim = cache.k_tail.shape
    shape = (batch, heads, max_cache_len, head_dim)
    return cache.k_tail.new_empty(shape), cache.k_tail.new_empty(shape)


dequantize = define(
    "dequantize",
    f"({CACHE_ARGS}, Tensor rotation, str config, str backend, int max_cache_len) "
    "-> (Tensor, Tensor)",
    _dequantize_kernel,
    _dequantize_fake,
)
