"""Before attention: rotate the queries, and put a decode step's token into the sinks or the tail.

unit = power of two near |q * 2**equalizer|,  rotated = (q * 2**equalizer) @ H / unit  in fp16
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "capacity"])
def prepare_kernel(
    q_ptr, rotation_ptr, equalizer_ptr, rotated_ptr, unit_ptr,
    k_ptr, v_ptr, k_sink_ptr, v_sink_ptr, k_tail_ptr, v_tail_ptr, lengths_ptr, rows, capacity,
    HEADS: tl.constexpr, D: tl.constexpr, G: tl.constexpr, SINKS: tl.constexpr,
    RING: tl.constexpr, LAG: tl.constexpr,
    ROTATE: tl.constexpr, STORE: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`M` query rows of one KV head, `BLOCK_D` channels of the result.

    `q` and `rotated` are `[B, H, rows, D]`, `unit` `[B, H, rows]` fp32. With `STORE`, `k_ptr` and
    `v_ptr` `[B, H, 1, D]` go to the position `lengths` `[B]`, which is left as it is: attention
    reads it, and `combine` counts the token. Where a row has more tiles than `capacity`, `unit` is
    NaN, and `combine` makes its outputs NaN.
    """
    head_index = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * M + tl.arange(0, M)
    start = tl.program_id(2) * BLOCK_D
    place = (head_index * rows + row)[:, None] * D
    channel = start + tl.arange(0, BLOCK_D)
    inner = tl.arange(0, BLOCK_K)

    square = tl.zeros((M,), tl.float32)
    out = tl.zeros((M, BLOCK_D), tl.float32)
    for first in range(0, D, BLOCK_K):
        k = first + inner
        readable = (row < rows)[:, None] & (k < D)[None, :]
        x = tl.load(q_ptr + place + k[None, :], mask=readable, other=0.0).to(tl.float32)
        power = tl.load(equalizer_ptr + head_index * D + k, mask=k < D, other=0.0)
        x = x * tl.exp2(power.to(tl.float32))[None, :]
        square += tl.sum(x * x, axis=1)
        if ROTATE:
            matrix = tl.load(
                rotation_ptr + k[:, None] * D + channel[None, :],
                mask=(k < D)[:, None] & (channel < D)[None, :],
                other=0.0,
            )
            out = tl.dot(x, matrix, out, input_precision=PRECISION)
    if not ROTATE:
        readable = (row < rows)[:, None] & (channel < D)[None, :]
        out = tl.load(q_ptr + place + channel[None, :], mask=readable, other=0.0).to(tl.float32)
        power = tl.load(equalizer_ptr + head_index * D + channel, mask=channel < D, other=0.0)
        out = out * tl.exp2(power.to(tl.float32))[None, :]
    norm = tl.sqrt(square)
    usable = (norm > 0.0) & (norm < float("inf"))
    unit = tl.exp2(tl.ceil(tl.log2(tl.where(usable, norm, 1.0))))
    length = tl.load(lengths_ptr + head_index // HEADS).to(tl.int32)
    full = (length + STORE - SINKS - LAG) // G > capacity
    unit = tl.where(full, float("nan"), unit)
    writable = (row < rows)[:, None] & (channel < D)[None, :]
    tl.store(rotated_ptr + place + channel[None, :], out / unit[:, None], mask=writable)
    tl.store(unit_ptr + head_index * rows + row, unit, mask=(row < rows) & (start == 0))

    if STORE:
        if tl.program_id(1) == 0:
            inside = channel < D
            source = head_index * D + channel
            k_value = tl.load(k_ptr + source, mask=inside)
            v_value = tl.load(v_ptr + source, mask=inside)
            in_sinks = length < SINKS
            sink = (head_index * SINKS + length) * D + channel
            tl.store(k_sink_ptr + sink, k_value, mask=inside & in_sinks)
            tl.store(v_sink_ptr + sink, v_value, mask=inside & in_sinks)
            slot = tl.maximum(length - SINKS, 0) % RING
            tail = (head_index * RING + slot) * D + channel
            tl.store(k_tail_ptr + tail, k_value, mask=inside & (length >= SINKS))
            tl.store(v_tail_ptr + tail, v_value, mask=inside & (length >= SINKS))
