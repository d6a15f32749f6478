"""What tools ask of the kernels besides running them: launch settings, and binaries to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from .config import KVarNConfig
from .dispatch import format_of
from .errors import InputError
from .layout import allocate

__all__ = [
    "attend_key",
    "check_arch",
    "compiled_step",
    "encode_key",
    "forget_tuning",
    "trying",
    "tuning_path",
]


def tuning_path(device: torch.device, folder: Path | None = None) -> Path:
    """The file with this device's launch settings, whether or not it exists."""
    from .kernels import heuristics

    name = heuristics.tuning_file(heuristics.describe(device).name)
    return (folder or heuristics.tuning_dir()) / name


def attend_key(
    config: KVarNConfig, head_dim: int, rows: int, dtype: torch.dtype = torch.bfloat16
) -> str:
    """Name of attention's settings in a file, for `rows` query rows per KV head."""
    from .kernels import heuristics

    block_rows = heuristics.block_rows(rows, head_dim, dtype)
    return heuristics.attend_key(
        config.key_bits, config.value_bits, config.group_size, head_dim, block_rows
    )


def encode_key(config: KVarNConfig, head_dim: int) -> str:
    """Name of the encoder's settings in a file."""
    from .kernels import heuristics

    return heuristics.encode_key(config.key_bits, config.value_bits, config.group_size, head_dim)


def trying(settings: dict[str, int]) -> AbstractContextManager[None]:
    """Launch kernels with these settings."""
    from .kernels import heuristics

    return heuristics.trying(settings)


def forget_tuning() -> None:
    """Read the tuning files again."""
    from .kernels import heuristics

    heuristics.tuned.cache_clear()


def check_arch(arch: str) -> None:
    """Raise `InputError` unless Triton can compile for a GPU of this name."""
    from .kernels import static

    try:
        static.target_of(arch)
    except ValueError as error:
        raise InputError(str(error)) from None


def compiled_step(
    config: KVarNConfig,
    head_dim: int,
    q_heads: int,
    kv_heads: int,
    new_tokens: int,
    dtype: str,
    max_cache_len: int,
    arch: str,
    names: Sequence[str] = (),
    mask: tuple[str, int] = ("", 1),
) -> Iterator[Any]:
    """Binaries (`kernels.static.Binary`) of the kernels of one step, compiled for `arch`.

    With a `mask`, its dtype and heads, they are those of attention to the cache alone.
    """
    from .kernels import heuristics, static
    from .kernels import launch as kernels

    kind = getattr(torch, dtype)
    place: dict[str, Any] = {"dtype": kind, "device": "meta"}
    cache = allocate(config, 8, kv_heads, head_dim, max_cache_len, kind, "meta")
    q = torch.empty(8, q_heads, new_tokens, head_dim, **place)
    k = torch.empty(8, kv_heads, new_tokens, head_dim, **place)
    rotation = torch.empty(head_dim, head_dim, device="meta")
    recorder = static.Recorder()
    target = static.target_of(arch)
    nvidia = target.backend == "cuda"
    assumed = heuristics.Device(
        arch, 132, nvidia, target.warp_size, interpreted=False, arch=arch,
        tensor_memory=nvidia and int(target.arch) // 10 == 10,
    )  # fmt: skip
    with heuristics.assumed(assumed):
        scale = head_dim**-0.5
        if mask[0]:
            columns = torch.empty(
                8, mask[1], new_tokens, max_cache_len, dtype=getattr(torch, mask[0]), device="meta"
            )
            kernels.attention(
                q, cache, None, None, None, kernels.Visible(False, False, None, None, columns),
                rotation, None, scale, 0.0, format_of(config), run=recorder,
            )  # fmt: skip
        else:
            kernels.step(
                q, k, k, None, cache, None, rotation, None, scale, 0.0, True, format_of(config),
                None, run=recorder,
            )  # fmt: skip
    for launch in static.unique(recorder.launches):
        if not names or launch.kernel.fn.__name__.removesuffix("_kernel") in names:
            yield static.compile_launch(launch, arch)
