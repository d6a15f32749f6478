"""Which part of a buffer a chain of slices is."""

from __future__ import annotations

from typing import Any

from .axes import Node, Number, number, op_name, value_of

__all__ = ["Refused", "Slice", "normal", "number_of", "region_of", "slice_arguments", "slices"]

Slice = tuple[int, Number, Number | None]  # axis, start, stop (None: to the end)


class Refused(Exception):
    """Why a buffer is not a cache that can be packed."""


def slices(node: Node, buffer: Node) -> tuple[Node, ...]:
    """The nodes of a chain of slices, without the buffer."""
    views = []
    while node is not buffer:
        views.append(node)
        node = node.args[0]
    return tuple(views)


def region_of(node: Any, buffer: Node) -> tuple[Slice, ...] | None:
    """Which part of the buffer a chain of slices is; None if it is something else."""
    parts: list[Slice] = []
    while node is not buffer:
        if not isinstance(node, Node) or op_name(node) != "slice":
            return None
        axis, start, stop = slice_arguments(node)
        part = normal(buffer, axis, start, stop)
        if part:
            parts.insert(0, part)
        node = node.args[0]
    return tuple(parts)


def slice_arguments(node: Node, skip: int = 1) -> tuple[int, Any, Any]:
    """Axis, start and stop of a node that slices, whose arguments begin at `skip`."""
    names = ("dim", "start", "end", "step")
    given = dict(zip(names, node.args[skip:])) | node.kwargs
    if given.get("step", 1) not in (None, 1):
        raise Refused(f"{node.name} has a step")
    return given.get("dim", 0) % 4, given.get("start"), given.get("end")


def normal(buffer: Node, axis: int, start: Any, stop: Any) -> Slice | None:
    """A slice with its numbers; None if it is everything."""
    size = value_of(buffer).shape[axis]
    begin = 0 if start is None else number_of(start)
    end = None if stop is None else number_of(stop)
    if isinstance(begin, int) and begin < 0:
        begin += size
    if isinstance(end, int):
        end = end + size if end < 0 else end
        end = None if end >= size else end
    return None if begin == 0 and end is None else (axis, begin, end)


def number_of(argument: Any) -> Number:
    """The value of an argument that is an integer, or a node that gives one."""
    return number(argument.meta["val"] if isinstance(argument, Node) else argument)
