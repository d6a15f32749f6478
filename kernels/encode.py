"""Quantize the tiles that new tokens finish: equalize, rotate, normalize, round, pack.

The launch always has programs for the most tiles that `new_tokens` can finish, and programs
without a tile return at once, so that a captured graph holds for every step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import planes
from .normalize import normalize
from .quantize import gauged, quantize_keys, quantize_values
from .tile import (
    channel_table,
    channels,
    chunk_place,
    exponent_of,
    gauge,
    power_of_two,
    put,
    sanitized,
)

EQUALIZE_POWER = tl.constexpr(0.5)
EQUALIZE_MIN, EQUALIZE_MAX = tl.constexpr(-2.0), tl.constexpr(4.0)
EQUALIZE_DEPTH = tl.constexpr(10.0)


@triton.jit
def _source_rows(
    body, body_old, skip, order_ptr, batch, new_tokens,
    RING: tl.constexpr, HAS_VALID: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Whether tokens at positions `body` after the sinks lie in the ring, and in which row of it
    or of the new tokens.
    """
    in_ring = (body < body_old) | STORED
    new_row = tl.where(in_ring, 0, body - body_old + skip)
    if HAS_VALID:
        new_row = tl.load(order_ptr + batch * new_tokens + new_row)
    return in_ring, tl.where(in_ring, body % RING, new_row)


@triton.jit
def _tokens(
    ring_ptr, new_ptr, in_ring, source, channel, D: tl.constexpr, STORED: tl.constexpr
):  # fmt: skip
    """`[G, C]` values of the tokens at `channel` [C]; 0 beyond `D`."""
    inside = (channel < D)[None, :]
    place = source[:, None] * D + channel[None, :]
    if STORED:
        return tl.load(ring_ptr + place, mask=inside, other=0.0)
    held = tl.where(in_ring[:, None], ring_ptr + place, new_ptr + place)
    return tl.load(held, mask=inside, other=0.0)


@triton.jit
def _equalizer(
    ring_ptr, new_ptr, in_ring, source, table,
    D: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Log2 of the factors `[CHUNKS, WIDTH]` of a row whose first tile this is: fp16, as int16."""
    G: tl.constexpr = in_ring.shape[0]
    peak = 0.0
    for c in range(0, CHUNKS):
        x = tl.abs(sanitized(_tokens(
            ring_ptr, new_ptr, in_ring, source, channels(c, D, WIDTH, 1), D, STORED
        )))  # fmt: skip
        peak = tl.maximum(peak, tl.max(tl.where(x >= 65504.0, 0.0, x)))
    peak_exponent = tl.maximum(exponent_of(peak), -64)
    loudness = tl.zeros((CHUNKS, WIDTH), tl.float32)
    square_sum = 0.0
    for c in range(0, CHUNKS):
        x = sanitized(_tokens(
            ring_ptr, new_ptr, in_ring, source, channels(c, D, WIDTH, 1), D, STORED
        ))  # fmt: skip
        x = tl.where(tl.abs(x) >= 65504.0, 0.0, x) * power_of_two(-peak_exponent)
        squares = tl.sum(x * x, axis=0)
        loudness = put(loudness, c, squares / G)
        square_sum += tl.sum(squares)
    change = (gauge(peak, square_sum, peak_exponent, G * D) - peak_exponent).to(tl.float32)
    loudness = tl.log2(loudness) / 2 - change
    inside = table < D
    loudest = tl.max(tl.where(inside, loudness, -float("inf")))
    loudness = tl.maximum(loudness, loudest - EQUALIZE_DEPTH)
    mean = tl.sum(tl.where(inside, loudness, 0.0)) / D
    factor = EQUALIZE_POWER * (loudness - mean)
    factor = tl.minimum(tl.maximum(factor, EQUALIZE_MIN), EQUALIZE_MAX)
    factor = tl.where(loudest == -float("inf"), 0.0, factor).to(tl.float16)
    # -0.0 means "made, factor 1"; 0.0 in a cache means "not made". By its bits: a literal -0.0 is
    # compiled to 0.0.
    return tl.where(factor == 0.0, -32768, factor.to(tl.int16, bitcast=True)).to(tl.int16)


@triton.jit
def _encode(
    ring_ptr, new_ptr, order_ptr, rotation_ptr, equalizer_ptr, codes_ptr, affine_ptr, other_ptr,
    scratch_ptr, tile_index, head_index, batch, body_old, skip, new_tokens, capacity,
    D: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
    RING: tl.constexpr, IS_KEY: tl.constexpr, PLUS: tl.constexpr, ITERS: tl.constexpr,
    ROTATE: tl.constexpr, MAKE_EQUALIZER: tl.constexpr, EQUALIZER_ONLY: tl.constexpr,
    HAS_VALID: tl.constexpr, STORED: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = planes(BITS) if IS_KEY else 1
    body = tile_index * G + tl.arange(0, G)
    in_ring, source = _source_rows(
        body, body_old, skip, order_ptr, batch, new_tokens, RING, HAS_VALID, STORED
    )
    ring_ptr += head_index * RING * D
    new_ptr += head_index * new_tokens * D
    powers_ptr = equalizer_ptr + head_index * D
    if MAKE_EQUALIZER:
        if tile_index == 0:
            table = channel_table(D, CHUNKS, WIDTH, 1)
            bits_ptr = powers_ptr.to(tl.pointer_type(tl.int16)) + table
            held = tl.load(bits_ptr, mask=table < D, other=0)
            if tl.max(tl.abs(held.to(tl.int32))) == 0:
                power = _equalizer(
                    ring_ptr, new_ptr, in_ring, source, table, D, CHUNKS, WIDTH, STORED
                )
                tl.store(bits_ptr, power, mask=table < D)
            tl.debug_barrier()
    if not EQUALIZER_ONLY:
        peak = 0.0
        for c in range(0, CHUNKS):
            channel = channels(c, D, WIDTH, PLANES)
            if ROTATE:
                tile = tl.zeros((G, WIDTH), tl.float32)
                for first in range(0, D, BLOCK_K):
                    k = first + tl.arange(0, BLOCK_K)
                    power = tl.load(powers_ptr + k, mask=k < D, other=0.0).to(tl.float32)
                    x = sanitized(_tokens(ring_ptr, new_ptr, in_ring, source, k, D, STORED))
                    matrix = tl.load(
                        rotation_ptr + k[:, None] * D + channel[None, :],
                        mask=(k < D)[:, None] & (channel < D)[None, :], other=0.0,
                    )  # fmt: skip
                    x = x * tl.exp2(-power)[None, :]
                    tile = tl.dot(x, matrix, tile, input_precision=PRECISION)
            else:
                power = tl.load(powers_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
                tile = sanitized(_tokens(ring_ptr, new_ptr, in_ring, source, channel, D, STORED))
                tile = tile * tl.exp2(-power)[None, :]
            peak = tl.maximum(peak, tl.max(tl.abs(tile)))
            tl.store(scratch_ptr + chunk_place(c, G, WIDTH), tile)
        tl.debug_barrier()
        exponent = tile_index * 0
        unit = 1.0
        if PLUS:
            peak_exponent = tl.maximum(exponent_of(peak), -64)
            square_sum = 0.0
            for c in range(0, CHUNKS):
                part = tl.load(scratch_ptr + chunk_place(c, G, WIDTH))
                part = part * power_of_two(-peak_exponent)
                square_sum += tl.sum(part * part)
            exponent = gauge(peak, square_sum, peak_exponent, G * D)
            unit = power_of_two(-exponent)

        channel_scale, token_scale = normalize(
            scratch_ptr, unit, D, G, CHUNKS, WIDTH, PLANES, ITERS, IS_KEY, PLUS
        )
        place = head_index * capacity + tile_index
        table = channel_table(D, CHUNKS, WIDTH, PLANES)
        inside = table < D
        token = tl.arange(0, G)
        center: tl.constexpr = (2**BITS - 1) / 2
        if IS_KEY:
            scale, zero, token_scale = quantize_keys(
                scratch_ptr, unit, channel_scale, token_scale,
                codes_ptr + place * (G * D * BITS // 8), D, BITS, PLUS,
            )  # fmt: skip
            scale, token_scale = gauged(scale, token_scale, exponent, inside)
            affine = affine_ptr + place * (2 * D) + table
            tl.store(affine, scale, mask=inside)
            tl.store(affine + D, (zero + center).to(tl.float16), mask=inside)
            tl.store(other_ptr + place * G + token, token_scale)
        else:
            scale, zero, channel_scale = quantize_values(
                scratch_ptr, unit, channel_scale, token_scale,
                codes_ptr + place * (G * D * BITS // 8), D, BITS, PLUS,
            )  # fmt: skip
            channel_scale, scale = gauged(channel_scale, scale, exponent, inside)
            affine = affine_ptr + place * (2 * G) + token
            tl.store(affine, scale)
            tl.store(affine + G, (zero + center).to(tl.float16))
            tl.store(other_ptr + place * D + table, channel_scale, mask=inside)


@triton.jit(do_not_specialize=["new_tokens", "capacity", "first_launch_tile"])
def encode_kernel(
    k_new_ptr, v_new_ptr, order_ptr, counts_ptr, rotation_ptr,
    k_codes_ptr, k_affine_ptr, k_token_ptr, v_codes_ptr, v_affine_ptr, v_channel_ptr,
    k_tail_ptr, v_tail_ptr, k_equalizer_ptr, v_equalizer_ptr, lengths_ptr, scratch_ptr,
    new_tokens, capacity, first_launch_tile,
    HEADS: tl.constexpr, D: tl.constexpr, G: tl.constexpr, KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr, LAG: tl.constexpr,
    PLUS: tl.constexpr, ITERS: tl.constexpr, ROTATE_KEYS: tl.constexpr,
    ROTATE_VALUES: tl.constexpr, MAKE_EQUALIZER: tl.constexpr, EQUALIZER_ONLY: tl.constexpr,
    HAS_VALID: tl.constexpr, STORED: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one KV head, keys (`program_id(2) == 0`) or values.

    Parameters
    ----------
    k_new_ptr, v_new_ptr
        `[B, H, new_tokens, D]`, not stored yet; with `STORED` they are in the tail and counted.
    order_ptr, counts_ptr
        With `HAS_VALID`: `[B, new_tokens]` int32 indices of a row's valid tokens, in order, and
        `[B]` int64 how many there are.
    scratch_ptr
        `CHUNKS * G * WIDTH` fp32 per program.
    MAKE_EQUALIZER, EQUALIZER_ONLY
        Make the equalizer of a row whose first tile is finished. With several tiles it has to be
        a launch of its own, since all of them read it.
    """
    head_index = tl.program_id(0).to(tl.int64)
    batch = head_index // HEADS
    count = new_tokens
    if HAS_VALID:
        count = tl.load(counts_ptr + batch).to(tl.int32)
    after = tl.load(lengths_ptr + batch).to(tl.int32)
    before = after - count
    if not STORED:
        before = after
        after = before + count
    tile_index = tl.maximum(before - SINKS - LAG, 0) // G + first_launch_tile + tl.program_id(1)
    # Beyond the capacity nothing is written; `prepare` makes such a row's outputs NaN.
    stop = tl.minimum(tl.maximum(after - SINKS - LAG, 0) // G, capacity)
    if tile_index < stop:
        body_old = tl.maximum(before - SINKS, 0)
        skip = tl.maximum(SINKS - before, 0)
        program = (tl.program_id(2) * tl.num_programs(0) + head_index) * tl.num_programs(1)
        # A size known to the compiler: it then reads and writes 16 bytes at a time.
        scratch = scratch_ptr + (program + tl.program_id(1)) * (CHUNKS * G * WIDTH)
        if tl.program_id(2) == 0:
            _encode(
                k_tail_ptr, k_new_ptr, order_ptr, rotation_ptr, k_equalizer_ptr,
                k_codes_ptr, k_affine_ptr, k_token_ptr, scratch, tile_index, head_index, batch,
                body_old, skip, new_tokens, capacity, D, G, KEY_BITS, RING, True, PLUS,
                ITERS, ROTATE_KEYS, MAKE_EQUALIZER, EQUALIZER_ONLY, HAS_VALID, STORED, CHUNKS,
                WIDTH, BLOCK_K, PRECISION,
            )  # fmt: skip
        else:
            _encode(
                v_tail_ptr, v_new_ptr, order_ptr, rotation_ptr, v_equalizer_ptr,
                v_codes_ptr, v_affine_ptr, v_channel_ptr, scratch, tile_index, head_index, batch,
                body_old, skip, new_tokens, capacity, D, G, VALUE_BITS, RING, False, PLUS,
                ITERS, ROTATE_VALUES, MAKE_EQUALIZER, EQUALIZER_ONLY, HAS_VALID, STORED, CHUNKS,
                WIDTH, BLOCK_K, PRECISION,
            )  # fmt: skip
