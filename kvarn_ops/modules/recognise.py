"""Is a module a KV cache? Decided from what its methods do to its buffers, never from names."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from .plan import REQUIRED, Plan, Update, parameters_of
from .probe import MIN_TOKENS, Found, NotAnUpdate, call, positions, try_method
from .subject import Subject, float_buffers, members

__all__ = ["Finding", "recognise"]

_MAX_BUFFERS = 4  # of one shape, in one module


@dataclass(frozen=True)
class Finding:
    """What a module with a pair of buffers is: a cache with a plan, or why there is none.

    `dense` marks a window, whose memory does not grow with the context.
    """

    plan: Plan | None
    reason: str
    dense: bool = False


def recognise(module: nn.Module) -> Finding | None:
    """Examine one module; None if it holds nothing like a KV cache. The module is not changed."""
    wrong: Finding | None = None
    held = float_buffers(module)
    for names in _pairs(held):
        finding = _examine(module, names)
        if finding.plan is not None or finding.dense:
            return finding
        if wrong is None and _looks_like_a_cache(held[names[0]], held[names[1]]):
            wrong = finding
    return wrong


def _pairs(held: dict[str, Tensor]) -> list[tuple[str, str]]:
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in held.items():
        groups.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(name)
    return [
        pair
        for (shape, *_), group in groups.items()
        if max(shape[1], shape[2]) >= MIN_TOKENS  # type: ignore[index]
        for pair in combinations(group[:_MAX_BUFFERS], 2)
    ]


def _looks_like_a_cache(first: Tensor, second: Tensor) -> bool:
    """Tables of sines and cosines also come in pairs, but for one row and one head, and not 0."""
    batch, one, other, _ = first.shape
    if batch * min(one, other) > 1 or first.is_meta:
        return True
    return not bool(first.any()) and not bool(second.any())


def _examine(module: nn.Module, names: tuple[str, str]) -> Finding:
    buffer = float_buffers(module)[names[0]]
    what = f"buffers {names[0]!r} and {names[1]!r} {tuple(buffer.shape)}"
    if buffer.is_meta:
        return Finding(None, f"{what} are on the meta device: materialize the model first")
    if buffer.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return Finding(None, f"{what} are {buffer.dtype}: float16, bfloat16, float32 can be packed")
    if isinstance(module, torch.jit.ScriptModule):
        return Finding(None, f"{what} belong to a scripted module, whose code cannot be replaced")
    tried: dict[str, str] = {}
    for full_size in (False, True):
        subject = Subject(module, names, full_size)
        found: list[Found] = []
        for name, function in _candidates(subject):
            try:
                found.append(try_method(subject, name, function))
            except NotAnUpdate as wrong:
                if wrong.dense:
                    return Finding(None, f"dense by design: {what}: {name}(): {wrong}", dense=True)
                if parameters_of(function) != ():
                    tried[name] = str(wrong)
            except Exception as error:  # deepcopy of a module can fail in any way
                return Finding(None, f"{what} cannot be copied ({type(error).__name__}: {error})")
        if found:
            return _plan(subject, found, what)
    attempts = "; ".join(f"{name}(): {reason}" for name, reason in tried.items())
    return Finding(
        None,
        f"{what} look like a KV cache, but no method was seen to write keys and values into both "
        f"and to return them. Tried: {attempts or 'no method of the module uses them'}",
    )


def _candidates(subject: Subject) -> list[tuple[str, object]]:
    reached = subject.reaching(*subject.names)
    return [
        (name, value)
        for name, value in members(subject.cls)
        if name in reached and inspect.isfunction(value) and not name.startswith("__")
    ]


def _plan(subject: Subject, found: list[Found], what: str) -> Finding:
    first = found[0]
    for other in found[1:]:
        if (other.swapped, other.buffers_heads_first) != (first.swapped, first.buffers_heads_first):
            names = f"{first.update.name}() and {other.update.name}()"
            return Finding(None, f"{what}: {names} use the buffers in different layouts")
    keys, values = subject.names[::-1] if first.swapped else subject.names
    updates = tuple(each.update for each in found)
    resets, refused = [], []
    for name, value in _candidates(subject):
        if any(update.name == name for update in updates):
            continue
        kind = _kind(subject, name, value, first)
        if kind == "reset":
            resets.append(name)
        elif kind == "unknown":
            if name == "forward":
                return Finding(None, f"{what}: forward() also writes to them, not understood how")
            refused.append(name)
    plan = Plan(keys, values, first.buffers_heads_first, updates, tuple(resets), tuple(refused))
    return Finding(plan, f"packed, through {_form(updates[0])}")


def _form(update: Update) -> str:
    return f"{update.name}({', '.join(parameter.name for parameter in update.parameters)})"


def _kind(subject: Subject, name: str, function: object, found: Found) -> str:
    """What a method does that is no update: `reads`, `reset` or `unknown`."""
    if name not in subject.touching(*subject.names):
        return "reads"  # at most through other methods, which are replaced
    parameters = parameters_of(function)
    if parameters is None or any(each.default is REQUIRED for each in parameters):
        return "unknown"
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        instance = subject.copy()
        try:
            _write(subject, instance, found, 3)
            before = [buffer.clone() for buffer in subject.buffers(instance)]
            getattr(instance, name)()
            after = subject.buffers(instance)
            if all(torch.equal(old, new) for old, new in zip(before, after, strict=True)):
                return "reads"
            if any(bool(buffer.any()) for buffer in after):
                return "unknown"
            _write(subject, instance, found, 1)
        except Exception:
            return "unknown"
        after = subject.buffers(instance)
        view = [each if found.buffers_heads_first else each.transpose(1, 2) for each in after]
        if any(not bool(each[:, :, 0].any()) or bool(each[:, :, 1:].any()) for each in view):
            return "unknown"  # emptied, but it still counts from where it was
    return "reset"


def _write(subject: Subject, instance: nn.Module, found: Found, count: int) -> None:
    batch, heads, _, width = subject.shape
    if not found.buffers_heads_first:
        heads = subject.shape[2]
    shape = (batch, heads, count, width)
    if not found.update.heads_first:
        shape = (batch, count, heads, width)
    noise = [torch.randn(shape).to(subject.dtype) for _ in range(2)]
    call(instance, found.update, *noise, positions(found.form, 0, count, batch))
