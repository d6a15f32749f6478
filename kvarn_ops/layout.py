"""The packed tile: bit order, shapes and sizes of what a cache stores.

Codes are packed along the contraction dimension (channels for K, tokens for V), which is
contiguous, into little-endian 16-bit words with *planar* fields: a row of `n` codes takes
`W = n * bits / 16` words, and bits `[i*bits, (i+1)*bits)` of word `j` hold the code with index
`i*W + j`. Storage is uint8, two bytes per word, since compilers vectorize bytes and exporters know
them. Three bits are a 2-bit row followed by one byte per 2-bit word, whose bit `i` is the high bit
of that word's plane `i`.

    k_codes           [B, H, N, G, D * key_bits / 8]    uint8
    k_channel_affine  [B, H, N, 2, D]                   fp16   scale, offset
    k_token_scale     [B, H, N, G]                      fp16
    v_codes           [B, H, N, D, G * value_bits / 8]  uint8
    v_token_affine    [B, H, N, 2, G]                   fp16   scale, offset
    v_channel_scale   [B, H, N, D]                      fp16
    k_sink, v_sink    [B, H, num_sink_tokens, D]        model dtype, not rotated
    k_tail, v_tail    [B, H, ring_len, D]               model dtype, not rotated, ring by position
    k_equalizer, v_equalizer  [B, H, D]                 fp16   log2 of a factor per channel
    seq_lens          [B]                               int64

with `x = (code - center + offset) * scale * other_scale`, then the inverse rotation, then
`x * 2**equalizer` per channel, where `center = (2**bits - 1) / 2`: the offset of a symmetric row is
near 0, where fp16 is precise. A row's equalizer is made from its first tile and stays; zeros are no
equalization. It also holds for tiles that the row shares with others. The token at position
`p >= num_sink_tokens` lies in ring slot `(p - num_sink_tokens) % ring_len` while it is in the tail.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import KVarNConfig

__all__ = [
    "Field",
    "PackedTiles",
    "TileCache",
    "allocate",
    "center",
    "field_groups",
    "fields",
    "pack_codes",
    "row_bytes",
    "unpack_codes",
]


class PackedTiles(NamedTuple):
    """Quantized tiles alone, `[B, H, N, ...]`; shapes in the module docstring."""

    k_codes: Tensor
    k_channel_affine: Tensor
    k_token_scale: Tensor
    v_codes: Tensor
    v_token_affine: Tensor
    v_channel_scale: Tensor

    def tiles(self, start: int, count: int) -> PackedTiles:
        """View of `count` tiles."""
        return PackedTiles(*(tensor.narrow(2, start, count) for tensor in self))

    def on(self, device: torch.device) -> PackedTiles:
        """The tiles on a device: themselves, or a copy if they are offloaded."""
        if self.k_codes.device == device:
            return self
        return PackedTiles(*(tensor.to(device, non_blocking=True) for tensor in self))


class TileCache(NamedTuple):
    """All tensors of one layer's cache; shapes in the module docstring."""

    k_codes: Tensor
    k_channel_affine: Tensor
    k_token_scale: Tensor
    v_codes: Tensor
    v_token_affine: Tensor
    v_channel_scale: Tensor
    k_sink: Tensor
    v_sink: Tensor
    k_tail: Tensor
    v_tail: Tensor
    k_equalizer: Tensor
    v_equalizer: Tensor
    seq_lens: Tensor

    def rows(self, start: int, count: int) -> TileCache:
        """View of `count` batch rows."""
        return TileCache(*(tensor.narrow(0, start, count) for tensor in self))

    @property
    def packed(self) -> PackedTiles:
        """The quantized tiles, live or not."""
        return PackedTiles(*(getattr(self, name) for name in PackedTiles._fields))

    def tiles(self, start: int, count: int) -> PackedTiles:
        """View of `count` quantized tiles."""
        return self.packed.tiles(start, count)


CODE_FIELDS = ("k_codes", "v_codes")
SCALE_FIELDS = ("k_channel_affine", "k_token_scale", "v_token_affine", "v_channel_scale")
SINK_FIELDS = ("k_sink", "v_sink")
TAIL_FIELDS = ("k_tail", "v_tail")


def center(bits: int) -> float:
    """The middle of the code range, to which stored offsets refer."""
    return (2**bits - 1) / 2


def row_bytes(n: int, bits: int) -> int:
    """Bytes of a packed row of `n` codes."""
    return n * bits // 8


def capacity(config: KVarNConfig, tiles: int) -> int:
    """Largest number of tokens that fit a cache with this many allocated tiles."""
    return (
        (config.num_sink_tokens + config.tail_tokens + tiles * config.group_size)
        + config.group_size
        - 1
    )


def allocate(
    config: KVarNConfig,
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    max_cache_len: int,
    dtype: torch.dtype,
    device: torch.device | str,
    offload_tiles: bool = False,
) -> TileCache:
    """An empty cache for one layer, all zeros; offloaded tiles are in (pinned) CPU memory."""
    lead = (batch_size, num_kv_heads)
    tiles, group = config.allocated_tiles(max_cache_len), config.group_size
    place: dict[str, Any] = {"device": device}
    if offload_tiles:
        place = {"device": "cpu", "pin_memory": torch.device(device).type == "cuda"}

    def packed(*shape: int, kind: torch.dtype) -> Tensor:
        return torch.zeros(lead + shape, dtype=kind, **place)

    def zeros(*shape: int, kind: torch.dtype) -> Tensor:
        return torch.zeros(lead + shape, dtype=kind, device=device)

    half = torch.float16
    sinks, ring = config.num_sink_tokens, config.ring_len
    return TileCache(
        k_codes=packed(tiles, group, row_bytes(head_dim, config.key_bits), kind=torch.uint8),
        k_channel_affine=packed(tiles, 2, head_dim, kind=half),
        k_token_scale=packed(tiles, group, kind=half),
        v_codes=packed(tiles, head_dim, row_bytes(group, config.value_bits), kind=torch.uint8),
        v_token_affine=packed(tiles, 2, group, kind=half),
        v_channel_scale=packed(tiles, head_dim, kind=half),
        k_sink=zeros(sinks, head_dim, kind=dtype),
        v_sink=zeros(sinks, head_dim, kind=dtype),
        k_tail=zeros(ring, head_dim, kind=dtype),
        v_tail=zeros(ring, head_dim, kind=dtype),
        k_equalizer=zeros(head_dim, kind=half),
        v_equalizer=zeros(head_dim, kind=half),
        seq_lens=torch.zeros(batch_size, dtype=torch.int64, device=device),
    )


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes `[..., n]` into bytes `[..., n * bits / 8]`, uint8."""
    if bits == 3:
        high = codes.to(torch.int32).unflatten(-1, (8, -1)) >> 2
        shifts = torch.arange(8, dtype=torch.int32, device=codes.device)[:, None]
        high_bytes = (high << shifts).sum(-2).to(torch.uint8)
        return torch.cat([pack_codes(codes & 3, 2), high_bytes], dim=-1)
    planes = 16 // bits
    shifts = torch.arange(planes, dtype=torch.int32, device=codes.device)[:, None] * bits
    words = (codes.to(torch.int32).unflatten(-1, (planes, -1)) << shifts).sum(-2)
    return torch.stack([words & 255, words >> 8], dim=-1).flatten(-2).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of `pack_codes`: bytes to codes `[..., n]`, uint8 in `[0, 2**bits)`."""
    if bits == 3:
        low, high = packed[..., : n // 4], packed[..., n // 4 :]
        shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)[:, None]
        high_bits = ((high.unsqueeze(-2) >> shifts) & 1).flatten(-2)
        return unpack_codes(low, 2, n) | (high_bits << 2)
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=packed.device)[:, None] * bits
    words = packed.unflatten(-1, (-1, 2)).movedim(-1, -2).unsqueeze(-2)  # [..., byte, 1, W]
    codes = (words >> shifts) & (2**bits - 1)  # [..., byte, field, W]: plane = byte * fields + k
    return codes.flatten(-3)


class Field(NamedTuple):
    """One bit field of every byte in a range of a packed row."""

    start: int  # first byte
    stop: int  # last byte + 1
    shift: int
    mask: int
    weight: int  # value of the field's unit


def fields(bits: int, n: int) -> list[Field]:
    """The bit fields of a packed row of `n` codes, in the order of `to_field_order`."""
    if bits == 3:
        low = [Field(0, n // 4, 2 * k, 3, 1) for k in range(4)]
        return low + [Field(n // 4, n * 3 // 8, k, 1, 4) for k in range(8)]
    return [Field(0, n * bits // 8, bits * k, 2**bits - 1, 1) for k in range(8 // bits)]


def to_field_order(x: Tensor, bits: int) -> Iterator[Tensor]:
    """Split `x` `[..., n]` into one tensor `[..., bytes]` per field of `fields(bits, n)`.

    Element `m` of a part is the operand of the code that the field holds in byte `m`, so that the
    vector is permuted and the codes never are.
    """
    for group in field_groups(x, bits):
        yield from group.unbind(-2)


def field_groups(x: Tensor, bits: int) -> list[Tensor]:
    """`to_field_order` with the fields of the same bytes in one tensor `[..., fields, bytes]`."""
    if bits == 3:
        return [*field_groups(x, 2), x.unflatten(-1, (8, -1))]
    low_byte, high_byte = x.unflatten(-1, (2, 8 // bits, -1)).unbind(-3)  # [..., field, word]
    # Interleaved by stack: Inductor 2.13 miscompiles the equivalent permute and flatten when
    # there is one field per byte (8 bits) and a data-dependent number of tiles.
    return [torch.stack([low_byte, high_byte], dim=-1).flatten(-2)]
