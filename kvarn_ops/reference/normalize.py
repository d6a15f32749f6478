"""Variance normalization (Algorithm 1 of arXiv 2606.03458), and what `plus` does before it.

A tile is a matrix `[..., R, C]`: K is `[channels, tokens]`, V is `[tokens, channels]`. Columns and
rows are scaled in turn until all have similar standard deviation; the best iterate *of each tile*
is kept, since the iteration is not monotone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["equalizer", "gauge_exponent", "normalize_paper", "normalize_plus"]

EQUALIZE_POWER = 0.5
_EQUALIZE_MIN, _EQUALIZE_MAX = -2.0, 4.0  # octaves; silent channels may speak in later tiles
_EQUALIZE_DEPTH = 10.0  # octaves below the loudest channel at which a channel counts as silent
LOG_MAX = 10.0
PAPER_LOG_MIN, PAPER_STD_MIN, STD_MAX = -0.3, 1e-3, 1e3
PLUS_LOG_MIN, PLUS_STD_MIN = -4.6, 1e-2
_IMBALANCE_FLOOR = 1e-8
_ZERO_STD = 1e-6  # of a gauged tile: such a row or column carries nothing to balance
_GAUGE_MIN = -64  # smaller tiles are zeros in fp16, and 2**64 is far from fp32's limits


def normalize_paper(tile: Tensor, iters: int) -> tuple[Tensor, Tensor]:
    """Scales of the published method.

    Parameters
    ----------
    tile : Tensor
        `[..., R, C]`, rotated, fp32 or fp64.
    iters : int
        Iterations; 0 gives ones.

    Returns
    -------
    column_scale, row_scale : Tensor
        `[..., 1, C]` and `[..., R, 1]`; `tile / column_scale / row_scale` is balanced.
    """
    return _iterate(tile, iters, PAPER_LOG_MIN, PAPER_STD_MIN, _torch_std, ignore_zeros=False)


def normalize_plus(tile: Tensor, iters: int) -> tuple[Tensor, Tensor]:
    """Like `normalize_paper` for a tile of unit RMS: lower floors, zero rows and columns ignored.

    The published floor of exp(-0.3) keeps tiles of small amplitude from being balanced at all, and
    without any floor nearly constant tiles diverge. A floor relative to the tile's own amplitude
    (`gauge_exponent`) removes both.
    """
    return _iterate(tile, iters, PLUS_LOG_MIN, PLUS_STD_MIN, _fast_std, ignore_zeros=True)


def equalizer(tile: Tensor) -> Tensor:
    """Log2 of the factors by which `plus` divides the channels of a sequence before the rotation.

    The rotation spreads the error of outlier channels over all channels, although queries and the
    output projection tend to be small where keys and values are large. Dividing by the square root
    of a channel's RMS is half way between equal absolute errors and equal relative errors of
    channels (the power of SmoothQuant, arXiv 2211.10438).

    Parameters
    ----------
    tile : Tensor
        `[..., G, D]`, the first tile of a sequence, not rotated, fp32 or fp64.

    Returns
    -------
    Tensor
        `[..., D]` fp16, independent of the tile's amplitude. A factor of 1 is -0.0, never 0.0:
        zeros in a cache say that no equalizer was made yet.
    """
    unit = torch.ldexp(tile, -gauge_exponent(tile))
    loudness = torch.log2(unit.square().mean(-2)) / 2  # of the RMS
    loudest = loudness.amax(-1, keepdim=True)
    loudness = loudness.maximum(loudest - _EQUALIZE_DEPTH)
    factor = EQUALIZE_POWER * (loudness - loudness.mean(-1, keepdim=True))
    factor = factor.clamp(_EQUALIZE_MIN, _EQUALIZE_MAX)
    factor = torch.where(loudest.isfinite(), factor, 0.0).half()
    return torch.where(factor == 0, -0.0, factor)


def gauge_exponent(tile: Tensor) -> Tensor:
    """Exponent `[..., 1, 1]` of the power of two near the RMS of a tile; 0 for a zero tile."""
    peak = tile.abs().amax(dim=(-2, -1), keepdim=True)
    peak_exponent = torch.frexp(peak)[1].clamp_min(_GAUGE_MIN)
    rms = torch.ldexp(tile, -peak_exponent).square().mean(dim=(-2, -1), keepdim=True).sqrt()
    exponent = (torch.frexp(rms)[1] + peak_exponent).clamp_min(_GAUGE_MIN)
    return torch.where(peak > 0, exponent, torch.zeros_like(exponent))


def _iterate(
    tile: Tensor,
    iters: int,
    log_min: float,
    std_min: float,
    std: Callable[[Tensor, int], Tensor],
    ignore_zeros: bool,
) -> tuple[Tensor, Tensor]:
    column_log = torch.zeros_like(tile[..., :1, :])
    row_log = torch.zeros_like(tile[..., :, :1])
    column_scale, row_scale = column_log.exp(), row_log.exp()
    column_std, row_std = std(tile, -2), std(tile, -1)
    # Decided once: a token that counts in one iterate only would decide which iterate is best.
    skip_columns = (column_std < _ZERO_STD) & ignore_zeros
    skip_rows = (row_std < _ZERO_STD) & ignore_zeros
    best = _spread(column_std, skip_columns) + _spread(row_std, skip_rows)
    for _ in range(iters):
        column_log = _step(column_log, column_std, log_min, std_min)
        balanced = tile / column_log.exp() / row_log.exp()
        row_log = _step(row_log, std(balanced, -1), log_min, std_min)
        balanced = tile / column_log.exp() / row_log.exp()
        column_std, row_std = std(balanced, -2), std(balanced, -1)
        imbalance = _spread(column_std, skip_columns) + _spread(row_std, skip_rows)
        better = imbalance <= best
        best = torch.where(better, imbalance, best)
        column_scale = torch.where(better, column_log.exp(), column_scale)
        row_scale = torch.where(better, row_log.exp(), row_scale)
    return column_scale, row_scale


def _torch_std(x: Tensor, dim: int) -> Tensor:
    """As the published code: near-ties between iterates depend on the last bits."""
    return x.std(dim, keepdim=True)


def _fast_std(x: Tensor, dim: int) -> Tensor:
    """Two passes, as precise as `Tensor.std` and an order of magnitude faster on CPU."""
    centred = x - x.mean(dim, keepdim=True)
    return (centred.square().sum(dim, keepdim=True) / (x.shape[dim] - 1)).sqrt()


def _step(log_scale: Tensor, std: Tensor, log_min: float, std_min: float) -> Tensor:
    return (log_scale + std.clamp(std_min, STD_MAX).log()).clamp(log_min, LOG_MAX)


def _spread(std: Tensor, skip: Tensor) -> Tensor:
    """Largest over smallest standard deviation, skipped rows or columns aside, `[..., 1, 1]`."""
    largest = std.masked_fill(skip, 0.0).amax(dim=(-2, -1), keepdim=True)
    smallest = std.masked_fill(skip, torch.inf).amin(dim=(-2, -1), keepdim=True)
    smallest = smallest.clamp_min(_IMBALANCE_FLOOR)
    return largest / smallest
