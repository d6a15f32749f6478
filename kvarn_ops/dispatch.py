"""Which implementation runs, and the only way into the Triton kernels.

A backend is decided once, at patch time; ops carry the answer as an argument.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .config import KVarNConfig
from .env import is_installed
from .errors import BackendError
from .layout import PackedTiles, TileCache

__all__ = [
    "BACKENDS",
    "append",
    "attend",
    "attend_slots",
    "attention",
    "engine_slots",
    "format_of",
    "resolve",
    "step",
    "step_attention",
    "traces_kernels",
]

BACKENDS = ("auto", "reference", "aten", "triton")

_logger = logging.getLogger("kvarn_ops")


def resolve(backend: str, device: torch.device | str) -> str:
    """Turn a backend name into the one that will run on `device`.

    Raises
    ------
    BackendError
        If the name is unknown, or the backend cannot run on this device.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend={backend!r} does not exist: choose one of {BACKENDS}.")
    device = torch.device(device)
    if backend == "triton":
        obstacle = _obstacle(device, not traces_kernels())
        if obstacle:
            raise BackendError(
                f'backend="triton" cannot run here: {obstacle}. Use backend="aten", or "auto" to '
                "let the package choose."
            )
        return backend
    if backend != "auto":
        return backend
    return _automatic(device)


@lru_cache(maxsize=8)
def _automatic(device: torch.device) -> str:
    """What "auto" means on a device; logged once."""
    if device.type != "cuda":
        _logger.info('backend "auto" chose "aten" on %s: Inductor fuses it.', device.type)
        return "aten"
    obstacle = _obstacle(device, not traces_kernels())
    if obstacle:
        _logger.warning(
            'backend "auto" chose "aten" on %s, where decoding may be slower than with a dense '
            "cache: %s.",
            device,
            obstacle,
        )
        return "aten"
    _logger.info('backend "auto" chose "triton" on %s.', device)
    return "triton"


@lru_cache(maxsize=8)
def _obstacle(device: torch.device, interpreted: bool) -> str:
    """Why Triton kernels cannot run on a device; empty if they can."""
    if not is_installed("triton"):
        return "Triton is not installed (pip install triton)"
    if device.type != "cuda" and not interpreted:
        return (
            f"kernels need a CUDA or ROCm device and the model is on {device.type} (for tests, "
            "TRITON_INTERPRET=1 runs them on a CPU, slowly)"
        )
    if device.type != "cuda" or interpreted:
        return ""
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "kernels need compute capability 8.0 or newer"
    with _on(device):
        multiplies = _kernels().multiplies_codes(device)
    if not multiplies:
        return "its matrix units do not multiply subnormal fp16 numbers exactly"
    return ""


def traces_kernels() -> bool:
    """Whether a compiler may take kernels into its graph: not those that are interpreted."""
    return os.environ.get("TRITON_INTERPRET") != "1"


def attend(backend: str) -> Callable[..., Tensor]:
    """The eager attention of "reference" or "aten"; see `kvarn_ops.reference.attention.attend`."""
    if backend == "reference":
        from .reference import attention as reference

        return reference.attend
    if backend == "aten":
        from .ops import attend as aten

        return aten.attend
    raise BackendError(f"{backend!r} is not a resolved backend with an eager attention.")


def append(
    cache: TileCache,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    rotation: Tensor,
    config: KVarNConfig,
) -> None:
    """`kvarn::append_` by kernels."""
    with _on(k.device):
        _kernels().append(k.contiguous(), v.contiguous(), valid, cache, rotation, format_of(config))


def attention(
    q: Tensor,
    cache: TileCache,
    rotation: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    causal: bool,
    config: KVarNConfig,
    first: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """`kvarn::attention` by kernels; `first` `[B, S]` int64 are the first visible positions."""
    kernels = _kernels()
    visible = kernels.Visible(causal, causal and q.shape[2] > 1, None, first, mask)
    with _on(q.device):
        return kernels.attention(
            q, cache, None, None, None, visible, rotation, sink_logits, scale, softcap,
            format_of(config),
        )  # fmt: skip


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    shared: PackedTiles | None,
    cache: TileCache,
    rotation: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    causal: bool,
    config: KVarNConfig,
    first: Tensor | None,
    *,
    traced: bool = False,
) -> Tensor:
    """`kvarn::step_` by kernels; `traced`: each becomes a node of the graph being traced.

    `first` `[B, S]` int64 are the first visible positions; None: all are visible.
    """
    run: dict[str, Any] = {"run": torch.library.wrap_triton} if traced else {}
    with nullcontext() if traced else _on(q.device):  # compiled code sets the device itself
        return _kernels().step(
            q, k, v, valid, cache, shared, rotation, sink_logits, scale, softcap, causal,
            format_of(config), first, **run,
        )  # fmt: skip


def step_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: TileCache,
    rotation: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    config: KVarNConfig,
) -> Tensor:
    """`kvarn::step_attention` by kernels."""
    kernels = _kernels()
    with _on(q.device):
        return kernels.attention(
            q, cache, None, k.contiguous(), v.contiguous(),
            kernels.Visible(True, False, None, None), rotation, sink_logits, scale, softcap,
            format_of(config),
        )  # fmt: skip


def attend_slots(
    inputs: tuple[Tensor, ...],
    scale: float,
    softcap: float,
    tail_tokens: int,
    ratio: int,
    dense_slots: int,
    splits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kvarn::attend_slots` by its kernel; `inputs` are the op's tensors."""
    from .kernels import engine

    shapes = [tuple(x.shape) for x in inputs]
    problem = engine.problem_of(shapes, scale, softcap, tail_tokens, ratio, dense_slots, splits)
    with _on(inputs[0].device):
        return engine.attend_slots(tuple(x.contiguous() for x in inputs), problem)


def engine_slots(cache: TileCache, ratio: int, config: KVarNConfig) -> tuple[int, int]:
    """Slots for dense tokens and for tiles in engines, for `ratio` query heads per KV head."""
    from .kernels import engine

    batch, heads, ring, head_dim = cache.k_tail.shape
    shape = engine.shape_for(
        cache.k_tail.device, batch, heads, ratio, cache.k_codes.shape[2],
        cache.k_sink.shape[2] + ring + 1, head_dim, config.group_size, config.key_bits,
        config.value_bits,
    )  # fmt: skip
    return shape.dense_slots, shape.splits


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which may be another than that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _kernels() -> ModuleType:
    from .kernels import launch

    return launch


@lru_cache(maxsize=64)
def format_of(config: KVarNConfig) -> Any:
    """The config as kernels know it."""
    return _kernels().Format(
        key_bits=config.key_bits,
        value_bits=config.value_bits,
        group_size=config.group_size,
        sinks=config.num_sink_tokens,
        lag=config.tail_tokens,
        plus=config.encoder == "plus",
        iters=config.norm_iters,
        rotate_keys=config.rotate_keys,
        rotate_values=config.rotate_values,
    )
