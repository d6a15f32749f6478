"""Both encoders in float64 numpy, written from the method's description and not from the package.

Scales stay float64 (the package stores fp16), so that a comparison shows what fp16 costs. One tile
at a time: rows `[R, C]`, which is `[channels, tokens]` for K and `[tokens, channels]` for V.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

CLIP_MIN = {2: 0.39, 3: 0.56, 4: 0.74, 8: 1.0}
FP16_MAX = 65504.0


@dataclass
class Encoding:
    """What an encoder chose for one tile."""

    codes: npt.NDArray[np.int64]  # [R, C]
    unrounded: Array  # [R, C], the codes before rounding
    restored: Array  # [R, C], dequantized
    ambiguous_rows: npt.NDArray[np.bool_]  # two clip ranges are equally good


def encode(tile: Array, bits: int, encoder: str, iters: int, token_axis: int) -> list[Encoding]:
    """Encodings from every iterate that is as balanced as the best one, the best one first.

    More than one, because float32 may see another order among iterates this close.
    """
    exponent = _gauge(tile) if encoder == "plus" else 0
    unit = tile / 2.0**exponent
    iterates = _iterates(unit, encoder, iters)
    best = min(imbalance for imbalance, _, _ in iterates)
    close = [item for item in reversed(iterates) if item[0] <= best * (1 + 1e-4)]
    close.sort(key=lambda item: item[0])
    return [_encode(unit, exponent, c, r, bits, encoder, token_axis) for _, c, r in close]


def _gauge(tile: Array) -> int:
    rms = np.sqrt(np.mean(tile**2))
    return int(np.frexp(rms)[1]) if rms > 0 else 0


def _iterates(tile: Array, encoder: str, iters: int) -> list[tuple[float, Array, Array]]:
    low, std_min = (-0.3, 1e-3) if encoder == "paper" else (-4.6, 1e-2)
    used_columns, used_rows = _column_std(tile) > 0, _row_std(tile) > 0
    if encoder == "paper":
        used_columns[:], used_rows[:] = True, True

    def imbalance(x: Array) -> float:
        spread = 0.0
        for std, used in ((_column_std(x), used_columns), (_row_std(x), used_rows)):
            if used.any():
                spread += std[used].max() / max(std[used].min(), 1e-8)
        return spread

    log_c, log_r = np.zeros((1, tile.shape[1])), np.zeros((tile.shape[0], 1))
    found = [(imbalance(tile), np.exp(log_c), np.exp(log_r))]
    current = tile
    for _ in range(iters):
        std = np.clip(_column_std(current), std_min, 1e3)[None, :]
        log_c = np.clip(log_c + np.log(std), low, 10)
        current = tile / np.exp(log_c) / np.exp(log_r)
        std = np.clip(_row_std(current), std_min, 1e3)[:, None]
        log_r = np.clip(log_r + np.log(std), low, 10)
        current = tile / np.exp(log_c) / np.exp(log_r)
        found.append((imbalance(current), np.exp(log_c), np.exp(log_r)))
    return found


def _column_std(x: Array) -> Array:
    return x.std(axis=0, ddof=1)


def _row_std(x: Array) -> Array:
    return x.std(axis=1, ddof=1)


def _encode(
    unit: Array,
    exponent: int,
    column: Array,
    row: Array,
    bits: int,
    encoder: str,
    token_axis: int,
) -> Encoding:
    balanced = unit / column / row
    low, high = balanced.min(1, keepdims=True), balanced.max(1, keepdims=True)
    ambiguous = np.zeros(len(unit), dtype=bool)
    if encoder == "plus":
        low, high, ambiguous = _clip(balanced, low, high, bits)
    scale, unrounded, codes = _round(balanced, low, high, bits)
    restored = (codes * scale + low) * row * column
    if encoder == "plus":
        channel_axis = 1 - token_axis
        wanted = np.linalg.norm(unit, axis=channel_axis, keepdims=True)
        actual = np.linalg.norm(restored, axis=channel_axis, keepdims=True)
        ratio = np.divide(wanted, actual, out=np.ones_like(actual), where=actual > 0)
        restored = restored * np.minimum(ratio, 8.0)
    return Encoding(codes, unrounded, restored * 2.0**exponent, ambiguous)


def _round(x: Array, low: Array, high: Array, bits: int) -> tuple[Array, Array, Array]:
    levels = 2**bits - 1
    scale = np.maximum((high - low) / levels, 1e-10)
    # The one departure from the published method: a zero point beyond 1024 steps would be rounded
    # by half a step or more in fp16. Only rows with a large offset are concerned.
    scale = np.maximum(scale, abs(low) / 1024)
    unrounded = (x - low) / scale
    return scale, unrounded, np.clip(np.rint(unrounded), 0, levels).astype(np.int64)


def _clip(
    x: Array, low: Array, high: Array, bits: int
) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    middle, half = (low + high) / 2, (high - low) / 2
    shrinks = np.linspace(1.0, CLIP_MIN[bits], 8) if CLIP_MIN[bits] < 1 else np.ones(1)
    errors = []
    for shrink in shrinks:
        scale, _, codes = _round(x, middle - shrink * half, middle + shrink * half, bits)
        errors.append(((codes * scale + middle - shrink * half - x) ** 2).sum(1))
    stacked = np.stack(errors)
    best = shrinks[stacked.argmin(0)][:, None]
    ambiguous = (stacked <= stacked.min(0) * (1 + 1e-4)).sum(0) > 1
    return middle - best * half, middle + best * half, ambiguous
