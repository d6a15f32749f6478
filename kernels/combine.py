"""After attention: merge the slots' partial softmaxes, rotate back, undo the equalizer.

out = (sum of dense slots + ((sum of packed slots) @ H.T) * 2**equalizer) / total
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import LOG2E, raised


@triton.jit(do_not_specialize=["rows", "slots", "queries", "dense_slots"])
def combine_kernel(
    part_ptr, peak_ptr, total_ptr, rotation_ptr, equalizer_ptr, sink_logits_ptr, out_ptr,
    unit_ptr, lengths_ptr, rows, slots, queries, dense_slots,
    HEADS: tl.constexpr, D: tl.constexpr, RATIO: tl.constexpr,
    ROTATE: tl.constexpr, HAS_SINK_LOGITS: tl.constexpr, COUNT: tl.constexpr, M: tl.constexpr,
    D_PAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`M` query rows of a KV head and `BLOCK_D` channels of the result.

    `part_ptr`, `peak_ptr`, `total_ptr` are what `attend_kernel` wrote; `out` is `[B, H, rows, D]`
    in the model's dtype, zeros where nothing is seen; `sink_logits` `[H * RATIO]`. A row whose
    `unit` `[B, H, rows]` is NaN becomes NaN: its cache is too small. `COUNT` tokens that `prepare`
    stored are added to `lengths` `[B]`.
    """
    head_index = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * M + tl.arange(0, M)
    in_rows = row < rows
    own = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    channel = tl.arange(0, D_PAD)

    peak = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    dense = tl.zeros((M, BLOCK_D), tl.float32)
    packed = tl.zeros((M, D_PAD), tl.float32)
    if HAS_SINK_LOGITS:
        q_head = head_index % HEADS * RATIO + row // queries
        logit = tl.load(sink_logits_ptr + q_head, mask=in_rows, other=0.0).to(tl.float32)
        peak = logit * LOG2E
        total = total + 1.0
    for first in range(0, slots, BLOCK_S):
        slot = first + tl.arange(0, BLOCK_S)
        place = (head_index * slots + slot)[:, None] * rows + row[None, :]  # [BLOCK_S, M]
        present = (slot < slots)[:, None] & in_rows[None, :]
        peaks = tl.load(peak_ptr + place, mask=present, other=-float("inf"))
        totals = tl.load(total_ptr + place, mask=present, other=0.0)
        peak, base, shrink = raised(peak, tl.max(peaks, axis=0), True)
        weight = tl.exp2(peaks - base[None, :])
        total = total * shrink + tl.sum(totals * weight, axis=0)
        # Slots that saw nothing wrote no output.
        written = present & (peaks != -float("inf"))
        is_dense = (slot < dense_slots)[:, None]
        at = place[:, :, None] * D
        own_part = tl.load(
            part_ptr + at + own[None, None, :],
            mask=(written & is_dense)[:, :, None] & (own < D)[None, None, :],
            other=0.0,
        )
        dense = dense * shrink[:, None] + tl.sum(own_part * weight[:, :, None], axis=0)
        part = tl.load(
            part_ptr + at + channel[None, None, :],
            mask=(written & (slot >= dense_slots)[:, None])[:, :, None]
            & (channel < D)[None, None, :],
            other=0.0,
        )
        packed = packed * shrink[:, None] + tl.sum(part * weight[:, :, None], axis=0)

    if ROTATE:
        inside = (own < D)[:, None] & (channel < D)[None, :]
        matrix = tl.load(rotation_ptr + own[:, None] * D + channel[None, :], mask=inside, other=0.0)
        if M >= 16:
            back = tl.dot(packed, tl.trans(matrix), input_precision=PRECISION)
        else:
            back = tl.sum(packed[:, None, :] * matrix[None, :, :], axis=2)
    else:
        # The own channels of `packed`, without indexing registers.
        chosen = own[:, None] == channel[None, :]
        back = tl.sum(tl.where(chosen[None, :, :], packed[:, None, :], 0.0), axis=2)
    power = tl.load(equalizer_ptr + head_index * D + own, mask=own < D, other=0.0)
    out = dense + back * tl.exp2(power.to(tl.float32))[None, :]
    unit = tl.load(unit_ptr + head_index * rows + row, mask=in_rows, other=1.0)
    total = tl.where(unit != unit, unit, total)
    # A NaN total stays one; nothing seen gives zeros.
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    place = (head_index * rows + row)[:, None] * D + own[None, :]
    tl.store(out_ptr + place, out, mask=in_rows[:, None] & (own < D)[None, :])
    if COUNT > 0:
        first_program = (tl.program_id(1) == 0) & (tl.program_id(2) == 0)
        if first_program & (head_index % HEADS == 0):
            old = tl.load(lengths_ptr + head_index // HEADS)
            tl.store(lengths_ptr + head_index // HEADS, old + COUNT)
