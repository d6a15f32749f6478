"""Decode tiles: `x = (code - center + offset) * scale * other_scale`, then rotate back.

Last, channels are multiplied by what `plus` divided them by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import KVarNConfig
from ..hadamard import hadamard
from ..layout import center, unpack_codes
from .encode import EncodedTiles

__all__ = ["decode_keys", "decode_values"]


def decode_keys(
    tiles: EncodedTiles,
    config: KVarNConfig,
    rotation: Tensor | None = None,
    equalizer: Tensor | None = None,
) -> Tensor:
    """Keys `[..., group_size, head_dim]`, fp32, in the original frame."""
    head_dim = tiles.affine.shape[-1]
    codes = unpack_codes(tiles.codes, config.key_bits, head_dim).float()  # [..., G, D]
    scale, offset = tiles.affine.float().unbind(-2)
    rotated = (codes - center(config.key_bits) + offset.unsqueeze(-2)) * scale.unsqueeze(-2)
    rotated = rotated * tiles.other_scale.float().unsqueeze(-1)
    return _restored(rotated, config.rotate_keys, rotation, equalizer)


def decode_values(
    tiles: EncodedTiles,
    config: KVarNConfig,
    rotation: Tensor | None = None,
    equalizer: Tensor | None = None,
) -> Tensor:
    """Values `[..., group_size, head_dim]`, fp32, in the original frame."""
    tokens = tiles.affine.shape[-1]
    codes = unpack_codes(tiles.codes, config.value_bits, tokens).float().mT  # [..., G, D]
    scale, offset = tiles.affine.float().unbind(-2)
    rotated = (codes - center(config.value_bits) + offset.unsqueeze(-1)) * scale.unsqueeze(-1)
    rotated = rotated * tiles.other_scale.float().unsqueeze(-2)
    return _restored(rotated, config.rotate_values, rotation, equalizer)


def _restored(x: Tensor, rotate: bool, rotation: Tensor | None, equalizer: Tensor | None) -> Tensor:
    if rotate:
        matrix = rotation
        if matrix is None:
            matrix = hadamard(x.shape[-1], torch.float32, x.device)
        x = x @ matrix.mT
    if equalizer is not None:
        x = x * torch.exp2(equalizer.float()).unsqueeze(-2)
    return x
