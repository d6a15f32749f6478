"""Launch shapes: a rule from the device and the problem, or what a tuning file says.

Everything here is a function of shapes, never of lengths on the device: a captured graph stays
valid, and results do not depend on what else is in the batch beyond rounding.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton

__all__ = ["AttendShape", "EncodeShape", "attend_shape", "encode_shape", "interpreted"]

_TUNING_FILES = Path(__file__).parent / "tuned"
_INTERPRETER_SMS = 4


class AttendShape(NamedTuple):
    """How `attend_kernel` is launched."""

    rows: int  # query rows per program, the small side of its products
    splits: int  # slots over the quantized tiles
    dense_slots: int  # slots over sinks, tail and new tokens
    block_tokens: int  # of the dense part
    warps: int
    stages: int


class EncodeShape(NamedTuple):
    """How `encode_kernel` is launched."""

    width: int  # channels per chunk
    chunks: int
    block_k: int
    warps: int
    programs: int  # at most per launch, each with scratch memory for one tile


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on any device."""
    return triton.knobs.runtime.interpret


@lru_cache(maxsize=8)
def _tuned(device_name: str) -> dict[str, dict[str, int]]:
    """Settings of a device by preset, from `kvarn-ops tune` or from this package."""
    name = device_name.lower().replace(" ", "_").replace("/", "_") + ".json"
    own = os.environ.get("KVARN_OPS_TUNING_DIR")
    for folder in (*([Path(own)] if own else []), _TUNING_FILES):
        if (folder / name).is_file():
            return json.loads((folder / name).read_text())
    return {}


@lru_cache(maxsize=64)
def _device(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":
        return "interpreter", _INTERPRETER_SMS
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


def attend_shape(
    device: torch.device, programs: int, rows: int, tiles: int, dense_tokens: int,
    head_dim: int, key_bits: int, value_bits: int,
) -> AttendShape:  # fmt: skip
    """Shape for `programs` = batch x KV heads, each with `rows` query rows and `tiles` tiles."""
    name, sms = _device(device)
    settings = _tuned(name).get(f"k{key_bits}v{value_bits}_d{head_dim}", {})
    block_rows = min(64, max(8, triton.next_power_of_2(rows)))
    # Registers hold a tile's words and the accumulators [G, rows] and [D, rows].
    pad = triton.next_power_of_2(max(head_dim, 128))
    eight_bits = 2 if max(key_bits, value_bits) == 8 else 1
    size = pad * pad * max(block_rows, 8 * eight_bits) // 128**2 // 8
    warps = settings.get("warps", min(8, max(2, size)))
    block_tokens = settings.get("block_tokens", 32)
    # One wave of programs: more would only write more partial results.
    slots = sms * settings.get("programs_per_sm", 12 // warps)
    share = max(1, slots // (programs * triton.cdiv(rows, block_rows)))
    blocks = triton.cdiv(dense_tokens, block_tokens)
    dense_slots = max(1, min(blocks, share))
    return AttendShape(
        rows=block_rows,
        splits=max(1, min(tiles, share)),
        dense_slots=dense_slots,
        block_tokens=block_tokens,
        warps=warps,
        stages=settings.get("stages", 2),
    )


def encode_shape(device: torch.device, head_dim: int, key_planes: int) -> EncodeShape:
    """Chunks of 32 channels, for which no target spills registers at any width."""
    width = 32
    chunks = triton.next_power_of_2(triton.cdiv(head_dim // key_planes, width // key_planes))
    return EncodeShape(
        width=width, chunks=chunks, block_k=32, warps=8, programs=4 * _device(device)[1]
    )
