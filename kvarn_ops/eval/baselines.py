"""Other published quantizers, simulated: quantize and dequantize one tile, count the bits.

They are evaluation code: written for comparison, from their papers, with the same tiles, sinks and
tail as the product. Scales and zero points are rounded to fp16, as they would be stored.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..hadamard import hadamard

__all__ = [
    "SCALE_BITS",
    "fp8",
    "gaussian_codebook",
    "rotated",
    "round_to_nearest",
    "round_to_nearest_groups",
    "turbo",
]

SCALE_BITS = 16
_SMALLEST_SCALE = 1e-7  # fp16 holds it as a subnormal; rows of equal numbers need any scale but 0


def round_to_nearest(x: Tensor, bits: int, dim: int) -> Tensor:
    """Asymmetric min-max rounding with one scale and zero point along `dim`."""
    low = x.amin(dim, keepdim=True).half().to(x.dtype)
    scale = (x.amax(dim, keepdim=True) - low) / (2**bits - 1)
    scale = scale.clamp_min(_SMALLEST_SCALE).half().to(x.dtype)
    codes = ((x - low) / scale).round().clamp(0, 2**bits - 1)
    return codes * scale + low


def round_to_nearest_groups(x: Tensor, bits: int, dim: int, group: int) -> Tensor:
    """`round_to_nearest` with a scale per `group` elements along `dim` (-1 or -2)."""
    group = min(group, x.shape[dim])
    split = x.unflatten(dim, (-1, group))
    along = dim if dim == -1 else -2
    return round_to_nearest(split, bits, along).flatten(dim - 1, dim)


def rotated(tile: Tensor) -> tuple[Tensor, Tensor]:
    """A tile `[..., G, D]` in the Hadamard frame, and the matrix whose transpose leads back."""
    matrix = hadamard(tile.shape[-1], tile.dtype, tile.device)
    return tile @ matrix, matrix


@lru_cache(maxsize=8)
def gaussian_codebook(bits: int) -> tuple[float, ...]:
    """Levels of the best scalar quantizer of a standard normal variable (Lloyd and Max)."""
    levels = torch.special.ndtri((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    infinite = torch.tensor([torch.inf], dtype=torch.float64)
    for _ in range(5000):  # each level moves to the mean of its cell
        edges = torch.cat([-infinite, (levels[1:] + levels[:-1]) / 2, infinite])
        mass = torch.special.ndtr(edges).diff()
        levels = -(torch.exp(-(edges**2) / 2) / (2 * torch.pi) ** 0.5).diff() / mass
    return tuple(levels.tolist())


def turbo(tile: Tensor, bits: int) -> Tensor:
    """TurboQuant-like: rotate, one norm per token, a codebook for Gaussian coordinates.

    After arXiv 2504.19874 (its mean-squared-error form) with a Hadamard rotation, and with the norm
    kept exactly, as implementations do since it helps attention.
    """
    x, matrix = rotated(tile)
    norm = x.norm(dim=-1, keepdim=True)
    levels = torch.tensor(gaussian_codebook(bits), dtype=x.dtype, device=x.device)
    unit = x / norm.clamp_min(1e-30) * x.shape[-1] ** 0.5
    chosen = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)]
    stored = (norm / chosen.norm(dim=-1, keepdim=True)).half().to(x.dtype)
    return (chosen * stored) @ matrix.mT


def fp8(tile: Tensor) -> Tensor:
    """8-bit floats (e4m3) without a scale, as serving engines store by default."""
    limit = torch.finfo(torch.float8_e4m3fn).max
    return tile.clamp(-limit, limit).to(torch.float8_e4m3fn).to(tile.dtype)
