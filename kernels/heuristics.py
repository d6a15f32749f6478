"""Launch shapes: a rule from the device and the problem, or what a tuning file says.

Everything here is a function of shapes, never of lengths on the device: a captured graph stays
valid, and results do not depend on what else is in the batch beyond rounding.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton

__all__ = [
    "AttendShape",
    "Device",
    "EncodeShape",
    "assumed",
    "attend_shape",
    "describe",
    "encode_shape",
]

_INTERPRETER_SMS = 4
_MOST_ROWS = 32  # accumulators of more would spill


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


class Device(NamedTuple):
    """What launches depend on."""

    name: str
    multiprocessors: int
    ptx: bool  # NVIDIA, compiled: inline PTX and TF32 are available
    wavefront: int  # threads that run in lockstep
    interpreted: bool
    tensor_memory: bool = False  # of compute capability 10: products keep their operands there


_assumed: list[Device] = []


@contextmanager
def assumed(device: Device) -> Iterator[None]:
    """Shape launches for a device that is not there."""
    _assumed.append(device)
    try:
        yield
    finally:
        _assumed.pop()


def describe(device: torch.device) -> Device:
    """The device of a tensor."""
    return _assumed[-1] if _assumed else _describe(device)


@lru_cache(maxsize=64)
def _describe(device: torch.device) -> Device:
    interpreted = bool(triton.knobs.runtime.interpret)
    if device.type != "cuda":
        return Device("interpreter", _INTERPRETER_SMS, False, 32, interpreted)
    properties = torch.cuda.get_device_properties(device)
    ptx = torch.version.hip is None and not interpreted
    wavefront = getattr(properties, "warp_size", 32)
    tensor_memory = ptx and properties.major == 10
    return Device(
        properties.name, properties.multi_processor_count, ptx, wavefront, interpreted,
        tensor_memory,
    )  # fmt: skip


def tuning_dir() -> Path:
    """Where `kvarn-ops tune` writes: KVARN_OPS_TUNING_DIR, else a folder of the user's cache."""
    own = os.environ.get("KVARN_OPS_TUNING_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(cache) / "kvarn_ops" / "tuned"


def tuning_file(device_name: str) -> str:
    """File name of a device's settings."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json"


def tuning_key(
    key_bits: int, value_bits: int, group_size: int, head_dim: int, block_rows: int
) -> str:
    """Name of a case in a tuning file; other numbers of rows want other settings."""
    return f"k{key_bits}v{value_bits}_g{group_size}_d{head_dim}_r{block_rows}"


@lru_cache(maxsize=8)
def tuned(device_name: str) -> dict[str, dict[str, int]]:
    """Settings of a device by `tuning_key`, from what `kvarn-ops tune` wrote."""
    path = tuning_dir() / tuning_file(device_name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


_trial: list[dict[str, int]] = []


@contextmanager
def trying(settings: dict[str, int]) -> Iterator[None]:
    """Launch with these settings, for `kvarn-ops tune`."""
    _trial.append(settings)
    try:
        yield
    finally:
        _trial.pop()


def block_rows(rows: int) -> int:
    """Query rows per program."""
    return min(_MOST_ROWS, max(8, triton.next_power_of_2(rows)))


def attend_shape(
    device: torch.device, programs: int, rows: int, tiles: int, dense_tokens: int,
    head_dim: int, group_size: int, key_bits: int, value_bits: int,
) -> AttendShape:  # fmt: skip
    """Shape for `programs` = batch x KV heads, each with `rows` query rows and `tiles` tiles."""
    described, rows_together = describe(device), block_rows(rows)
    key = tuning_key(key_bits, value_bits, group_size, head_dim, rows_together)
    settings = _trial[-1] if _trial else tuned(described.name).get(key, {})
    # Registers hold a tile's words and the accumulators [G, rows] and [D, rows]. A wavefront of
    # AMD has 64 threads.
    warps = rows_together // 4
    if head_dim > 128:
        warps *= 2
    if max(key_bits, value_bits) == 8:
        warps *= 2
    # Products of 32 tokens or channels occupy few warps: of more, each repeats the unpacking, and
    # Triton 3.7 does not compile them for sm_100. Nor fewer for 32 rows of head_dim up to 128.
    if 32 in (group_size, head_dim) and rows_together == 16:
        warps = 4 if head_dim > 128 else 2
    if group_size == 32 and rows_together == 32 and head_dim > 128:
        warps = 4
    most = 4 if described.wavefront == 64 else 8
    if described.tensor_memory and head_dim > 256:
        warps = most = 16  # fewer do not compile with Triton 3.7
    warps = settings.get("warps", min(warps, most))
    # At head_dim 80, 32 tokens spill on sm_100.
    block_tokens = settings.get("block_tokens", 32 if 96 < head_dim <= 256 else 16)
    # One wave of programs: more would only write more partial results.
    slots = described.multiprocessors * settings.get("programs_per_sm", max(1, 12 // warps))
    share = max(1, slots // (programs * triton.cdiv(rows, rows_together)))
    blocks = triton.cdiv(dense_tokens, block_tokens)
    dense_slots = max(1, min(blocks, share))
    return AttendShape(
        rows=rows_together,
        splits=max(1, min(tiles, share)),
        dense_slots=dense_slots,
        block_tokens=block_tokens,
        warps=warps,
        stages=settings.get("stages", 2 if head_dim <= 256 else 1),
    )


def encode_shape(device: torch.device, head_dim: int, key_planes: int) -> EncodeShape:
    """Chunks of 32 channels, for which no target spills registers at any width."""
    width = 32
    chunks = triton.next_power_of_2(triton.cdiv(head_dim // key_planes, width // key_planes))
    return EncodeShape(
        width=width,
        chunks=chunks,
        block_k=32,
        warps=8,
        programs=4 * describe(device).multiprocessors,
    )
