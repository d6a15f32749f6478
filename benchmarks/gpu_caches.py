"""Caches full of random codes, made without an encoder, and the bytes that decoding reads."""

from __future__ import annotations

import torch

from kvarn_ops import KVarNConfig
from kvarn_ops.benchmark.decode_step import Shape
from kvarn_ops.layout import TileCache, allocate, center


def random_caches(
    config: KVarNConfig, shape: Shape, context: int, device: torch.device, copies: int = 1
) -> list[TileCache]:
    """`copies` caches of `context` tokens per row, with room for one more."""
    cache = allocate(
        config, shape.batch, shape.kv_heads, shape.head_dim, context + 1, torch.bfloat16, device
    )
    fill_randomly(cache, context, config)
    return [cache, *(TileCache(*(x.clone() for x in cache)) for _ in range(copies - 1))]


def fill_randomly(cache: TileCache, context: int, config: KVarNConfig) -> None:
    """Codes of all values and scales of which keys and values come out with a spread of about 1."""
    for codes in (cache.k_codes, cache.v_codes):
        codes.random_(0, 256)
    sides = (
        (cache.k_channel_affine, cache.k_token_scale, config.key_bits),
        (cache.v_token_affine, cache.v_channel_scale, config.value_bits),
    )
    for affine, other, bits in sides:
        affine[..., 0, :].uniform_(0.5 / center(bits), 1.5 / center(bits))
        affine[..., 1, :].normal_(0, 0.1)
        other.uniform_(0.5, 1.5)
    for dense in (cache.k_sink, cache.v_sink, cache.k_tail, cache.v_tail):
        dense.normal_()
    for equalizer in (cache.k_equalizer, cache.v_equalizer):
        equalizer.normal_(0, 0.1)
    cache.seq_lens.fill_(context)


def stored_bytes(config: KVarNConfig, shape: Shape, context: int) -> int:
    """Bytes of the live tiles, sinks and tail of a cache: what one step has to read."""
    tiles = config.num_tiles(context)
    exact = context - tiles * config.group_size
    row = tiles * config.tile_bytes(shape.head_dim) + exact * 4 * shape.head_dim
    return shape.batch * shape.kv_heads * (row + config.equalizer_bytes(shape.head_dim))


def dense_bytes(shape: Shape, context: int) -> int:
    """Bytes of keys and values in bfloat16."""
    return shape.batch * shape.kv_heads * context * 4 * shape.head_dim
