"""Round a balanced tile to codes, choose the scales that are stored, pack.

The same arithmetic as `kvarn_ops.reference.encode`. Keys have a scale and an offset per channel,
values per token; the other side has one scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import planes
from .tile import (
    as_fp16,
    balanced,
    balanced_chunk,
    channels,
    exponent_of,
    load_chunk,
    pick,
    power_of_two,
    put,
    rounded,
)

FP16_MAX = tl.constexpr(65504.0)
SCALE_MIN = tl.constexpr(1e-10)
ZERO_LIMIT = tl.constexpr(1024.0)
CANDIDATES = tl.constexpr(8)
NORM_RATIO_MAX = tl.constexpr(8.0)
# Exponents of the token scale that fp16 holds with room for the spread within a tile.
TOKEN_EXPONENT_MAX = tl.constexpr(10)


@triton.constexpr_function
def clip_min(bits):
    """Narrowest fraction of the min-max range that is tried; 1: none is."""
    return {2: 0.39, 3: 0.56, 4: 0.74}.get(bits, 1.0)


@triton.jit
def _round_to_nearest(x, low, high, BITS: tl.constexpr):
    """`x ~ (codes + zero) * scale`; `low` and `high` broadcast."""
    scale = tl.maximum((high - low) / (2**BITS - 1), SCALE_MIN)
    scale = tl.maximum(scale, tl.abs(low) / ZERO_LIMIT)
    codes = tl.minimum(tl.maximum(rounded((x - low) * (1.0 / scale)), 0.0), 2**BITS - 1.0)
    return scale, low / scale, codes


@triton.jit
def _error(x, low, high, BITS: tl.constexpr):
    scale, zero, codes = _round_to_nearest(x, low, high, BITS)
    error = (codes + zero) * scale - x
    return error * error


@triton.jit
def _shrink(candidate, BITS: tl.constexpr):
    return 1.0 - (1.0 - clip_min(BITS)) * candidate / (CANDIDATES - 1)


@triton.jit
def _stored_zero(zero, BITS: tl.constexpr):
    """Zero point as a reader of the cache sees it, through an fp16 offset."""
    center: tl.constexpr = (2**BITS - 1) / 2
    return as_fp16(zero + center) - center


@triton.jit
def _fp16_or_exact(x):
    return tl.where(tl.abs(x) > FP16_MAX, x, as_fp16(x))


@triton.jit
def _published_rounding(scale, zero_point):
    """Round as the published code stores; scale and zero point in code units."""
    scale = _fp16_or_exact(scale)
    zero_point = _fp16_or_exact(zero_point)
    zero = tl.where(scale > 0, zero_point / scale, 0.0)
    return scale, tl.minimum(tl.maximum(zero, -FP16_MAX), FP16_MAX)


@triton.jit
def _pack(codes, AXIS: tl.constexpr, BITS: tl.constexpr):
    """Words of the planes of an axis, and the bytes of third bits (3 bits only), int32."""
    count: tl.constexpr = planes(BITS)
    low_bits: tl.constexpr = 2 if BITS == 3 else BITS
    A: tl.constexpr = codes.shape[0]
    B: tl.constexpr = codes.shape[1]
    codes = codes.to(tl.int32)
    plane = tl.arange(0, count)
    if AXIS == 1:
        split = tl.reshape(codes, (A, count, B // count))
        plane = plane[None, :, None]
    else:
        split = tl.reshape(codes, (count, A // count, B))
        plane = plane[:, None, None]
    words = tl.sum((split & (2**low_bits - 1)) << (plane * low_bits), axis=AXIS)
    high = tl.sum((split >> 2) << plane, axis=AXIS)
    return words, high


@triton.jit
def _store_packed(
    row_ptr, word, codes, inside, COUNT: tl.constexpr, AXIS: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Pack `codes` along `AXIS` into words `word` of rows of `COUNT` codes at `row_ptr`."""
    words, high = _pack(codes, AXIS, BITS)
    words_ptr = row_ptr.to(tl.pointer_type(tl.int16))
    tl.store(words_ptr + word, words.to(tl.int16), mask=inside)
    if BITS == 3:
        tl.store(row_ptr + COUNT // 4 + word, high.to(tl.uint8), mask=inside)


@triton.jit
def quantize_keys(
    scratch_ptr, unit, channel_scale, token_scale, codes_ptr,
    D: tl.constexpr, BITS: tl.constexpr, PLUS: tl.constexpr,
):  # fmt: skip
    """Write the codes `[G, D * BITS / 8]`; scale and zero of channels, scale of tokens."""
    G: tl.constexpr = token_scale.shape[0]
    CHUNKS: tl.constexpr = channel_scale.shape[0]
    WIDTH: tl.constexpr = channel_scale.shape[1]
    count: tl.constexpr = planes(BITS)
    W: tl.constexpr = WIDTH // count
    ROW: tl.constexpr = D * BITS // 8
    token = tl.arange(0, G)
    by_channel, by_token = 1.0 / channel_scale, unit / token_scale
    row_scale, row_zero = channel_scale, channel_scale
    wanted = tl.zeros((G,), tl.float32)
    actual = tl.zeros((G,), tl.float32)
    for c in range(0, CHUNKS):
        chunk = load_chunk(scratch_ptr, c, G, WIDTH)
        if PLUS:  # now, or the chunk would take registers until the end
            wanted += tl.sum((chunk * unit) * (chunk * unit), axis=1)
        x = balanced(chunk, c, by_channel, by_token)
        low, high = tl.min(x, axis=0), tl.max(x, axis=0)
        if PLUS and clip_min(BITS) < 1.0:
            middle, half = (low + high) / 2, (high - low) / 2
            best_error = tl.full((WIDTH,), float("inf"), tl.float32)
            best = tl.full((WIDTH,), 1.0, tl.float32)
            for candidate in range(CANDIDATES):
                shrink = _shrink(candidate, BITS)
                span = shrink * half
                square = _error(x, (middle - span)[None, :], (middle + span)[None, :], BITS)
                error = tl.sum(square, axis=0)
                best = tl.where(error < best_error, shrink, best)
                best_error = tl.minimum(error, best_error)
            low, high = middle - best * half, middle + best * half
        scale, zero, codes = _round_to_nearest(x, low[None, :], high[None, :], BITS)
        scale, zero = tl.reshape(scale, (WIDTH,)), tl.reshape(zero, (WIDTH,))
        scale = pick(channel_scale, c) * scale
        if PLUS:
            restored = (codes + _stored_zero(zero, BITS)[None, :]) * scale[None, :]
            restored = restored * token_scale[:, None]
            inside = (channels(c, D, WIDTH, count) < D)[None, :]
            actual += tl.sum(tl.where(inside, restored * restored, 0.0), axis=1)
        else:
            scale, zero = _published_rounding(scale, scale * zero)
        row_scale, row_zero = put(row_scale, c, scale), put(row_zero, c, zero)
        word = tl.arange(0, W)[None, :] + c * W
        row_ptr = codes_ptr + token[:, None] * ROW
        _store_packed(row_ptr, word, codes, word < D // count, D, 1, BITS)
    if PLUS:
        token_scale = token_scale * _norm_ratio(wanted, actual)
    else:
        token_scale = _fp16_or_exact(token_scale)
    return row_scale, row_zero, token_scale


@triton.jit
def quantize_values(
    scratch_ptr, unit, channel_scale, token_scale, codes_ptr,
    D: tl.constexpr, BITS: tl.constexpr, PLUS: tl.constexpr,
):  # fmt: skip
    """Write the codes `[D, G * BITS / 8]`; scale and zero of tokens, scale of channels."""
    G: tl.constexpr = token_scale.shape[0]
    CHUNKS: tl.constexpr = channel_scale.shape[0]
    WIDTH: tl.constexpr = channel_scale.shape[1]
    count: tl.constexpr = planes(BITS)
    W: tl.constexpr = G // count
    ROW: tl.constexpr = G * BITS // 8
    by_channel, by_token = 1.0 / channel_scale, unit / token_scale
    low = tl.full((G,), float("inf"), tl.float32)
    high = tl.full((G,), -float("inf"), tl.float32)
    wanted = tl.zeros((G,), tl.float32)
    for c in range(0, CHUNKS):
        chunk = load_chunk(scratch_ptr, c, G, WIDTH)
        if PLUS:
            wanted += tl.sum((chunk * unit) * (chunk * unit), axis=1)
        x = balanced(chunk, c, by_channel, by_token)
        inside = (channels(c, D, WIDTH, 1) < D)[None, :]
        low = tl.minimum(low, tl.min(tl.where(inside, x, float("inf")), axis=1))
        high = tl.maximum(high, tl.max(tl.where(inside, x, -float("inf")), axis=1))
    if PLUS and clip_min(BITS) < 1.0:
        middle, half = (low + high) / 2, (high - low) / 2
        best_error = tl.full((G,), float("inf"), tl.float32)
        best = tl.full((G,), 1.0, tl.float32)
        for candidate in range(CANDIDATES):
            shrink = _shrink(candidate, BITS)
            span = shrink * half
            error = tl.zeros((G,), tl.float32)
            for c in range(0, CHUNKS):
                x = balanced_chunk(scratch_ptr, c, by_channel, by_token)
                inside = (channels(c, D, WIDTH, 1) < D)[None, :]
                square = _error(x, (middle - span)[:, None], (middle + span)[:, None], BITS)
                error += tl.sum(tl.where(inside, square, 0.0), axis=1)
            best = tl.where(error < best_error, shrink, best)
            best_error = tl.minimum(error, best_error)
        low, high = middle - best * half, middle + best * half
    scale = tl.zeros((G, 1), tl.float32)
    zero = tl.zeros((G, 1), tl.float32)
    actual = tl.zeros((G,), tl.float32)
    word = tl.arange(0, W)[:, None]
    for c in range(0, CHUNKS):
        x = balanced_chunk(scratch_ptr, c, by_channel, by_token)
        scale, zero, codes = _round_to_nearest(x, low[:, None], high[:, None], BITS)
        channel = channels(c, D, WIDTH, 1)
        inside = (channel < D)[None, :]
        if PLUS:
            restored = (codes + _stored_zero(zero, BITS)) * (scale * token_scale[:, None])
            restored = restored * pick(channel_scale, c)[None, :]
            actual += tl.sum(tl.where(inside, restored * restored, 0.0), axis=1)
        _store_packed(codes_ptr + channel[None, :] * ROW, word, codes, inside, G, 0, BITS)
    row_scale = tl.reshape(scale, (G,)) * token_scale
    row_zero = tl.reshape(zero, (G,))
    if PLUS:
        row_scale = row_scale * _norm_ratio(wanted, actual)
    else:
        row_scale, row_zero = _published_rounding(row_scale, row_scale * row_zero)
        channel_scale = _fp16_or_exact(channel_scale)
    return row_scale, row_zero, channel_scale


@triton.jit
def _norm_ratio(wanted, actual):
    """Factor per token that gives its dequantized vector the norm of the original one."""
    ratio = tl.minimum(tl.sqrt(wanted) / tl.sqrt(actual), NORM_RATIO_MAX)
    return tl.where(actual > 0, ratio, 1.0)


@triton.jit
def gauged(channel, token, exponent, inside):
    """Both scales in fp16: the larger channel scale goes to [1, 2), amplitude to the tokens.

    If that leaves fp16's range the exponent is shared. `exponent` is that of the tile's gauge.
    """
    channel_peak = exponent_of(tl.max(tl.where(inside, channel, 0.0))) - 1
    channel = channel * power_of_two(-channel_peak)
    token_peak = exponent_of(tl.max(token)) - 1 + channel_peak + exponent
    outside = (token_peak < 0) | (token_peak > TOKEN_EXPONENT_MAX)
    moved = tl.where(outside, token_peak - (token_peak >> 1), 0)
    # In two steps: the sum of exponents may leave the range of one fp32 power of two.
    token = token * power_of_two(channel_peak) * power_of_two(exponent - moved)
    return (channel * power_of_two(moved)).to(tl.float16), token.to(tl.float16)
