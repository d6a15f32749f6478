"""Encode tiles: equalize (`plus`), rotate, normalize, round to nearest, absorb the scales.

Both encoders store the same fields, so that everything that reads a cache is independent of the
encoder (`paper` or `plus`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import KVarNConfig
from ..errors import InputError
from ..hadamard import hadamard
from ..layout import center, pack_codes
from .normalize import equalizer, gauge_exponent, normalize_paper, normalize_plus

__all__ = [
    "EncodedTiles",
    "encode_keys",
    "encode_values",
    "first_equalizer",
    "refuse_nonfinite",
    "sanitize",
]

FP16_MAX = 65504.0
SCALE_MIN = 1e-10
ZERO_LIMIT = 1024.0  # code units; beyond, fp16 rounds the zero point by half a step or more
CLIP_CANDIDATES = 8
CLIP_MIN = {2: 0.39, 3: 0.56, 4: 0.74}  # narrowest fraction of the min-max range, by bits
NORM_RATIO_MAX = 8.0

# Exponents of the token scale that fp16 holds with room for the spread within a tile, and for the
# factor of 2**4 with which kernels multiply it.
_TOKEN_EXPONENT_MIN, _TOKEN_EXPONENT_MAX = 0, 10


class EncodedTiles(NamedTuple):
    """Packed codes and fp16 scales of tiles; K and V orientation as in `kvarn_ops.layout`.

    `codes` `[..., rows, bytes]` uint8; `affine` `[..., 2, N]` and `other_scale` `[..., M]` fp16,
    (scale, offset) where for K `N` = channels and `M` = tokens, for V the reverse.
    """

    codes: Tensor
    affine: Tensor
    other_scale: Tensor


def first_equalizer(tile: Tensor, config: KVarNConfig) -> Tensor:
    """The equalizer `[..., D]` fp16 of sequences whose first tiles are `tile` `[..., G, D]`.

    What is not finite, or as large as that is stored, counts as 0: it would decide the factors.
    """
    if not config.equalizes:
        return torch.zeros_like(tile[..., 0, :], dtype=torch.float16)
    tile = sanitize(tile)
    return equalizer(tile.masked_fill(tile.abs() >= FP16_MAX, 0.0))


def encode_keys(
    keys: Tensor,
    config: KVarNConfig,
    rotation: Tensor | None = None,
    equalizer: Tensor | None = None,
) -> EncodedTiles:
    """Quantize tiles of keys `[..., group_size, head_dim]` (after RoPE), any floating dtype.

    Parameters
    ----------
    keys : Tensor
        Whole tiles, not rotated. NaN is stored as 0, Inf as the largest fp16 value.
    config : KVarNConfig
        Which encoder and how many bits.
    rotation : Tensor, optional
        `[head_dim, head_dim]`; built from head_dim if absent. Ignored if keys are not rotated.
    equalizer : Tensor, optional
        `[..., head_dim]` fp16, log2 of a factor per channel; absent: none.
    """
    tile = _rotated(keys, config.rotate_keys, config, rotation, equalizer).mT  # [..., D, G]
    row_scale, zero, column_scale, codes = _encode(tile, config.key_bits, config)
    if config.encoder == "plus":
        restored = (codes + _stored(zero, config.key_bits)) * row_scale * column_scale
        column_scale = column_scale * _norm_ratio(tile, restored, channel_dim=-2)
    row_scale, column_scale = _to_fp16(channel=row_scale, token=column_scale)
    offset = _offset(zero, config.key_bits)
    affine = torch.stack([row_scale.squeeze(-1), offset.squeeze(-1)], dim=-2)
    return EncodedTiles(pack_codes(codes.mT, config.key_bits), affine, column_scale.squeeze(-2))


def encode_values(
    values: Tensor,
    config: KVarNConfig,
    rotation: Tensor | None = None,
    equalizer: Tensor | None = None,
) -> EncodedTiles:
    """Quantize tiles of values `[..., group_size, head_dim]`; see `encode_keys`."""
    tile = _rotated(values, config.rotate_values, config, rotation, equalizer)  # [..., G, D]
    row_scale, zero, column_scale, codes = _encode(tile, config.value_bits, config)
    if config.encoder == "plus":
        restored = (codes + _stored(zero, config.value_bits)) * row_scale * column_scale
        row_scale = row_scale * _norm_ratio(tile, restored, channel_dim=-1)
    column_scale, row_scale = _to_fp16(channel=column_scale, token=row_scale)
    offset = _offset(zero, config.value_bits)
    affine = torch.stack([row_scale.squeeze(-1), offset.squeeze(-1)], dim=-2)
    return EncodedTiles(pack_codes(codes.mT, config.value_bits), affine, column_scale.squeeze(-2))


def refuse_nonfinite(x: Tensor) -> None:
    """Raise `InputError` if `x` holds NaN or Inf: what `check_finite=True` asks for."""
    if not bool(x.isfinite().all()):
        raise InputError(
            "a tile to be quantized holds NaN or Inf (check_finite=True). Find where the model "
            "produces it, or pass check_finite=False to store NaN as 0 and Inf as 65504."
        )


def sanitize(x: Tensor) -> Tensor:
    """NaN to 0, everything else into the range of fp16, as fp32 (fp64 stays fp64)."""
    x = x if x.dtype == torch.float64 else x.float()
    return x.nan_to_num(nan=0.0, posinf=FP16_MAX, neginf=-FP16_MAX).clamp(-FP16_MAX, FP16_MAX)


def _rotated(
    x: Tensor,
    rotate: bool,
    config: KVarNConfig,
    rotation: Tensor | None,
    equalizer: Tensor | None,
) -> Tensor:
    if config.check_finite:
        refuse_nonfinite(x)
    x = sanitize(x)
    if equalizer is not None:
        x = x * torch.exp2(-equalizer.to(x.dtype)).unsqueeze(-2)
    if not rotate:
        return x
    matrix = hadamard(x.shape[-1], x.dtype, x.device) if rotation is None else rotation.to(x.dtype)
    return x @ matrix


def _encode(tile: Tensor, bits: int, config: KVarNConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row scale, zero point (code units), column scale and codes of `tile` `[..., R, C]`."""
    if config.encoder == "paper":
        column, row = normalize_paper(tile, config.norm_iters)
        balanced = tile / column / row
        low, high = balanced.amin(-1, keepdim=True), balanced.amax(-1, keepdim=True)
        scale, zero, codes = _round_to_nearest(balanced, low, high, bits)
        scale, zero = _published_rounding(row * scale, row * scale * zero)
        return scale, zero, _fp16_or_exact(column), codes
    exponent = gauge_exponent(tile)
    unit = torch.ldexp(tile, -exponent)
    column, row = normalize_plus(unit, config.norm_iters)
    balanced = unit / column / row
    low, high = _clip_range(balanced, bits)
    scale, zero, codes = _round_to_nearest(balanced, low, high, bits)
    return torch.ldexp(row * scale, exponent), zero, column, codes


def _round_to_nearest(
    x: Tensor, low: Tensor, high: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric rounding per row: `x ~ (codes + zero) * scale`."""
    levels = 2**bits - 1
    scale = ((high - low) / levels).clamp_min(SCALE_MIN)
    scale = torch.maximum(scale, low.abs() / ZERO_LIMIT)
    codes = ((x - low) / scale).round().clamp(0, levels)
    return scale, low / scale, codes.to(torch.uint8)


def _published_rounding(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Round as the published code stores (fp16 scale and zero point), zero in code units."""
    scale, zero_point = _fp16_or_exact(scale), _fp16_or_exact(zero_point)
    return scale, torch.where(scale > 0, zero_point / scale, 0.0).clamp(-FP16_MAX, FP16_MAX)


def _fp16_or_exact(x: Tensor) -> Tensor:
    """`x` rounded to fp16, unchanged where fp16 overflows (the published code stores Inf)."""
    return torch.where(x.abs() > FP16_MAX, x, x.half().to(x.dtype))


def _clip_range(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Per row, the shrunk min-max range with the least squared error among fixed candidates."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if bits not in CLIP_MIN:
        return low, high
    middle, half = (low + high) / 2, (high - low) / 2
    best_error = torch.full_like(low, torch.inf)
    best_shrink = torch.ones_like(low)
    for candidate in range(CLIP_CANDIDATES):
        shrink = 1.0 - (1.0 - CLIP_MIN[bits]) * candidate / (CLIP_CANDIDATES - 1)
        scale, zero, codes = _round_to_nearest(
            x, middle - shrink * half, middle + shrink * half, bits
        )
        error = ((codes + zero) * scale - x).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_shrink = torch.where(better, shrink, best_shrink)
    return middle - best_shrink * half, middle + best_shrink * half


def _offset(zero: Tensor, bits: int) -> Tensor:
    """Zero point relative to the centre code, fp16: small, hence precise, for symmetric rows."""
    return (zero + center(bits)).half()


def _stored(zero: Tensor, bits: int) -> Tensor:
    """Zero point as a reader of the cache sees it."""
    return _offset(zero, bits).to(zero.dtype) - center(bits)


def _norm_ratio(tile: Tensor, restored: Tensor, channel_dim: int) -> Tensor:
    """Factor per token that gives its dequantized vector the norm of the original one.

    Clipping shrinks the largest entries, hence the norm, hence attention scores; clipping without
    this correction is worse than no clipping.

    Clipping alone needs factors below 2. The limit is for tokens that are dequantized to almost
    nothing: tokens share the exponent of their scales, and one huge factor would push the scales of
    the tile's other tokens into fp16's subnormals.
    """
    wanted = tile.norm(dim=channel_dim, keepdim=True)
    actual = restored.norm(dim=channel_dim, keepdim=True)
    ratio = (wanted / actual).clamp_max(NORM_RATIO_MAX)
    return torch.where(actual > 0, ratio, torch.ones_like(actual))


def _to_fp16(channel: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Move powers of two between the two scales so that both stay normal in fp16, then round.

    The larger channel scale of a tile ends up in [1, 2) and amplitude goes to the token scale,
    unless that would leave fp16's range: then the exponent is shared.
    """
    channel_peak = torch.frexp(channel.amax(dim=(-2, -1), keepdim=True))[1] - 1
    channel, token = torch.ldexp(channel, -channel_peak), torch.ldexp(token, channel_peak)
    token_peak = torch.frexp(token.amax(dim=(-2, -1), keepdim=True))[1] - 1
    outside = (token_peak < _TOKEN_EXPONENT_MIN) | (token_peak > _TOKEN_EXPONENT_MAX)
    moved = torch.where(outside, token_peak - token_peak // 2, torch.zeros_like(token_peak))
    return torch.ldexp(channel, moved).half(), torch.ldexp(token, -moved).half()
