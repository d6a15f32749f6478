"""Patch and unpatch one model with cache modules of its own: the same face as `hf/adapter.py`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from .._compat import is_compiling
from ..config import KVarNConfig
from ..errors import InputError, UnsupportedModelError
from ..hadamard import check_head_dim
from ..layer_report import LayerReport
from .adapter import is_packed, pack, restore
from .plan import REQUIRED, Plan, parameters_of
from .recognise import Finding, recognise
from .subject import alike, float_buffers

__all__ = ["CacheReport", "PatchRecord", "attach", "device_of", "inspect_model"]

_logger = logging.getLogger("kvarn_ops")
# Only to word an error: a call that may be missing.
_MAKES_CACHES = re.compile(r"(set_?up|set|init|build|make|create|allocate|prepare)_?\w*cache")


FOLDS_ROTATION = False


@dataclass(frozen=True)
class CacheReport(LayerReport):
    """A cache module, and how to replace its buffers."""

    plan: Plan | None = None


@dataclass(eq=False)
class PatchRecord:
    """Everything needed to describe and to undo a patch. Lives on the model as `_kvarn_patch`.

    `lifetime` is any object that lives as long as a patched model or a copy of it.
    """

    config: KVarNConfig
    backend: str
    layers: list[CacheReport]
    lifetime: Any
    handles: list[Any] = field(default_factory=list)
    fold_rotation: bool = False

    def undo(self, model: nn.Module) -> None:
        """Put the same modules back with their own classes, their buffers empty."""
        for module in model.modules():
            if is_packed(module):
                restore(module)
        for handle in self.handles:
            handle.remove()
        del model._kvarn_patch

    def lost(self, model: nn.Module) -> bool:
        """Whether packed caches were replaced by others since."""
        packed = sum(report.packed for report in self.layers)
        return packed != sum(is_packed(module) for module in model.modules())


def inspect_model(model: nn.Module, config: KVarNConfig) -> list[CacheReport]:
    """Decide for every cache module whether it can be packed, without changing the model.

    Raises
    ------
    UnsupportedModelError
        If the model holds no caches (yet), or one that cannot be packed.
    """
    reports: list[CacheReport] = []
    known: list[tuple[nn.Module, Finding]] = []  # layers are alike: each kind is tried once
    for path, module in model.named_modules():
        if is_packed(module):
            continue
        found = next((finding for other, finding in known if alike(other, module)), None)
        if found is None:
            found = recognise(module)
            if found is None:
                continue
            known.append((module, found))
        reason, size = found.reason, None
        if found.plan is not None:
            shape = float_buffers(module)[found.plan.keys].shape
            heads, width = shape[1 if found.plan.heads_first else 2], shape[3]
            try:
                check_head_dim(width, config.rotate_keys or config.rotate_values)
                size = config.bytes_per_token(width, heads)
            except InputError as error:
                reason = str(error)
        if size is None and not found.dense:
            problem = f"{path or 'the model'} ({type(module).__name__}): {reason}"
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be patched. {problem}. Use strict=False to leave "
                "the model dense, or kvarn_ops.KVCache in your own module."
            )
        packed = size is not None
        plan = found.plan if packed else None
        reports.append(CacheReport(len(reports), path, packed, reason, size, plan))
    if not reports:
        raise UnsupportedModelError(_nothing_found(model))
    return reports


def attach(model: nn.Module, record: PatchRecord) -> None:
    """Pack the caches named in the record."""
    done: list[nn.Module] = []
    try:
        for report in record.layers:
            if report.plan is not None:
                module = model.get_submodule(report.module)
                pack(module, report.plan, record.config, record.backend)
                done.append(module)
    except BaseException:
        for module in done:
            restore(module)
        raise
    record.handles.append(model.register_forward_pre_hook(_check_attached))
    model._kvarn_patch = record


def device_of(model: nn.Module) -> torch.device:
    """Device of the first cache buffer, else of the first parameter (CPU if there is none)."""
    for module in model.modules():
        for buffer in float_buffers(module).values():
            return buffer.device
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _check_attached(module: nn.Module, args: tuple[Any, ...]) -> None:
    if not is_compiling() and module._kvarn_patch.lost(module):
        _mention_lost(type(module).__name__)


@lru_cache(maxsize=8)
def _mention_lost(name: str) -> None:
    _logger.warning(
        "%s was given new caches after it was patched, which keep keys and values dense: call "
        "kvarn_ops.patch(model) again to pack them. (This is said once.)",
        name,
    )


def _nothing_found(model: nn.Module) -> str:
    name = type(model).__name__
    calls = list(dict.fromkeys(_missing_calls(model)))
    if calls:
        return (
            f"{name} has no KV cache yet: set the caches up first, then patch. Its method "
            f"{calls[0]} looks like the call to make."
        )
    return (
        f"{name} is not a Hugging Face model and has no module that keeps keys and values: a pair "
        "of floating buffers [B, H, T, D] or [B, T, H, D] of equal shape, and a method that writes "
        "new tokens into both and returns them. Caches that a model takes and returns (tuples, "
        "lists) stay the caller's. Use kvarn_ops.KVCache in your own attention module."
    )


def _missing_calls(model: nn.Module) -> Iterator[str]:
    """Calls of the model, else of its parts, that seem to make caches."""
    for path, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls in nn.Module.__mro__:
                continue
            for name, value in vars(cls).items():
                if callable(value) and _MAKES_CACHES.match(name):
                    wanted = [
                        parameter.name
                        for parameter in parameters_of(value) or ()
                        if parameter.default is REQUIRED
                    ]
                    yield f"{'.'.join(filter(None, ('model', path, name)))}({', '.join(wanted)})"
