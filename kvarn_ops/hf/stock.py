"""Whole-state operations on transformers' own cache layers (sliding, linear, ...).

A `KVarNCache` mixes such layers with packed ones and must copy, move, repeat and save them all.
Their classes differ in what they offer, so the state is taken as what it is: attributes that are
tensors, plain values, or containers of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._compat import mark_static
from ..errors import CacheError

__all__ = [
    "batch_size",
    "check_same_capacity",
    "copied",
    "repeat_rows",
    "select_rows",
    "tensors_of",
    "to_device",
    "to_plain",
    "update_from_plain",
]


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested containers; of a tensor that is made of tensors, its parts."""
    if isinstance(value, Tensor):
        if not hasattr(value, "__tensor_flatten__"):
            return [value]
        value = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def batch_size(layer: Any) -> int | None:
    """Rows of the layer's tensors; None before its first use."""
    rows = {tensor.shape[0] for tensor in tensors_of(vars(layer)) if tensor.ndim}
    if len(rows) > 1:
        raise CacheError(
            f"a {type(layer).__name__} holds tensors of {sorted(rows)} rows: its batch cannot be "
            "repeated or selected."
        )
    return rows.pop() if rows else None


def copied(layer: Any, copies: int = 1) -> Any:
    """A copy that shares no memory, with `copies` rows for each, side by side."""
    twin = copy.copy(layer)
    _replace_tensors(twin, Tensor.clone)
    if copies > 1:
        repeat_rows(twin, copies)
    return twin


def repeat_rows(layer: Any, repeats: int) -> None:
    """Repeat every batch row, side by side; the layer gets new memory."""
    if (rows := batch_size(layer)) is not None:
        _take_rows(layer, torch.arange(rows).repeat_interleave(repeats))


def select_rows(layer: Any, indices: Tensor) -> None:
    """Keep the batch rows `indices` (int64, or bool over all); the layer gets new memory."""
    if (rows := batch_size(layer)) is not None:
        _take_rows(layer, torch.arange(rows)[indices.cpu()])


def _take_rows(layer: Any, rows: Tensor) -> None:
    def take(tensor: Tensor) -> Tensor:
        return tensor.index_select(0, rows.to(tensor.device)) if tensor.ndim else tensor

    _replace_tensors(layer, take)
    if hasattr(layer, "batch_size"):
        layer.batch_size = len(rows)


def to_device(layer: Any, device: torch.device) -> None:
    """Move all tensors of a layer."""
    _replace_tensors(layer, lambda tensor: tensor.to(device))
    if getattr(layer, "device", None) is not None:
        layer.device = device


def _replace_tensors(layer: Any, change: Callable[[Tensor], Tensor]) -> None:
    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            new = change(value)
            mark_static(new)
            return new
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(walk(item) for item in value)
        return value

    for name, value in vars(layer).items():
        setattr(layer, name, walk(value))


def to_plain(layer: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Describe a layer's state in JSON types; its tensors go to `tensors` under `prefix`."""

    def walk(value: Any, path: str) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        if isinstance(value, Tensor):
            tensors[path] = value.detach().contiguous()
            return {"tensor": path}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": None}
        if isinstance(value, dict):
            return {"dict": [[key, walk(item, f"{path}.{key}")] for key, item in value.items()]}
        return None  # configs and the like: the model brings them

    state = {name: walk(value, f"{prefix}.{name}") for name, value in vars(layer).items()}
    return {name: value for name, value in state.items() if value is not None}


def update_from_plain(
    layer: Any, state: dict[str, Any], tensors: dict[str, Tensor], device: torch.device
) -> None:
    """Inverse of `to_plain`, into a layer that was just made.

    Raises
    ------
    CacheError
        If the layer was made for another capacity than the saved one.
    """

    def walk(value: dict[str, Any]) -> Any:
        ((kind, content),) = value.items()
        if kind == "tensor":
            tensor = tensors[content].to(device)
            mark_static(tensor)
            return tensor
        if kind == "dtype":
            return getattr(torch, content)
        if kind == "device":
            return device
        if kind == "dict":
            return {key: walk(item) for key, item in content}
        return content

    restored = {name: walk(value) for name, value in state.items()}
    check_same_capacity(layer, restored.get("max_cache_len"))
    for name, value in restored.items():
        setattr(layer, name, value)


def check_same_capacity(layer: Any, slots: int | None) -> None:
    """Raise `CacheError` if a dense layer was made for another number of slots."""
    made = getattr(layer, "max_cache_len", None)
    if made != slots:
        raise CacheError(
            f"a {type(layer).__name__} of this cache holds {slots} tokens and one of the asked "
            f"max_cache_len would hold {made}: use the same max_cache_len."
        )
