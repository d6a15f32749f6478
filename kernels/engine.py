"""Attention for engines that launch a kernel by themselves: `attend_kernel` with other arguments.

TensorRT passes a kernel pointers to its inputs, then 32-bit integers, then pointers to its outputs,
all tensors contiguous, and nothing else: no strides, no floats. What is left over is compiled in.
There is one kernel and no workspace, so that it writes partial softmaxes, and what rotates queries
before it and merges slots after it is the program's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attend import attend_kernel
from .codes import planes
from .heuristics import AttendShape, attend_shape, describe

__all__ = [
    "INPUTS",
    "INTEGERS",
    "OUTPUTS",
    "EngineProblem",
    "attend_slots",
    "constants",
    "grid",
    "launch_shape",
    "problem_of",
    "shape_for",
]

INPUTS = (
    "q", "rotated", "unit", "k_codes", "k_channel_affine", "k_token_scale", "v_codes",
    "v_token_affine", "v_channel_scale", "k_sink", "v_sink", "k_tail", "v_tail", "k_new", "v_new",
    "lengths",
)  # fmt: skip
INTEGERS = ("rows", "queries", "capacity")
OUTPUTS = ("part", "peak", "weight")


@triton.jit(do_not_specialize=["rows", "queries", "capacity"])
def engine_kernel(
    q_ptr, rotated_ptr, unit_ptr, k_codes_ptr, k_channel_affine_ptr, k_token_scale_ptr, v_codes_ptr,
    v_token_affine_ptr, v_channel_scale_ptr, k_sink_ptr, v_sink_ptr, k_tail_ptr, v_tail_ptr,
    k_new_ptr, v_new_ptr, lengths_ptr, rows, queries, capacity, part_ptr, peak_ptr, weight_ptr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    G: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, SINKS: tl.constexpr,
    RING: tl.constexpr, LAG: tl.constexpr, DENSE_SLOTS: tl.constexpr, SPLITS: tl.constexpr,
    N: tl.constexpr, BLOCK_T: tl.constexpr, W_K: tl.constexpr, W_V: tl.constexpr,
    D_PAD: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr, FOLDS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One slot of one KV head and `N` query rows: the cache, then `queries` new tokens in order.

    Inputs as in `kvarn_ops.layout`, codes int8 or uint8, with `q`, `rotated` `[B, H, rows, D]`,
    `unit` `[B, H, rows]`, `k_new`, `v_new` `[B, H, queries, D]` and `lengths` `[B]` int32, the
    tokens stored. Outputs as in `attend_kernel`.
    """
    attend_kernel(
        q_ptr, rotated_ptr, unit_ptr, k_codes_ptr, k_channel_affine_ptr, k_token_scale_ptr,
        v_codes_ptr, v_token_affine_ptr, v_channel_scale_ptr, k_sink_ptr, v_sink_ptr, k_tail_ptr,
        v_tail_ptr, k_new_ptr, v_new_ptr, q_ptr, lengths_ptr, q_ptr, part_ptr, peak_ptr, weight_ptr,
        SCALE, SOFTCAP, rows, queries, 0, queries, queries, capacity, capacity,
        DENSE_SLOTS + SPLITS, 0, 1, SPLITS, DENSE_SLOTS, q_ptr, 1, 0, 0, 0, 1,
        HEADS, D, G, KEY_BITS, VALUE_BITS, SINKS, RING, LAG, 0, N, BLOCK_T, W_K, W_V, D_PAD,
        True, False, True, False, False, False, 0, 1, False, SOFTCAP != 0.0, STAGES, PTX, FOLDS,
        UPCAST,
    )  # fmt: skip


class EngineProblem(NamedTuple):
    """What is compiled into the kernel."""

    heads: int  # of keys and values
    head_dim: int
    group_size: int
    key_bits: int
    value_bits: int
    sinks: int
    ring: int
    lag: int  # tail_tokens
    scale: float
    softcap: float
    ratio: int  # query heads per head
    dense_slots: int
    splits: int

    @property
    def slots(self) -> int:
        """Partial results per row."""
        return self.dense_slots + self.splits


def shape_for(
    device: torch.device, batch: int, heads: int, ratio: int, tiles: int, dense_tokens: int,
    head_dim: int, group_size: int, key_bits: int, value_bits: int,
) -> AttendShape:  # fmt: skip
    """How the kernel is launched, for one new token per row: longer calls take more programs."""
    return attend_shape(
        device, batch * heads, ratio, tiles, dense_tokens, head_dim, group_size, key_bits,
        value_bits,
    )  # fmt: skip


def launch_shape(device: torch.device, problem: EngineProblem) -> AttendShape:
    """`shape_for` a problem that has its slots: the numbers of slots of the result mean nothing."""
    return shape_for(
        device, 1, problem.heads, problem.ratio, 1, 1, problem.head_dim, problem.group_size,
        problem.key_bits, problem.value_bits,
    )  # fmt: skip


def problem_of(
    shapes: Sequence[Sequence[int]], scale: float, softcap: float, lag: int, ratio: int,
    dense_slots: int, splits: int,
) -> EngineProblem:  # fmt: skip
    """From the shapes of `INPUTS`; those of batch and new tokens are not read."""
    sizes = dict(zip(INPUTS, shapes, strict=True))
    head_dim, group = sizes["q"][3], sizes["k_token_scale"][3]
    return EngineProblem(
        heads=sizes["k_tail"][1],
        head_dim=head_dim,
        group_size=group,
        key_bits=sizes["k_codes"][4] * 8 // head_dim,
        value_bits=sizes["v_codes"][4] * 8 // group,
        sinks=sizes["k_sink"][2],
        ring=sizes["k_tail"][2],
        lag=lag,
        scale=scale,
        softcap=softcap,
        ratio=ratio,
        dense_slots=dense_slots,
        splits=splits,
    )


def grid(programs: Any, rows: Any, block_rows: int, slots: int) -> tuple[Any, Any, Any]:
    """Blocks of a launch, for numbers or symbolic expressions with + and //."""
    return programs, slots, (rows + (block_rows - 1)) // block_rows


def constants(
    problem: EngineProblem, shape: AttendShape, *, ptx: bool, upcast: bool = False
) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    head_dim = problem.head_dim
    return {
        "SCALE": problem.scale, "SOFTCAP": problem.softcap, "HEADS": problem.heads, "D": head_dim,
        "G": problem.group_size, "KEY_BITS": problem.key_bits, "VALUE_BITS": problem.value_bits,
        "SINKS": problem.sinks, "RING": problem.ring, "LAG": problem.lag,
        "DENSE_SLOTS": problem.dense_slots, "SPLITS": problem.splits,
        "N": shape.rows, "BLOCK_T": shape.block_tokens,
        "W_K": triton.next_power_of_2(head_dim // planes(problem.key_bits)),
        "W_V": problem.group_size // planes(problem.value_bits),
        "D_PAD": triton.next_power_of_2(head_dim), "STAGES": shape.stages, "PTX": ptx,
        "FOLDS": shape.folds, "UPCAST": upcast,
    }  # fmt: skip


def attend_slots(
    inputs: tuple[Tensor, ...], problem: EngineProblem
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel on tensors, as an engine does: `part`, `peak`, `weight`."""
    named = dict(zip(INPUTS, inputs, strict=True))
    q, k_codes, k_new = named["q"], named["k_codes"], named["k_new"]
    batch, heads, rows, head_dim = q.shape
    capacity, queries, device = k_codes.shape[2], k_new.shape[2], q.device
    shape = launch_shape(device, problem)

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=device)

    lead = (batch, heads, problem.slots, rows)
    outputs = empty(*lead, head_dim), empty(*lead), empty(*lead)
    described = describe(device)
    engine_kernel[grid(batch * heads, rows, shape.rows, problem.slots)](
        *inputs, rows, queries, capacity, *outputs,
        **constants(
            problem, shape, ptx=described.ptx,
            # The interpreter cannot multiply them.
            upcast=described.interpreted and q.dtype == torch.bfloat16,
        ),
        num_warps=shape.warps,
    )  # fmt: skip
    return outputs
