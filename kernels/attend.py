"""Attention of a few query rows over one cache: partial softmaxes over slots, for `combine`.

The first `dense_slots` slots share what the cache holds in the model's dtype (sinks, tail) and the
new tokens; the others share the quantized tiles. Matrices are transposed, scores `[tokens, rows]`
and outputs `[channels, rows]`, so that the few query rows are the small side of each product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attend_dense import attend_dense
from .attend_tiles import attend_tiles

# They change with the size of a cache and of a prompt: a binary serves all.
_COUNTS = ["query_start", "new_tokens", "capacity", "head_tiles", "slots", "first_slot", "splits"]
_COUNTS += ["dense_slots"]
_COUNTS += ["mask_columns", "mask_batch_stride", "mask_head_stride", "mask_query_stride"]
_COUNTS += ["mask_step"]


@triton.jit(do_not_specialize=_COUNTS)
def attend_kernel(
    q_ptr, rotated_ptr, unit_ptr,
    k_codes_ptr, k_affine_ptr, k_token_ptr, v_codes_ptr, v_affine_ptr, v_channel_ptr,
    k_sink_ptr, v_sink_ptr, k_tail_ptr, v_tail_ptr, k_new_ptr, v_new_ptr, rank_ptr,
    lengths_ptr, first_ptr, out_ptr, peak_ptr, total_ptr,
    score_scale, softcap, rows, queries, query_start, query_total, new_tokens, capacity, head_tiles,
    slots, first_slot, copies, splits, dense_slots,
    mask_ptr, mask_columns, mask_batch_stride, mask_head_stride, mask_query_stride, mask_step,
    HEADS: tl.constexpr, D: tl.constexpr, G: tl.constexpr, KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr, LAG: tl.constexpr,
    STORED: tl.constexpr, N: tl.constexpr,
    BLOCK_T: tl.constexpr, W_K: tl.constexpr, W_V: tl.constexpr, D_PAD: tl.constexpr,
    HAS_NEW: tl.constexpr, HAS_VALID: tl.constexpr, CAUSAL_NEW: tl.constexpr,
    LIMITED: tl.constexpr, WINDOW: tl.constexpr, SHARED: tl.constexpr, MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_PACKED: tl.constexpr, SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr, FOLDS: tl.constexpr, UPCAST: tl.constexpr,
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
    mask_ptr
        `[B, H * rows / queries, query_total, mask_columns]`, uint8 (`MASK` 1) or float (`MASK` 2),
        with strides; `mask_step` is the last, 1 if `MASK_PACKED`. `MASK_ROWS` is 1 if all rows
        share one, else `N`.
    """
    # Inductor passes Python floats as fp64, which scores would become too.
    score_scale, softcap = tl.cast(score_scale, tl.float32), tl.cast(softcap, tl.float32)
    head_index = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1)
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
    mask_row = batch
    if MASK_PACKED:
        mask_step = 1  # for the compiler: columns are neighbours
    if MASK != 0:
        mask_row = tl.zeros((MASK_ROWS,), tl.int64) + batch * mask_batch_stride
        if MASK_ROWS != 1:
            q_head = head_index % HEADS * (rows // queries) + row // queries
            mask_row += q_head * mask_head_stride + query.to(tl.int64) * mask_query_stride
            mask_row = tl.where(in_rows, mask_row, 0)  # an offset that can be read

    if slot < dense_slots:
        peak, total, out = attend_dense(
            q_ptr, k_sink_ptr, v_sink_ptr, k_tail_ptr, v_tail_ptr, k_new_ptr, v_new_ptr, rank_ptr,
            head_index, batch, slot, length, row_index, in_rows, query, limit, lowest, new_tokens,
            dense_slots, score_scale, softcap, mask_ptr, mask_row, mask_columns, mask_step,
            D, G, SINKS, RING, LAG, STORED, N, BLOCK_T, D_PAD,
            HAS_NEW, HAS_VALID, CAUSAL_NEW, WINDOW, MASK, SOFTCAP, UPCAST,
        )  # fmt: skip
    else:
        tiles = tl.minimum(tl.maximum(length - SINKS - LAG, 0) // G, capacity)
        source = head_index
        if SHARED:
            tiles = capacity
            source = batch // copies * HEADS + head_index % HEADS
        if MASK != 0:  # tiles after its last column are not read
            tiles = tl.minimum(tiles, tl.cdiv(tl.maximum(mask_columns - SINKS, 0), G))
        oldest = 0
        if WINDOW:  # tiles before it are not even read
            oldest = tl.min(tl.where(in_rows, lowest, 2147483647), axis=0)
            oldest = tl.minimum(tl.maximum(oldest - SINKS, 0) // G, tiles)
        per_split = tl.cdiv(tiles - oldest, splits)
        start = oldest + (slot - dense_slots) * per_split
        stop = tl.minimum(start + per_split, tiles)
        peak, total, out = attend_tiles(
            rotated_ptr, unit_ptr, k_codes_ptr, k_affine_ptr, k_token_ptr, v_codes_ptr,
            v_affine_ptr, v_channel_ptr, row_index, in_rows, limit, lowest, source * head_tiles,
            start, stop, score_scale, softcap, mask_ptr, mask_row, mask_columns, mask_step,
            D, G, KEY_BITS, VALUE_BITS, SINKS, N, W_K, W_V,
            D_PAD, LIMITED or WINDOW, MASK, SOFTCAP, STAGES, PTX, FOLDS,
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
