"""What a chain of views and casts does to the axes of a tensor, without running it.

A tensor is written as the factors of its axes: a root `[B, H, T, D]` is `[b][h][t][d]`, repeated
heads are `[b][h, x2][t][d]` and tiled ones `[b][x2, h][t][d]`, where `x2` is a factor without a
source. A view regroups, permutes or adds factors, so that the order of heads is read off the
result. No tensor is made, whatever the size of the cache; unknown sizes become large primes, which
divide nothing by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kvarn_ops._compat import size_expression

__all__ = [
    *("Axes", "Factor", "Node", "Number", "Sizes", "Viewed"),
    *("number", "op_name", "value_of", "walk_views"),
]

Node = torch.fx.Node
Number = Any  # an int, or a sympy expression of sizes that are unknown

_REGROUP = {
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze"),
    *("view_as", "reshape_as", "alias", "clone", "contiguous", "detach"),
}
_CAST = {"to", "_to_copy", "type", "type_as", "float", "half", "bfloat16", "double"}
_PERMUTE = {"transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint"}
_EXPAND = {"expand", "expand_as", "broadcast_to"}
_REPEAT = {"repeat", "tile"}
_SLICE = {"slice", "narrow", "getitem"}
_KNOWN = _REGROUP | _CAST | _PERMUTE | _EXPAND | _REPEAT | _SLICE | {"repeat_interleave"}


class Factor(NamedTuple):
    """Part of an axis: `size` steps of `stride` along a root's axis, or copies (`axis` None)."""

    axis: int | None
    stride: int
    size: int


Axes = tuple[tuple[Factor, ...], ...]


@dataclass(frozen=True)
class Viewed:
    """A tensor as a view of `root`; `nodes` are the views and casts, the one next to it first."""

    root: Node
    whole: Axes  # of the root
    axes: Axes  # of the tensor
    nodes: tuple[Node, ...]


class Sizes:
    """Sizes as integers: unknown ones are replaced by primes, each by its own."""

    def __init__(self) -> None:
        self._primes: dict[Any, int] = {}

    def __call__(self, size: int | torch.SymInt) -> int:
        """One size."""
        expression = number(size)
        if isinstance(expression, int):
            return expression
        import sympy

        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self._primes:
                self._primes[symbol] = int(sympy.prime(10_000 + len(self._primes)))
        return int(expression.subs(self._primes))

    def of(self, node: Node) -> tuple[int, ...]:
        """The shape of a node's tensor."""
        return tuple(self(size) for size in value_of(node).shape)


def number(size: int | torch.SymInt) -> Number:
    """A size in a form that can be compared without adding a guard."""
    if isinstance(size, int):
        return size
    expression = size_expression(size)
    return int(expression) if expression.is_Integer else expression


def value_of(node: Any) -> Any:
    """The example tensor of a node; None if it has none."""
    if not isinstance(node, Node):
        return None
    value = node.meta.get("val", node.meta.get("example_value"))
    return value if isinstance(value, torch.Tensor) else None


def op_name(node: Node) -> str:
    """The bare name of an operation: `expand` for the method, the function and aten's overload."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__ if target.namespace == "aten" else ""
    return getattr(target, "__name__", "")


def walk_views(operand: Node, stop: Callable[[Node], bool] | None = None) -> Viewed:
    """Follow views and casts from `operand` back to what they are views of.

    Parameters
    ----------
    operand : torch.fx.Node
        A tensor of any rank, with its example value in `meta`, as have the nodes before it.
    stop : callable, optional
        Nodes at which to stop although they are views.
    """
    chain: list[Node] = []
    root = operand
    while not (stop is not None and stop(root)) and _may_be_view(root):
        chain.append(root)
        root = root.args[0]  # type: ignore[assignment]
    sizes = Sizes()
    whole = axes = _root_axes(sizes.of(root))
    nodes: list[Node] = []
    for node in reversed(chain):
        after = _view(node, axes, sizes)
        if after is None:  # not a view after all, or not one that can be followed
            whole = axes = _root_axes(sizes.of(node))
            root, nodes = node, []
        else:
            axes, nodes = after, [node, *nodes]
    return Viewed(root, whole, axes, tuple(nodes))


def _may_be_view(node: Node) -> bool:
    if op_name(node) not in _KNOWN or not node.args:
        return False
    new, old = value_of(node), value_of(node.args[0])
    return new is not None and old is not None and new.device == old.device


def _root_axes(shape: tuple[int, ...]) -> Axes:
    return tuple(_factors(Factor(axis, 1, size)) for axis, size in enumerate(shape))


def _factors(*factors: Factor) -> tuple[Factor, ...]:
    """Without factors of size 1, and with neighbours joined that are one run along an axis."""
    joined: list[Factor] = []
    for factor in factors:
        if factor.size == 1:
            continue
        last = joined[-1] if joined else None
        if last and last.axis == factor.axis and last.stride == factor.stride * factor.size:
            joined[-1] = Factor(factor.axis, factor.stride, last.size * factor.size)
        else:
            joined.append(factor)
    return tuple(joined)


def _view(node: Node, axes: Axes, sizes: Sizes) -> Axes | None:
    """The axes after one node; None if they cannot be told."""
    name, shape = op_name(node), sizes.of(node)
    if name in _CAST:
        return axes if len(shape) == len(axes) else None
    if name in _REGROUP:
        if value_of(node).dtype != value_of(node.args[0]).dtype:  # the view that reads other bits
            return None
        return _regroup(axes, shape)
    if name in _PERMUTE:
        return _permute(node, axes)
    if name in _EXPAND:
        return _expand(axes, shape)
    if name in _REPEAT:
        return _repeat(node, axes, sizes)
    if name == "repeat_interleave":
        return _repeat_interleave(node, axes, shape)
    return _slice(node, axes, shape)


def _regroup(axes: Axes, shape: tuple[int, ...]) -> Axes | None:
    rest = [factor for axis in axes for factor in axis][::-1]
    result = []
    for size in shape:
        axis: list[Factor] = []
        missing = size
        while missing > 1:
            if not rest:
                return None
            factor = rest.pop()
            if missing % factor.size == 0:
                missing //= factor.size
            elif factor.size % missing == 0:
                inner = factor.size // missing
                rest.append(Factor(factor.axis, factor.stride, inner))
                factor = Factor(factor.axis, factor.stride * inner, missing)
                missing = 1
            else:
                return None
            axis.append(factor)
        result.append(_factors(*axis))
    return None if rest else tuple(result)


def _permute(node: Node, axes: Axes) -> Axes | None:
    """The op itself says how, on a tensor without data whose strides tell its axes apart."""
    probe = torch.empty([2] * len(axes), device="meta")
    target: Any = node.target
    call = getattr(torch.Tensor, target) if node.op == "call_method" else target
    found = call(probe, *node.args[1:], **node.kwargs).stride()
    order = [probe.stride().index(stride) for stride in found]
    return tuple(axes[index] for index in order)


def _expand(axes: Axes, shape: tuple[int, ...]) -> Axes:
    axes = ((),) * (len(shape) - len(axes)) + axes
    return tuple(axis or _factors(_copies(size)) for axis, size in zip(axes, shape, strict=True))


def _copies(size: int) -> Factor:
    return Factor(None, 0, size)


def _repeat(node: Node, axes: Axes, sizes: Sizes) -> Axes | None:
    arguments: Any = node.args[1:]
    times = arguments[0] if arguments and isinstance(arguments[0], (list, tuple)) else arguments
    if node.kwargs or not times or not all(isinstance(n, int) and n > 0 for n in times):
        return None
    axes = ((),) * (len(times) - len(axes)) + axes
    times = (1,) * (len(axes) - len(times)) + tuple(times)
    return tuple(_factors(_copies(n), *axis) for n, axis in zip(times, axes, strict=True))


def _repeat_interleave(node: Node, axes: Axes, shape: tuple[int, ...]) -> Axes | None:
    given = dict(zip(("repeats", "dim"), node.args[1:])) | node.kwargs
    times, dim = given.get("repeats"), given.get("dim")
    if not isinstance(times, int) or not isinstance(dim, int) or times < 1:
        return None
    dim %= len(axes)
    return (*axes[:dim], _factors(*axes[dim], _copies(times)), *axes[dim + 1 :])


def _slice(node: Node, axes: Axes, shape: tuple[int, ...]) -> Axes | None:
    """A prefix of axes, or new axes of size 1."""
    if op_name(node) == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        kept = [item for item in index if item is not None and item is not Ellipsis]
        whole = all(isinstance(item, slice) and _from_start(item) for item in kept)
        if not whole:
            return None
        if None in index:
            return _regroup(axes, shape) if all(i == slice(None) for i in kept) else None
    elif op_name(node) == "narrow":
        given = dict(zip(("dim", "start"), node.args[1:])) | node.kwargs
        if given.get("start") != 0:
            return None
    else:
        given = dict(zip(("dim", "start", "end", "step"), node.args[1:])) | node.kwargs
        if given.get("start") not in (None, 0) or given.get("step", 1) not in (None, 1):
            return None
    result = []
    for axis, size in zip(axes, shape, strict=True):
        full = 1
        for factor in axis:
            full *= factor.size
        if size == full:
            result.append(axis)
        elif len(axis) == 1:
            result.append(_factors(axis[0]._replace(size=size)))
        else:
            return None
    return tuple(result)


def _from_start(item: slice) -> bool:
    return item.start in (None, 0) and item.step in (None, 1)
