"""`kvarn::quantize_keys`, `quantize_values` and their inverses: whole tiles, nothing stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import KVarNConfig
from ..layout import row_bytes
from ..reference.decode import decode_keys, decode_values
from ..reference.encode import EncodedTiles, encode_keys, encode_values
from .library import define
from .validate import check_tiles

__all__ = ["dequantize_keys", "dequantize_values", "quantize_keys", "quantize_values"]

_QUANTIZE = (
    "(Tensor tiles, Tensor rotation, Tensor? equalizer, str config) -> (Tensor, Tensor, Tensor)"
)
_DEQUANTIZE = (
    "(Tensor codes, Tensor affine, Tensor other_scale, Tensor rotation, Tensor? equalizer, "
    "str config) -> Tensor"
)


def _quantizer(encode: Callable[..., EncodedTiles]) -> Callable[..., EncodedTiles]:
    """The kernel over `encode_keys` or `encode_values`."""

    def kernel(
        tiles: Tensor, rotation: Tensor, equalizer: Tensor | None, config: str
    ) -> EncodedTiles:
        parsed = KVarNConfig.from_string(config)
        check_tiles(tiles, parsed)
        encoded = encode(tiles, parsed, rotation, equalizer)
        return EncodedTiles(*(tensor.contiguous() for tensor in encoded))  # as the fakes promise

    return kernel


def _dequantizer(decode: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel over `decode_keys` or `decode_values`."""

    def kernel(
        codes: Tensor,
        affine: Tensor,
        other_scale: Tensor,
        rotation: Tensor,
        equalizer: Tensor | None,
        config: str,
    ) -> Tensor:
        tiles = EncodedTiles(codes, affine, other_scale)
        return decode(tiles, KVarNConfig.from_string(config), rotation, equalizer).contiguous()

    return kernel


def _quantize_keys_fake(
    tiles: Tensor, rotation: Tensor, equalizer: Tensor | None, config: str
) -> EncodedTiles:
    return _fake_encoded(tiles, -2, -1, KVarNConfig.from_string(config).key_bits)


def _quantize_values_fake(
    tiles: Tensor, rotation: Tensor, equalizer: Tensor | None, config: str
) -> EncodedTiles:
    return _fake_encoded(tiles, -1, -2, KVarNConfig.from_string(config).value_bits)


def _fake_encoded(tiles: Tensor, row_dim: int, packed_dim: int, bits: int) -> EncodedTiles:
    lead, rows, width = tiles.shape[:-2], tiles.shape[row_dim], tiles.shape[packed_dim]
    return EncodedTiles(
        tiles.new_empty((*lead, rows, row_bytes(width, bits)), dtype=torch.uint8),
        tiles.new_empty((*lead, 2, width), dtype=torch.float16),
        tiles.new_empty((*lead, rows), dtype=torch.float16),
    )


def _dequantize_keys_fake(codes: Tensor, affine: Tensor, *rest: Any) -> Tensor:
    return affine.new_empty(
        (*codes.shape[:-2], codes.shape[-2], affine.shape[-1]), dtype=torch.float32
    )


def _dequantize_values_fake(codes: Tensor, affine: Tensor, *rest: Any) -> Tensor:
    return affine.new_empty(
        (*codes.shape[:-2], affine.shape[-1], codes.shape[-2]), dtype=torch.float32
    )


quantize_keys = define("quantize_keys", _QUANTIZE, _quantizer(encode_keys), _quantize_keys_fake)
quantize_values = define(
    "quantize_values", _QUANTIZE, _quantizer(encode_values), _quantize_values_fake
)
dequantize_keys = define(
    "dequantize_keys", _DEQUANTIZE, _dequantizer(decode_keys), _dequantize_keys_fake
)
dequantize_values = define(
    "dequantize_values", _DEQUANTIZE, _dequantizer(decode_values), _dequantize_values_fake
)
