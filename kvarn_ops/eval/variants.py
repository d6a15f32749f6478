"""Variants of the `plus` encoder, for deciding what the product stores. Not used by the product.

Each is `plus` with one or more choices changed, simulated on the same tiles. `docs/decisions.md`
says what came of them; `kvarn-ops eval --methods plus,plus/k_token` measures one again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import KVarNConfig
from ..hadamard import hadamard
from ..layout import center
from ..reference.encode import CLIP_MIN, sanitize
from ..reference.normalize import EQUALIZE_POWER, equalizer, gauge_exponent, normalize_plus

__all__ = ["VARIANTS", "Variant"]

_LOG_STEPS = 16  # per octave: 8 bits cover 16 octaves
_ZERO_UNIT = 4  # an 8-bit zero point counts quarters of a code


@dataclass(frozen=True)
class Variant:
    """Choices of an encoder; the defaults are those of `plus`.

    Parameters
    ----------
    equalize_keys, equalize_values : float
        Power of a channel's RMS by which it is divided before the rotation; 0: not at all.
    iters : int
        Iterations of the variance normalization.
    candidates : int
        Clip ranges that are tried; 1: min-max.
    refits : int
        Times that scale and zero point are fitted to the codes by least squares, and codes rounded
        again.
    keep_norm : bool
        Rescale each token to its norm.
    key_rows : str
        Whether a zero point of K belongs to a "channel" or to a "token".
    rotate_keys, rotate_values : bool
        Hadamard rotation.
    key_zero, value_zero : str
        "fp16", "int8" or "none" (codes symmetric around 0).
    row_scale, column_scale, token_scale : str
        "fp16" or "log8"; `token_scale` goes before the others for the scale that tokens have.
    """

    equalize_keys: float = EQUALIZE_POWER
    equalize_values: float = EQUALIZE_POWER
    iters: int = 2
    candidates: int = 8
    refits: int = 0
    keep_norm: bool = True
    key_rows: str = "channel"
    rotate_keys: bool = True
    rotate_values: bool = True
    key_zero: str = "fp16"
    value_zero: str = "fp16"
    row_scale: str = "fp16"
    column_scale: str = "fp16"
    token_scale: str = "fp16"

    def keys(self, tile: Tensor, first: Tensor, config: KVarNConfig) -> Tensor:
        """`[..., G, D]` as it would be read back."""
        factors = _factors(first, self.equalize_keys)
        x, matrix = _rotate(tile / factors, self.rotate_keys)
        by_channel = self.key_rows == "channel"
        x = x.mT if by_channel else x
        y = self._restore(x, config.key_bits, self.key_zero, not by_channel)
        return (y.mT if by_channel else y) @ matrix.mT * factors

    def values(self, tile: Tensor, first: Tensor, config: KVarNConfig) -> Tensor:
        """`[..., G, D]` as it would be read back."""
        factors = _factors(first, self.equalize_values)
        x, matrix = _rotate(tile / factors, self.rotate_values)
        return self._restore(x, config.value_bits, self.value_zero, True) @ matrix.mT * factors

    def bits(self, config: KVarNConfig, head_dim: int) -> float:
        """Bits per element, mean of K and V."""
        group = config.group_size
        total = (config.key_bits + config.value_bits) * group * head_dim
        keys_by_token = self.key_rows == "token"
        for by_token, zero in ((keys_by_token, self.key_zero), (True, self.value_zero)):
            rows, columns = (group, head_dim) if by_token else (head_dim, group)
            row, column = self._formats(by_token)
            total += rows * (_width(row) + _width(zero)) + columns * _width(column)
            total += 8 * ("log8" in (row, column))  # an exponent per tile
        return total / (2 * group * head_dim)

    def _formats(self, rows_are_tokens: bool) -> tuple[str, str]:
        if rows_are_tokens:
            return self.token_scale, self.column_scale
        return self.row_scale, self.token_scale

    def _restore(self, tile: Tensor, bits: int, zero_format: str, tokens_are_rows: bool) -> Tensor:
        """Encode and decode `[..., R, C]`; a scale and a zero point per row, a scale per column."""
        exponent = gauge_exponent(tile)
        unit = torch.ldexp(tile, -exponent)
        column, row = normalize_plus(unit, self.iters)
        row_format, column_format = self._formats(tokens_are_rows)
        column = _stored_scale(column, column_format)
        balanced = unit / column / row
        scale, zero = self._fit(balanced, bits, zero_format)
        whole = _stored_scale(row * scale, row_format)
        # Codes are computed for the scale that is stored.
        codes = _codes(unit / column / whole, zero, bits)
        restored = (codes + zero) * whole * column
        if self.keep_norm:
            dim = -1 if tokens_are_rows else -2
            ratio = unit.norm(dim=dim, keepdim=True) / restored.norm(dim=dim, keepdim=True)
            ratio = ratio.nan_to_num(1.0).clamp_max(8.0)
            if tokens_are_rows:
                whole = _stored_scale(whole * ratio, row_format)
            else:
                column = _stored_scale(column * ratio, column_format)
            restored = (codes + zero) * whole * column
        return torch.ldexp(restored, exponent)

    def _fit(self, x: Tensor, bits: int, zero_format: str) -> tuple[Tensor, Tensor]:
        """Scale and zero point (code units) of each row."""
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        if zero_format == "none":
            high = torch.maximum(high, -low)
            low = -high
        middle, half = (low + high) / 2, (high - low) / 2
        best = torch.full_like(low, torch.inf)
        best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
        count = self.candidates if bits in CLIP_MIN else 1
        for candidate in range(count):
            shrink = 1.0 - (1.0 - CLIP_MIN.get(bits, 1.0)) * candidate / max(1, count - 1)
            scale = (2 * shrink * half / (2**bits - 1)).clamp_min(1e-10)
            zero = _stored_zero((middle - shrink * half) / scale, bits, zero_format)
            for _ in range(self.refits):
                scale, zero = _least_squares(x, _codes(x / scale, zero, bits), scale, zero)
                zero = _stored_zero(zero, bits, zero_format)
            error = ((_codes(x / scale, zero, bits) + zero) * scale - x).square()
            error = error.sum(-1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
        return best_scale, best_zero


def _factors(first: Tensor, power: float) -> Tensor:
    """`[..., 1, D]` by which channels are divided."""
    log = equalizer(sanitize(first)).to(first.dtype)
    return torch.exp2(log * (power / EQUALIZE_POWER)).unsqueeze(-2)


def _rotate(tile: Tensor, rotate: bool) -> tuple[Tensor, Tensor]:
    tile = sanitize(tile)
    width = tile.shape[-1]
    if not rotate:
        return tile, torch.eye(width, dtype=tile.dtype, device=tile.device)
    matrix = hadamard(width, tile.dtype, tile.device)
    return tile @ matrix, matrix


def _codes(x: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (x - zero).round().clamp(0, 2**bits - 1)


def _least_squares(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """The line through `codes -> x` of each row."""
    mean_code, mean_x = codes.mean(-1, keepdim=True), x.mean(-1, keepdim=True)
    spread = (codes - mean_code).square().sum(-1, keepdim=True)
    slope = ((codes - mean_code) * (x - mean_x)).sum(-1, keepdim=True) / spread
    good = (spread > 0) & (slope > 0)
    slope = torch.where(good, slope, scale)
    return slope, torch.where(good, mean_x / slope - mean_code, zero)


def _stored_scale(scale: Tensor, stored: str) -> Tensor:
    """`[..., R, 1]` or `[..., 1, C]`, as read back; a tile's largest scale decides the exponent."""
    if stored == "fp16":
        peak = torch.frexp(scale.amax(dim=(-2, -1), keepdim=True))[1]
        return torch.ldexp(torch.ldexp(scale, -peak).half().to(scale.dtype), peak)
    peak = torch.frexp(scale.amax(dim=(-2, -1), keepdim=True))[1].to(scale.dtype)
    steps = ((torch.log2(scale.clamp_min(1e-30)) - peak) * _LOG_STEPS).round().clamp(-255, 0)
    return torch.exp2(steps / _LOG_STEPS + peak)


def _stored_zero(zero: Tensor, bits: int, stored: str) -> Tensor:
    middle = center(bits)
    if stored == "none":
        return torch.full_like(zero, -middle)
    offset = zero + middle
    if stored == "int8":
        return (offset * _ZERO_UNIT).round().clamp(-128, 127) / _ZERO_UNIT - middle
    return offset.half().to(zero.dtype) - middle


def _width(stored: str) -> int:
    return {"fp16": 16, "log8": 8, "int8": 8, "none": 0}[stored]


_INT8_ZEROS = {"key_zero": "int8", "value_zero": "int8"}
_LOG8 = {"row_scale": "log8", "column_scale": "log8"}
VARIANTS = {
    "same": Variant(),
    "unequalized": Variant(equalize_keys=0, equalize_values=0),
    "equalize_k": Variant(equalize_values=0),
    "equalize_v": Variant(equalize_keys=0),
    "equalize_025": Variant(equalize_keys=0.25, equalize_values=0.25),
    "equalize_075": Variant(equalize_keys=0.75, equalize_values=0.75),
    "paper_rounding": Variant(candidates=1, keep_norm=False),
    "clip_only": Variant(keep_norm=False),
    "norm_only": Variant(candidates=1),
    "clip4": Variant(candidates=4),
    "clip16": Variant(candidates=16),
    "refit": Variant(refits=1),
    "refit2": Variant(refits=2),
    "iters0": Variant(iters=0),
    "iters1": Variant(iters=1),
    "iters4": Variant(iters=4),
    "k_token": Variant(key_rows="token"),
    "k_unrotated": Variant(rotate_keys=False),
    "v_unrotated": Variant(rotate_values=False),
    "v_symmetric": Variant(value_zero="none"),
    "kv_symmetric": Variant(key_zero="none", value_zero="none"),
    "k_token_symmetric": Variant(key_rows="token", key_zero="none", value_zero="none"),
    "zero8": Variant(**_INT8_ZEROS),
    "log8": Variant(token_scale="log8", **_LOG8, **_INT8_ZEROS),
    "mixed8": Variant(**_LOG8, **_INT8_ZEROS),
}
