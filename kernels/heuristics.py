"""Launch shapes: a rule from the device and the problem, or what a file says.

The file is one that `kvarn-ops tune` wrote for this device, else `settings.json` of this folder:
cases in which the rule's binaries spill registers, by architecture (benchmarks/spill_free.py).

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

from .codes import planes

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
    folds: int  # tokens of a tile in one thread, whose weights it adds before it keeps them


class EncodeShape(NamedTuple):
    """How `encode_kernel` is launched."""

    width: int  # channels per chunk
    chunks: int
    block_k: int
    warps: int
    stages: int
    programs: int  # at most per launch, each with scratch memory for one tile


class Device(NamedTuple):
    """What launches depend on."""

    name: str
    multiprocessors: int
    ptx: bool  # NVIDIA, compiled: inline PTX and TF32 are available
    wavefront: int  # threads that run in lockstep
    interpreted: bool
    arch: str = ""  # sm_90, say; empty if AMD's or none
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
    arch = f"sm_{properties.major}{properties.minor}" if ptx else ""
    return Device(
        properties.name, properties.multi_processor_count, ptx, wavefront, interpreted, arch,
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


def attend_key(
    key_bits: int, value_bits: int, group_size: int, head_dim: int, block_rows: int
) -> str:
    """Name of attention in a file; other numbers of rows want other settings."""
    return f"{encode_key(key_bits, value_bits, group_size, head_dim)}_r{block_rows}"


def encode_key(key_bits: int, value_bits: int, group_size: int, head_dim: int) -> str:
    """Name of encoding in a file."""
    return f"k{key_bits}v{value_bits}_g{group_size}_d{head_dim}"


@lru_cache(maxsize=8)
def tuned(device_name: str) -> dict[str, dict[str, int]]:
    """Settings of a device by `attend_key`, from what `kvarn-ops tune` wrote."""
    path = tuning_dir() / tuning_file(device_name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@lru_cache(maxsize=1)
def _shipped() -> dict[str, dict[str, dict[str, int]]]:
    path = Path(__file__).with_name("settings.json")
    return json.loads(path.read_text(encoding="utf-8"))


def _settings(device: Device, key: str) -> dict[str, int]:
    if _trial:
        return _trial[-1]
    return tuned(device.name).get(key) or _shipped().get(device.arch, {}).get(key, {})


_trial: list[dict[str, int]] = []


@contextmanager
def trying(settings: dict[str, int]) -> Iterator[None]:
    """Launch with these settings, and no file's."""
    _trial.append(settings)
    try:
        yield
    finally:
        _trial.pop()


def block_rows(rows: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Query rows per program, for queries of `dtype`."""
    # Products of fp32 are not for tensor cores: operands and result lie in registers.
    most = 16 if dtype == torch.float32 and head_dim > 128 else _MOST_ROWS
    return min(most, max(8, triton.next_power_of_2(rows)))


def attend_shape(
    device: torch.device, programs: int, rows: int, tiles: int, dense_tokens: int,
    head_dim: int, group_size: int, key_bits: int, value_bits: int,
    dtype: torch.dtype = torch.bfloat16,
) -> AttendShape:  # fmt: skip
    """Shape for `programs` = batch x KV heads, each with `rows` query rows and `tiles` tiles.

    `dtype` is that of the queries.
    """
    described, rows_together = describe(device), block_rows(rows, head_dim, dtype)
    key = attend_key(key_bits, value_bits, group_size, head_dim, rows_together)
    settings = _settings(described, key)
    # Registers hold a tile's words and the accumulators [G, rows] and [D, rows]. A wavefront of
    # AMD has 64 threads.
    warps, wide = rows_together // 4, max(key_bits, value_bits) == 8
    if wide and rows_together != 16:
        warps *= 2
    if head_dim > 128:
        warps *= 2
    elif described.tensor_memory and rows_together == 16 and not (wide or dtype == torch.float32):
        warps = 2  # products of 16 rows by four go through tensor memory: half as much again
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
    fitting = 32 if 96 < head_dim <= 256 and dtype != torch.float32 else 16
    block_tokens = settings.get("block_tokens", fitting)
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
        folds=settings.get("folds", _folds(described, group_size, rows_together, warps)),
    )


def _folds(described: Device, group_size: int, rows: int, warps: int) -> int:
    """Tokens per thread and query row in the result of a tensor core's product."""
    if described.tensor_memory and warps >= 4:
        return 1  # a thread reads one token with all rows
    # Each warp has 16 tokens next to each other, or 32 where AMD multiplies 32 x 32.
    neighbours = 32 if described.wavefront == 64 and rows >= 32 else 16
    return max(1, group_size // (neighbours * warps))


def encode_shape(
    device: torch.device, head_dim: int, group_size: int, key_bits: int, value_bits: int
) -> EncodeShape:
    """Chunks of 64 channels, one program per multiprocessor at the least."""
    described = describe(device)
    settings = _settings(described, encode_key(key_bits, value_bits, group_size, head_dim))
    width = settings.get("encode_width", 32 if head_dim <= 32 else 64)
    # A chunk has all planes of its words, of keys as of values.
    count = planes(key_bits)
    return EncodeShape(
        width=width,
        chunks=triton.next_power_of_2(triton.cdiv(head_dim // count, width // count)),
        block_k=settings.get("encode_block_k", 16),
        warps=settings.get("encode_warps", max(2, group_size // 16)),
        stages=settings.get("encode_stages", 1),
        programs=4 * described.multiprocessors,
    )
