"""Put new tokens into the sinks and into the tail's ring."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["new_tokens"])
def store_kernel(
    k_ptr, v_ptr, rank_ptr, counts_ptr, k_sink_ptr, v_sink_ptr, k_tail_ptr, v_tail_ptr,
    lengths_ptr, new_tokens,
    HEADS: tl.constexpr, D: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr,
    HAS_VALID: tl.constexpr, BLOCK_T: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """`BLOCK_T` tokens of one KV head.

    `k`, `v` are `[B, H, new_tokens, D]`; `rank` `[B, new_tokens]` int32 counts a row's valid tokens
    before each one, -1 for padding, `counts` `[B]` int64 all of them (`HAS_VALID`). `lengths`
    `[B]` are those before; the caller adds to them afterwards.
    """
    head_index = tl.program_id(0).to(tl.int64)
    batch = head_index // HEADS
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    index = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = index < new_tokens
    rank, count = index, new_tokens
    if HAS_VALID:
        rank = tl.load(rank_ptr + batch * new_tokens + index, mask=inside, other=-1).to(tl.int32)
        inside &= rank >= 0
        count = tl.load(counts_ptr + batch).to(tl.int32)
    position = length + rank
    channel = tl.arange(0, D_PAD)
    wide = (channel < D)[None, :]
    source = (head_index * new_tokens + index)[:, None] * D + channel[None, :]
    k = tl.load(k_ptr + source, mask=inside[:, None] & wide)
    v = tl.load(v_ptr + source, mask=inside[:, None] & wide)
    is_sink = inside & (position < SINKS)
    place = (head_index * SINKS + position)[:, None] * D + channel[None, :]
    tl.store(k_sink_ptr + place, k, mask=is_sink[:, None] & wide)
    tl.store(v_sink_ptr + place, v, mask=is_sink[:, None] & wide)
    # Of tokens that fall on the same slot only the newest may write.
    is_tail = inside & (position >= SINKS) & (position >= length + count - RING)
    slot = tl.maximum(position - SINKS, 0) % RING
    place = (head_index * RING + slot)[:, None] * D + channel[None, :]
    tl.store(k_tail_ptr + place, k, mask=is_tail[:, None] & wide)
    tl.store(v_tail_ptr + place, v, mask=is_tail[:, None] & wide)
