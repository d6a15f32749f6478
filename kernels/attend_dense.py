"""Attention to what a cache holds in the model's dtype, and to new tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from .mask import load_mask, masked
from .softmax import LOG2E, raised, softcapped


@triton.jit
def _dense_block(
    q, visible, mask, k_ptr, v_ptr, tokens, held, peak, total, out,
    score_scale, softcap, D: tl.constexpr, D_PAD: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add tokens `[T]` at rows `tokens` of `k_ptr`, `v_ptr`; `visible` [T, N], `held` [T].

    `mask` is what `load_mask` gave, if `MASK`.
    """
    channel = tl.arange(0, D_PAD)
    place = tokens.to(tl.int64)[:, None] * D + channel[None, :]
    # A slot that is not held may hold anything, and 0 * NaN is NaN.
    readable = held[:, None] & (channel < D)[None, :]
    keys = tl.load(k_ptr + place, mask=readable, other=0.0)
    q = q.to(keys.dtype)
    if UPCAST:
        keys, q = keys.to(tl.float32), q.to(tl.float32)
    scores = tl.dot(keys, q, input_precision="ieee") * score_scale
    if SOFTCAP:
        scores = softcapped(scores, softcap)
    scores = masked(scores * LOG2E, mask, MASK)
    scores = tl.where(visible, scores, -float("inf"))
    peak, base, shrink = raised(peak, tl.max(scores, axis=0, keep_dims=True), True)
    p = tl.exp2(scores - base)
    values = tl.load(v_ptr + place, mask=readable, other=0.0)
    if UPCAST:
        values = values.to(tl.float32)
    out = tl.dot(tl.trans(values), p.to(values.dtype), out * shrink, input_precision="ieee")
    return peak, total * shrink + tl.sum(p, axis=0, keep_dims=True), out


@triton.jit
def attend_dense(
    q_ptr, k_sink_ptr, v_sink_ptr, k_tail_ptr, v_tail_ptr, k_new_ptr, v_new_ptr, rank_ptr,
    head_index, batch, slot, length, row_index, in_rows, query, limit, lowest, new_tokens,
    dense_slots, score_scale, softcap, mask_ptr, mask_row, mask_columns, mask_step,
    D: tl.constexpr, G: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr, LAG: tl.constexpr,
    STORED: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr,
    D_PAD: tl.constexpr, HAS_NEW: tl.constexpr, HAS_VALID: tl.constexpr, CAUSAL_NEW: tl.constexpr,
    WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sinks, tail and new tokens, every `dense_slots`-th block of each. A mask has no columns for
    the new tokens.
    """
    peak = tl.full((1, N), -float("inf"), tl.float32)
    total = tl.zeros((1, N), tl.float32)
    out = tl.zeros((D_PAD, N), tl.float32)
    tiles = tl.maximum(length - SINKS - LAG, 0) // G
    channel = tl.arange(0, D_PAD)
    q = tl.load(
        q_ptr + row_index[None, :] * D + channel[:, None],
        mask=in_rows[None, :] & (channel < D)[:, None],
        other=0.0,
    )
    token = tl.arange(0, BLOCK_T)
    held_tokens = length + STORED
    sink_blocks: tl.constexpr = (SINKS + BLOCK_T - 1) // BLOCK_T
    ring_blocks: tl.constexpr = (RING + BLOCK_T - 1) // BLOCK_T
    for block in tl.range(slot, sink_blocks, dense_slots, num_stages=1):
        index = block * BLOCK_T + token
        held = (index < SINKS) & (index < held_tokens)
        visible = held[:, None] & in_rows[None, :]
        visible &= (index[:, None] < limit[None, :]) & (index[:, None] >= lowest[None, :])
        mask = 0
        if MASK != 0:
            mask = load_mask(mask_ptr, mask_row, index, held, mask_columns, mask_step, MASK)
        peak, total, out = _dense_block(
            q, visible, mask, k_sink_ptr + head_index * SINKS * D,
            v_sink_ptr + head_index * SINKS * D, index, held, peak, total, out,
            score_scale, softcap, D, D_PAD, MASK, SOFTCAP, UPCAST,
        )  # fmt: skip
    newest = held_tokens - SINKS - 1
    for block in tl.range(slot, ring_blocks, dense_slots, num_stages=1):
        index = block * BLOCK_T + token
        # The newest position after the sinks that falls on this slot of the ring.
        age = (newest - index + RING) % RING
        position = newest - age
        held = (index < RING) & (newest >= 0) & (position >= tiles * G)
        visible = held[:, None] & in_rows[None, :]
        place = (position + SINKS)[:, None]
        visible &= (place < limit[None, :]) & (place >= lowest[None, :])
        mask = 0
        if MASK != 0:
            mask = load_mask(
                mask_ptr, mask_row, position + SINKS, held, mask_columns, mask_step, MASK
            )
        peak, total, out = _dense_block(
            q, visible, mask, k_tail_ptr + head_index * RING * D,
            v_tail_ptr + head_index * RING * D, index, held, peak, total, out,
            score_scale, softcap, D, D_PAD, MASK, SOFTCAP, UPCAST,
        )  # fmt: skip
    if HAS_NEW:
        for block in tl.range(slot, tl.cdiv(new_tokens, BLOCK_T), dense_slots, num_stages=1):
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
                q, visible, 0, k_new_ptr + head_index * new_tokens * D,
                v_new_ptr + head_index * new_tokens * D, index, held, peak, total, out,
                score_scale, softcap, D, D_PAD, 0, SOFTCAP, UPCAST,
            )  # fmt: skip
    return peak, total, out
