"""Attention to quantized tiles.

    scores[t, r] = token_scale[t] * (sum_d code[t, d] * q'[d, r] + sum_d zero[d] * q'[d, r])
    out[d, r]    = channel_scale[d] * (sum_t code[t, d] * p'[t, r] + sum_t zero[t] * p'[t, r])

with `q' = q * channel scale` and `p' = p * token scale` in fp16: no scale touches a code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import code_weights, load_codes, planes, unpack
from .mask import load_mask, masked
from .softmax import LOG2E, raised, softcapped

# A code counts 2**(shift - 24), and the other operand carries 2**-shift.
TO_CODES = tl.constexpr(2.0**24)
# Weights are small and share fp16 with token scales below 2**11; queries are of norm 1 and share it
# with channel scales up to 2**13, and need no factor.
HEADROOM = tl.constexpr(16.0)


@triton.jit
def attend_tiles(
    rotated_ptr, unit_ptr, k_codes_ptr, k_affine_ptr, k_token_ptr, v_codes_ptr, v_affine_ptr,
    v_channel_ptr, row_index, in_rows, limit, lowest, first_tile, start, stop, score_scale, softcap,
    mask_ptr, mask_row, mask_columns, mask_step,
    D: tl.constexpr, G: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    SINKS: tl.constexpr, N: tl.constexpr, W_K: tl.constexpr, W_V: tl.constexpr,
    D_PAD: tl.constexpr, BOUNDED: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr, FOLDS: tl.constexpr,
):  # fmt: skip
    """Quantized tiles `start` to `stop` of the row of tiles at `first_tile`."""
    peak = tl.full((1, N), -float("inf"), tl.float32)
    weights = tl.zeros((G // FOLDS, N), tl.float32)  # summed over its tokens at the end
    out = tl.zeros((D_PAD, N), tl.float32)

    key_bytes: tl.constexpr = G * D * KEY_BITS // 8
    value_bytes: tl.constexpr = G * D * VALUE_BITS // 8
    # K: words [G, W_K] hold channels plane * (D / planes) + word.
    key_planes: tl.constexpr = planes(KEY_BITS)
    key_words: tl.constexpr = D // key_planes
    k_place = tl.arange(0, key_planes * W_K)
    channel = k_place // W_K * key_words + k_place % W_K
    has_channel = k_place % W_K < key_words
    k_weight = code_weights(k_place, W_K, KEY_BITS)
    k_zero = 1.0 / (k_weight * TO_CODES)
    k_center = k_zero * ((2**KEY_BITS - 1) / 2)
    # V: words [D_PAD, W_V] hold tokens plane * W_V + word.
    v_weight = code_weights(tl.arange(0, G), W_V, VALUE_BITS) * HEADROOM
    v_zero = 1.0 / (v_weight * (TO_CODES / HEADROOM))
    v_center = v_zero * ((2**VALUE_BITS - 1) / 2)

    token = tl.arange(0, G)
    word_k = tl.arange(0, W_K)
    word_v = tl.arange(0, W_V)
    out_channel = tl.arange(0, D_PAD)
    k_mask = (word_k < key_words)[None, :]
    v_mask = (out_channel < D)[:, None]

    q = tl.load(
        rotated_ptr + row_index[None, :] * D + channel[:, None],
        mask=in_rows[None, :] & has_channel[:, None],
        other=0.0,
    )
    q = (q * k_weight[:, None]).to(tl.float16)
    unit = tl.load(unit_ptr + row_index, mask=in_rows, other=0.0) * (score_scale * TO_CODES)
    if not SOFTCAP:
        unit = unit * LOG2E
    whole: tl.constexpr = SOFTCAP or MASK == 2  # scores are scaled before the exponent
    for tile in tl.range(start, stop, num_stages=STAGES):
        index = first_tile + tile
        k_base = k_codes_ptr + index * key_bytes
        words, high = load_codes(k_base, token, word_k, k_mask, D, KEY_BITS)
        affine = k_affine_ptr + index * (2 * D) + channel
        scale = tl.load(affine, mask=has_channel, other=0.0)
        offset = tl.load(affine + D, mask=has_channel, other=0.0).to(tl.float32)
        token_scale = tl.load(k_token_ptr + index * G + token).to(tl.float32)
        q_scaled = q * scale[:, None]
        zero = offset * k_zero - k_center
        bias = tl.sum(q_scaled.to(tl.float32) * zero[:, None], axis=0, keep_dims=True)
        bias = tl.broadcast_to(bias, (G, N))
        scores = tl.dot(unpack(words, high, KEY_BITS, PTX), q_scaled, bias)
        scores = scores * token_scale[:, None]
        if SOFTCAP:
            scores = softcapped(scores * unit[None, :], softcap) * LOG2E
        elif MASK == 2:
            scores = scores * unit[None, :]
        if BOUNDED:
            position = (SINKS + tile * G + token)[:, None]
            seen = (position < limit[None, :]) & (position >= lowest[None, :])
            scores = tl.where(seen, scores, -float("inf"))
        if MASK != 0:
            place = SINKS + tile * G + token
            mask = load_mask(mask_ptr, mask_row, place, token < G, mask_columns, mask_step, MASK)
            scores = masked(scores, mask, MASK)
        # With nothing after the product, the unit joins the exponent's subtraction.
        highest = tl.max(scores, axis=0, keep_dims=True)
        if not whole:
            highest = highest * unit[None, :]
        peak, base, shrink = raised(peak, highest, BOUNDED or MASK != 0)
        if whole:
            p = tl.exp2(scores - base)
        else:
            p = tl.exp2(scores * unit[None, :] - base)
        # First the tokens that one thread holds: 12 registers fewer at 2 warps than one by one.
        weights = weights * shrink + tl.sum(tl.reshape(p, (FOLDS, G // FOLDS, N)), axis=0)

        v_base = v_codes_ptr + index * value_bytes
        words, high = load_codes(v_base, out_channel, word_v, v_mask, G, VALUE_BITS)
        affine = v_affine_ptr + index * (2 * G) + token
        scale = tl.load(affine).to(tl.float32) * v_weight
        offset = tl.load(affine + G).to(tl.float32)
        channel_scale = tl.load(
            v_channel_ptr + index * D + out_channel, mask=out_channel < D, other=0.0
        ).to(tl.float32)
        p_scaled = (p * scale[:, None]).to(tl.float16)
        zero = offset * v_zero - v_center
        bias = tl.sum(p_scaled.to(tl.float32) * zero[:, None], axis=0, keep_dims=True)
        bias = tl.broadcast_to(bias, (D_PAD, N))
        part = tl.dot(unpack(words, high, VALUE_BITS, PTX), p_scaled, bias)
        out = out * shrink + part * channel_scale[:, None]
    return peak, tl.sum(weights, axis=0, keep_dims=True), out * (TO_CODES / HEADROOM)
