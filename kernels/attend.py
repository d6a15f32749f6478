"""Attention of a few query rows over one cache: partial softmaxes over slots, for `combine`.

The first `DENSE_SLOTS` slots share what the cache holds in the model's dtype (sinks, tail) and the
new tokens; the others share the quantized tiles. Matrices are transposed, scores `[tokens, rows]`
and outputs `[channels, rows]`, so that the few query rows are the small side of each product.

    scores[t, r] = token_scale[t] * (sum_d code[t, d] * q'[d, r] + sum_d zero[d] * q'[d, r])
    out[d, r]    = channel_scale[d] * (sum_t code[t, d] * p'[t, r] + sum_t zero[t] * p'[t, r])

with `q' = q * channel scale` and `p' = p * token scale` in fp16: no scale touches a code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import code_weights, planes, unpack

LOG2E = tl.constexpr(1.4426950408889634)
# Operands are fp16 and carry 2**-code_shift (at least 2**-4): this factor keeps them normal.
HEADROOM = tl.constexpr(16.0)
TO_CODES = tl.constexpr(2.0**20)  # what a product of such an operand and a code lacks


@triton.jit
def _softcapped(scores, softcap):
    """`softcap * tanh(scores / softcap)`."""
    return softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0))


@triton.jit
def _weights(scores, peak):
    """New peak of columns [1, N], `exp2(scores - peak)` and the factor for what came before."""
    peak_new = tl.maximum(peak, tl.max(scores, axis=0, keep_dims=True))
    base = tl.where(peak_new == -float("inf"), 0.0, peak_new)
    return peak_new, tl.exp2(scores - base), tl.exp2(peak - base)


@triton.jit
def _dense_block(
    q, visible, k_ptr, v_ptr, tokens, held, peak, total, out,
    score_scale, softcap, D: tl.constexpr, D_PAD: tl.constexpr, SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add tokens `[T]` at rows `tokens` of `k_ptr`, `v_ptr`; `visible` [T, N], `held` [T]."""
    channel = tl.arange(0, D_PAD)
    place = tokens.to(tl.int64)[:, None] * D + channel[None, :]
    # A slot that is not held may hold anything, and 0 * NaN is NaN.
    readable = held[:, None] & (channel < D)[None, :]
    keys = tl.load(k_ptr + place, mask=readable, other=0.0)
    if UPCAST:
        keys, q = keys.to(tl.float32), q.to(tl.float32)
    scores = tl.dot(keys, q, input_precision="ieee") * score_scale
    if SOFTCAP:
        scores = _softcapped(scores, softcap)
    scores = tl.where(visible, scores * LOG2E, -float("inf"))
    peak, p, shrink = _weights(scores, peak)
    values = tl.load(v_ptr + place, mask=readable, other=0.0)
    if UPCAST:
        values = values.to(tl.float32)
    out = tl.dot(tl.trans(values), p.to(values.dtype), out * shrink, input_precision="ieee")
    return peak, total * shrink + tl.sum(p, axis=0, keep_dims=True), out


@triton.jit
def _attend_dense(
    q_ptr, k_sink_ptr, v_sink_ptr, k_tail_ptr, v_tail_ptr, k_new_ptr, v_new_ptr, rank_ptr,
    head_index, batch, slot, length, row, in_rows, query, limit, lowest, rows, new_tokens,
    score_scale, softcap,
    D: tl.constexpr, G: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr, LAG: tl.constexpr,
    DENSE_SLOTS: tl.constexpr, STORED: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr,
    D_PAD: tl.constexpr, HAS_NEW: tl.constexpr, HAS_VALID: tl.constexpr, CAUSAL_NEW: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sinks, tail and new tokens, every `DENSE_SLOTS`-th block of each."""
    peak = tl.full((1, N), -float("inf"), tl.float32)
    total = tl.zeros((1, N), tl.float32)
    out = tl.zeros((D_PAD, N), tl.float32)
    tiles = tl.maximum(length - SINKS - LAG, 0) // G
    channel = tl.arange(0, D_PAD)
    q = tl.load(
        q_ptr + (head_index * rows + row)[None, :] * D + channel[:, None],
        mask=in_rows[None, :] & (channel < D)[:, None],
        other=0.0,
    )
    token = tl.arange(0, BLOCK_T)
    held_tokens = length + STORED
    sink_blocks: tl.constexpr = (SINKS + BLOCK_T - 1) // BLOCK_T
    ring_blocks: tl.constexpr = (RING + BLOCK_T - 1) // BLOCK_T
    for block in tl.range(slot, sink_blocks, DENSE_SLOTS, num_stages=1):
        index = block * BLOCK_T + token
        held = (index < SINKS) & (index < held_tokens)
        visible = held[:, None] & in_rows[None, :]
        visible &= (index[:, None] < limit[None, :]) & (index[:, None] >= lowest[None, :])
        peak, total, out = _dense_block(
            q, visible, k_sink_ptr + head_index * SINKS * D,
            v_sink_ptr + head_index * SINKS * D, index, held, peak, total, out,
            score_scale, softcap, D, D_PAD, SOFTCAP, UPCAST,
        )  # fmt: skip
    newest = held_tokens - SINKS - 1
    for block in tl.range(slot, ring_blocks, DENSE_SLOTS, num_stages=1):
        index = block * BLOCK_T + token
        # The newest position after the sinks that falls on this slot of the ring.
        age = (newest - index + RING) % RING
        position = newest - age
        held = (index < RING) & (newest >= 0) & (position >= tiles * G)
        visible = held[:, None] & in_rows[None, :]
        place = (position + SINKS)[:, None]
        visible &= (place < limit[None, :]) & (place >= lowest[None, :])
        peak, total, out = _dense_block(
            q, visible, k_tail_ptr + head_index * RING * D,
            v_tail_ptr + head_index * RING * D, index, held, peak, total, out,
            score_scale, softcap, D, D_PAD, SOFTCAP, UPCAST,
        )  # fmt: skip
    if HAS_NEW:
        rank = tl.zeros((BLOCK_T,), tl.int32)
        for block in tl.range(slot, tl.cdiv(new_tokens, BLOCK_T), DENSE_SLOTS, num_stages=1):
            index = block * BLOCK_T + token
            held = index < new_tokens
            if HAS_VALID:
                rank = tl.load(rank_ptr + batch * new_tokens + index, mask=held, other=-1).to(
                    tl.int32
                )
                held &= rank >= 0
            else:
                rank = index
            visible = held[:, None] & in_rows[None, :]
            if CAUSAL_NEW:
                visible &= index[:, None] <= query[None, :]
            if WINDOW:
                visible &= (length + rank)[:, None] >= lowest[None, :]
            peak, total, out = _dense_block(
                q, visible, k_new_ptr + head_index * new_tokens * D,
                v_new_ptr + head_index * new_tokens * D, index, held, peak, total, out,
                score_scale, softcap, D, D_PAD, SOFTCAP, UPCAST,
            )  # fmt: skip
    return peak, total, out


@triton.jit
def _attend_tiles(
    rotated_ptr, unit_ptr, k_codes_ptr, k_affine_ptr, k_token_ptr, v_codes_ptr, v_affine_ptr,
    v_channel_ptr, row_index, in_rows, limit, lowest, first_tile, start, stop, score_scale, softcap,
    D: tl.constexpr, G: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    SINKS: tl.constexpr, N: tl.constexpr, W_K: tl.constexpr, W_V: tl.constexpr,
    D_PAD: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, STAGES: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Quantized tiles `start` to `stop` of the row of tiles at `first_tile`."""
    peak = tl.full((1, N), -float("inf"), tl.float32)
    weights = tl.zeros((G, N), tl.float32)  # summed over the tokens of a tile at the end
    out = tl.zeros((D_PAD, N), tl.float32)

    # K: words [G, W_K] hold channels plane * (D / planes) + word.
    key_planes: tl.constexpr = planes(KEY_BITS)
    key_words: tl.constexpr = D // key_planes
    key_row: tl.constexpr = D * KEY_BITS // 8
    k_place = tl.arange(0, key_planes * W_K)
    channel = k_place // W_K * key_words + k_place % W_K
    has_channel = k_place % W_K < key_words
    k_weight = code_weights(k_place, W_K, KEY_BITS) * HEADROOM
    k_zero = 1.0 / (k_weight * TO_CODES)
    k_center = k_zero * ((2**KEY_BITS - 1) / 2)
    # V: words [D_PAD, W_V] hold tokens plane * W_V + word.
    value_row: tl.constexpr = G * VALUE_BITS // 8
    v_weight = code_weights(tl.arange(0, G), W_V, VALUE_BITS) * HEADROOM
    v_zero = 1.0 / (v_weight * TO_CODES)
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
    for tile in tl.range(start, stop, num_stages=STAGES):
        index = first_tile + tile
        k_base = k_codes_ptr + index * (G * key_row)
        words = tl.load(
            k_base.to(tl.pointer_type(tl.int16))
            + token[:, None] * (key_row // 2) + word_k[None, :],
            mask=k_mask, other=0,
        )  # fmt: skip
        high = words
        if KEY_BITS == 3:
            high = tl.load(
                k_base + token[:, None] * key_row + (D // 4) + word_k[None, :],
                mask=k_mask, other=0,
            ).to(tl.int16)  # fmt: skip
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
            scores = _softcapped(scores * unit[None, :], softcap) * LOG2E
        if MASKED:
            position = (SINKS + tile * G + token)[:, None]
            seen = (position < limit[None, :]) & (position >= lowest[None, :])
            scores = tl.where(seen, scores, -float("inf"))
        # Without a softcap the unit joins the exponent's subtraction.
        highest = tl.max(scores, axis=0, keep_dims=True)
        if not SOFTCAP:
            highest = highest * unit[None, :]
        peak_new = tl.maximum(peak, highest)
        base = tl.where(peak_new == -float("inf"), 0.0, peak_new) if MASKED else peak_new
        if SOFTCAP:
            p = tl.exp2(scores - base)
        else:
            p = tl.exp2(scores * unit[None, :] - base)
        shrink = tl.exp2(peak - base)
        peak = peak_new
        weights = weights * shrink + p

        v_base = v_codes_ptr + index * (D * value_row)
        words = tl.load(
            v_base.to(tl.pointer_type(tl.int16))
            + out_channel[:, None] * (value_row // 2) + word_v[None, :],
            mask=v_mask, other=0,
        )  # fmt: skip
        high = words
        if VALUE_BITS == 3:
            high = tl.load(
                v_base + out_channel[:, None] * value_row + (G // 4) + word_v[None, :],
                mask=v_mask, other=0,
            ).to(tl.int16)  # fmt: skip
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
    return peak, tl.sum(weights, axis=0, keep_dims=True), out * TO_CODES


@triton.jit
def attend_kernel(
    q_ptr, rotated_ptr, unit_ptr,
    k_codes_ptr, k_affine_ptr, k_token_ptr, v_codes_ptr, v_affine_ptr, v_channel_ptr,
    k_sink_ptr, v_sink_ptr, k_tail_ptr, v_tail_ptr, k_new_ptr, v_new_ptr, rank_ptr,
    lengths_ptr, first_ptr, out_ptr, peak_ptr, total_ptr,
    score_scale, softcap, rows, queries, query_start, query_total, new_tokens, capacity, head_tiles,
    slots, first_slot, copies,
    HEADS: tl.constexpr, D: tl.constexpr, G: tl.constexpr, KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr, LAG: tl.constexpr,
    SPLITS: tl.constexpr, DENSE_SLOTS: tl.constexpr, STORED: tl.constexpr, N: tl.constexpr,
    BLOCK_T: tl.constexpr, W_K: tl.constexpr, W_V: tl.constexpr, D_PAD: tl.constexpr,
    HAS_NEW: tl.constexpr, HAS_VALID: tl.constexpr, CAUSAL_NEW: tl.constexpr,
    LIMITED: tl.constexpr, WINDOW: tl.constexpr, SHARED: tl.constexpr, SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One slot of one KV head and `N` query rows.

    Parameters
    ----------
    q_ptr, rotated_ptr, unit_ptr
        `[B, H, rows, D]` queries in the model's dtype; the same rotated, fp16, divided by `unit`
        `[B, H, rows]` fp32. Row `r` belongs to query `query_start + r % queries` of `query_total`.
    lengths_ptr
        `[B]` int64 tokens in the cache before this step; the token that `STORED` counts is in the
        sinks or the tail already. With `LIMITED`, query s sees those before `length - (S - 1 - s)`.
    first_ptr
        `[B, query_total]` int64: the first position that a query sees (`WINDOW`).
    out_ptr, peak_ptr, total_ptr
        `[B, H, slots, rows, D]`, `[B, H, slots, rows]` twice, fp32; this launch fills the slots
        from `first_slot` on. Rows that see nothing have peak -inf; their `out` is not written.
    capacity, head_tiles, copies
        Allocated tiles, and tiles from one KV head to the next. With `SHARED`, row b of the batch
        reads all `capacity` tiles of row `b // copies`.
    """
    slot = tl.program_id(0)
    head_index = tl.program_id(1).to(tl.int64)
    batch = head_index // HEADS
    row = tl.program_id(2) * N + tl.arange(0, N)
    in_rows = row < rows
    query = query_start + row % queries
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    row_index = head_index * rows + row
    # Positions [lowest, limit) are what each query row sees of the cache.
    limit = tl.full((N,), 2147483647, tl.int32)
    if LIMITED:
        limit = length - (query_total - 1 - query)
    lowest = tl.zeros((N,), tl.int32)
    if WINDOW:
        lowest = tl.load(first_ptr + batch * query_total + query, mask=in_rows, other=0).to(
            tl.int32
        )

    if slot < DENSE_SLOTS:
        peak, total, out = _attend_dense(
            q_ptr, k_sink_ptr, v_sink_ptr, k_tail_ptr, v_tail_ptr, k_new_ptr, v_new_ptr, rank_ptr,
            head_index, batch, slot, length, row, in_rows, query, limit, lowest, rows, new_tokens,
            score_scale, softcap, D, G, SINKS, RING, LAG, DENSE_SLOTS, STORED, N, BLOCK_T, D_PAD,
            HAS_NEW, HAS_VALID, CAUSAL_NEW, WINDOW, SOFTCAP, UPCAST,
        )  # fmt: skip
    else:
        tiles = tl.minimum(tl.maximum(length - SINKS - LAG, 0) // G, capacity)
        source = head_index
        if SHARED:
            tiles = capacity
            source = batch // copies * HEADS + head_index % HEADS
        per_split = tl.cdiv(tiles, SPLITS)
        start = (slot - DENSE_SLOTS) * per_split
        stop = tl.minimum(start + per_split, tiles)
        peak, total, out = _attend_tiles(
            rotated_ptr, unit_ptr, k_codes_ptr, k_affine_ptr, k_token_ptr, v_codes_ptr,
            v_affine_ptr, v_channel_ptr, row_index, in_rows, limit, lowest, source * head_tiles,
            start, stop, score_scale, softcap, D, G, KEY_BITS, VALUE_BITS, SINKS, N, W_K, W_V,
            D_PAD, LIMITED or WINDOW, SOFTCAP, STAGES, PTX,
        )  # fmt: skip

    slot_index = head_index * slots + first_slot + slot
    place = slot_index * rows + row
    tl.store(peak_ptr + place[None, :], peak, mask=in_rows[None, :])
    tl.store(total_ptr + place[None, :], total, mask=in_rows[None, :])
    channel = tl.arange(0, D_PAD)
    seen = in_rows[None, :] & (peak != -float("inf"))
    tl.store(
        out_ptr + place[None, :] * D + channel[:, None], out, mask=seen & (channel < D)[:, None]
    )
