"""Small copies of a module to try things on, and what its code touches."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Subject", "alike", "float_buffers", "members", "same_state"]

# Ways to reach a buffer without writing its name.
_INDIRECT = {"__dict__", "_buffers", "buffers", "getattr", "named_buffers", "setattr", "vars"}
_MODULE_NAMES = frozenset(dir(nn.Module)) - {"forward"}
# Attributes that every module has.
_MODULE_STATE = frozenset(vars(nn.Module()))


def float_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The module's own floating tensors of four dimensions: buffers and plain attributes."""
    named = {**module._buffers, **vars(module)}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, Tensor)
        and not isinstance(value, nn.Parameter)
        and value.is_floating_point()
        and value.ndim == 4
    }


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Methods and properties that a class has beyond those of `nn.Module`, the nearest first."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if base in nn.Module.__mro__:
            continue
        for name, value in vars(base).items():
            if name in seen or name in _MODULE_NAMES:
                continue
            if isinstance(value, property) or inspect.isfunction(value):
                seen.add(name)
                yield name, value


class Subject:
    """A module with a pair of buffers, and copies of it whose buffers are small.

    Copies are on the CPU, with at most two rows of width two: nothing on a GPU is touched, where a
    bad index would be fatal. Weights are shared.
    """

    def __init__(self, module: nn.Module, names: tuple[str, str], full_size: bool = False) -> None:
        self.module, self.names = module, names
        self.cls = type(module)
        buffer = float_buffers(module)[names[0]]
        batch, width = buffer.shape[0], buffer.shape[3]
        if not full_size:
            batch, width = min(batch, 2), min(width, 2)
        self.shape = (batch, *buffer.shape[1:3], width)
        self.dtype = buffer.dtype
        self._noise = [torch.randn(self.shape).to(self.dtype) for _ in names]

    def copy(self, width: int | None = None) -> nn.Module:
        """A copy whose buffers hold noise; `width` 0 makes them hollow."""
        memo: dict[int, Any] = {id(weight): weight for weight in self.module.parameters()}
        held = float_buffers(self.module)
        for name, noise in zip(self.names, self._noise, strict=True):
            memo[id(held[name])] = noise[..., :width].clone()
        for module in self.module.modules():
            for tensor in [*module._buffers.values(), *vars(module).values()]:
                if isinstance(tensor, Tensor) and id(tensor) not in memo:
                    memo[id(tensor)] = tensor.detach().clone().cpu()
        return copy.deepcopy(self.module, memo)

    def buffers(self, instance: nn.Module) -> tuple[Tensor, Tensor]:
        """The pair of a copy, as it is now."""
        first, second = (getattr(instance, name) for name in self.names)
        return first, second

    def state(self, instance: nn.Module) -> dict[str, Any]:
        """Everything a copy holds besides the pair, to be compared with `same_state`."""
        return _state(instance, self.names)

    def touching(self, *names: str) -> set[str]:
        """Methods and properties whose code mentions one of the names, or none at all."""
        wanted = set(names) | _INDIRECT
        found = set()
        for name, value in members(self.cls):
            if any(wanted & set(_mentioned(code)) for code in self._codes(name, value)):
                found.add(name)
        return found

    def reaching(self, *names: str) -> set[str]:
        """Like `touching`, also through other methods of the module."""
        found: set[str] = set()
        while True:
            more = self.touching(*names, *found)
            if more == found:
                return found
            found = more

    def _codes(self, name: str, value: Any) -> Iterator[CodeType]:
        """The code of a member, in all classes that define it (`super()`)."""
        for base in self.cls.__mro__:
            if base in nn.Module.__mro__ or name not in vars(base):
                continue
            own = vars(base)[name]
            parts = (own.fget, own.fset) if isinstance(own, property) else (own,)
            for part in parts:
                function: Callable[..., Any] | None = part and inspect.unwrap(part)
                if inspect.isfunction(function):
                    yield function.__code__


def alike(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules differ in nothing but weights and contents of their buffers."""
    buffers = [float_buffers(module) for module in (first, second)]
    kinds = [{name: (x.shape, x.dtype, x.device) for name, x in held.items()} for held in buffers]
    if type(first) is not type(second) or kinds[0] != kinds[1]:
        return False
    return same_state(*(_state(module, tuple(kinds[0])) for module in (first, second)))


def _state(instance: nn.Module, besides: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, module in instance.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in _MODULE_STATE}
        for name, value in {**module._buffers, **own}.items():
            if path or name not in besides:
                kept = value.clone() if isinstance(value, Tensor) else copy.copy(value)
                found[f"{path}.{name}"] = kept
    return found


def same_state(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether two results of `Subject.state` are equal, as far as can be told."""
    if before.keys() != after.keys():
        return False
    for key, old in before.items():
        new = after[key]
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            equal = old.shape == new.shape and torch.equal(old, new)
        else:
            try:
                equal = old is new or bool(old == new)
            except (RuntimeError, TypeError, ValueError):
                equal = False
        if not equal:
            return False
    return True


def _mentioned(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _mentioned(constant)
