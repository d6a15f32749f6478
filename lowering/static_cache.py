"""Find static dense caches: buffers to which a functional graph writes a few tokens.

    index_copy(cache, 2, positions, k)                           index_copy_
    index_put(cache, [None, None, positions], k)                 cache[:, :, positions] = k
    slice_scatter(cache, k, 2, start, stop)                      cache[:, :, start:stop] = k
    select_scatter(cache, k, 2, start)                           cache[:, :, start] = k
    cat([cache[:, :, :start], k, cache[:, :, stop:]], 2)
    cat([cache[:, :, count:], k], 2)                             the newest tokens last

each also on the first rows `cache[:rows]` alone, in any layout with four axes, followed by
`copy_(cache, result)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .axes import Node, Number, number, op_name, value_of
from .cache_region import (
    Refused,
    Slice,
    normal,
    number_of,
    region_of,
    slice_arguments,
    slices,
)

__all__ = ["CacheWrite", "find_caches"]


@dataclass(frozen=True)
class CacheWrite:
    """One buffer and the tokens that a graph writes to it."""

    buffer: Node  # get_attr
    store: Node  # copy_(buffer, result)
    result: Node  # the whole buffer after the write
    part: Node | None  # the written rows after the write, if they are not all
    views: frozenset[Node]  # the write's own nodes
    tokens: Node  # what is written, in the buffer's layout; see `lacks_axis`
    axis: int  # of the tokens, in the buffer
    position: Node | int | None  # index tensor [S], or the first slot; None: see `shifts`
    rows: Node | int | None = None  # how many of the first rows; None: all
    lacks_axis: bool = False  # one token, written without its axis

    @property
    def name(self) -> str:
        """The buffer's name in the program."""
        return str(self.buffer.target)

    @property
    def layout(self) -> tuple[int, int, int, int]:
        """Which axes of the buffer are batch, head, token and channel."""
        batch, head, channel = (axis for axis in range(4) if axis != self.axis)
        return (batch, head, self.axis, channel)

    def holds(self, node: Node) -> bool:
        """Whether a node is the cache after the write: all of it, or the rows that are written."""
        if self.rows is None:
            return node is self.result
        if node is self.part:
            return True
        if op_name(node) != "slice" or node.args[0] is not self.result:
            return False
        try:
            axis, start, stop = slice_arguments(node)
        except Refused:
            return False
        first = axis == 0 and start in (None, 0) and stop is not None
        return first and number_of(stop) == number_of(self.rows)

    @property
    def shifts(self) -> bool:
        """Whether all tokens move to make room for the new ones, which are the last."""
        return self.position is None

    @property
    def missing(self) -> int:
        """Leading axes of size 1 that the tokens lack: an assignment drops them."""
        return (3 if self.lacks_axis else 4) - value_of(self.tokens).ndim

    @property
    def count(self) -> Any:
        """How many tokens are written, an int or SymInt."""
        if self.lacks_axis or self.axis < self.missing:
            return 1
        return value_of(self.tokens).shape[self.axis - self.missing]


def find_caches(graph: torch.fx.Graph) -> tuple[list[CacheWrite], dict[str, str]]:
    """All recognised caches, and for other buffers with four axes that change, why they are none.

    Parameters
    ----------
    graph : torch.fx.Graph
        Functional except for `copy_(buffer, result)`, as `ExportedProgram.module()` gives it.
    """
    found, refused = [], {}
    for store in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        buffer = store.args[0]
        value = value_of(buffer)
        if buffer.op != "get_attr" or value.ndim != 4 or not value.is_floating_point():
            continue
        try:
            found.append(_cache(buffer, store))
        except Refused as error:
            refused[str(buffer.target)] = str(error)
    return found, refused


def _cache(buffer: Node, store: Node) -> CacheWrite:
    write = _parse(store.args[1], buffer, ())
    write = replace(write, store=store)
    if write.axis == 0:
        raise Refused("tokens lie along axis 0, where a batch is expected")
    wanted: list[Any] = list(value_of(buffer).shape)
    if write.rows is not None:
        wanted[0] = write.rows
    wanted[write.axis] = write.count
    if write.lacks_axis:
        del wanted[write.axis]
    given = value_of(write.tokens).shape
    padded = [1] * write.missing + [number(size) for size in given]
    if padded != [number_of(size) for size in wanted]:
        raise Refused(f"{tuple(given)} is written where {tuple(wanted)} fits")
    for user in store.users:  # what is returned of the buffer itself
        raise Refused(f"it is also read by {user.name}")
    for user in buffer.users:
        if user is not store and user not in write.views:
            raise Refused(f"it is read before it is written, by {user.name}")
    return write


def _parse(result: Any, buffer: Node, region: tuple[Slice, ...]) -> CacheWrite:
    """The write that makes `result` of the part `region` of `buffer`."""
    name = op_name(result) if isinstance(result, Node) else ""
    parser = {
        "index_copy": _index_copy,
        "index_put": _index_put,
        "slice_scatter": _slice_scatter,
        "select_scatter": _select_scatter,
        "cat": _cat,
    }.get(name)
    if parser is None:
        raise Refused(f"it is written by {name or result}, which is not a recognised write")
    return parser(result, buffer, region)


def _write(
    result: Node,
    buffer: Node,
    region: tuple[Slice, ...],
    tokens: Any,
    axis: int,
    position: Any,
    views: tuple[Node, ...],
    lacks_axis: bool = False,
) -> CacheWrite:
    rows = None
    for where, start, stop in region:
        if where != 0 or start != 0 or rows is not None:
            raise Refused("it is written in a part that is not its first rows")
        rows = stop
    count = None if rows is None else _row_count(views, rows)
    part = None if rows is None else result
    return CacheWrite(
        buffer, result, result, part, frozenset({result, *views}), tokens, axis % 4, position,
        count, lacks_axis,
    )  # fmt: skip


def _row_count(views: tuple[Node, ...], rows: Number) -> Any:
    """The node or integer whose value is the number of rows."""
    if isinstance(rows, int):
        return rows
    for node in views:
        while op_name(node) == "slice":
            given = slice_arguments(node)
            if given[0] == 0 and number_of(given[2]) == rows:
                return given[2]
            node = node.args[0]
    raise Refused("the number of rows that are written is not in the graph")


def _index_copy(result: Node, buffer: Node, region: tuple[Slice, ...]) -> CacheWrite:
    target, axis, position, tokens = result.args[:4]
    views = _same_part(target, buffer, region)
    if value_of(position).ndim != 1:
        raise Refused("index_copy has an index that is not a vector")
    return _write(result, buffer, region, tokens, axis, position, views)


def _index_put(result: Node, buffer: Node, region: tuple[Slice, ...]) -> CacheWrite:
    target, indices, tokens, *accumulate = result.args
    views = _same_part(target, buffer, region)
    used = [axis for axis, index in enumerate(indices) if index is not None]
    if len(used) != 1 or any(accumulate) or result.kwargs.get("accumulate"):
        raise Refused("it is written at more than one axis, or added to")
    position = indices[used[0]]
    index = value_of(position)
    if index.dtype not in (torch.int64, torch.int32) or index.ndim != 1:
        raise Refused(f"its index {position.name} is {index.dtype} with {index.ndim} axes")
    return _write(result, buffer, region, tokens, used[0], position, views)


def _slice_scatter(result: Node, buffer: Node, region: tuple[Slice, ...]) -> CacheWrite:
    target, source = result.args[:2]
    axis, start, stop = slice_arguments(result, 2)
    views = _same_part(target, buffer, region)
    part = normal(buffer, axis, start, stop)
    inner = (*region, part) if part else region
    if op_name(source) in ("index_copy", "index_put", "slice_scatter", "select_scatter", "cat"):
        write = _parse(source, buffer, inner)
        return replace(write, result=result, views=write.views | {result, *views})
    if part is None or (axis == 0 and part[1] == 0):
        raise Refused("it is overwritten whole")
    tokens, own = _new_data(source, buffer, inner)
    start = start if isinstance(start, Node) else part[1]
    return _write(result, buffer, region, tokens, axis, start, (*views, *own))


def _select_scatter(result: Node, buffer: Node, region: tuple[Slice, ...]) -> CacheWrite:
    target, source, axis, start = result.args[:4]
    views = _same_part(target, buffer, region)
    own: tuple[Node, ...] = ()
    if op_name(source) == "copy":
        own = (source, source.args[0])
        source = source.args[1]
    return _write(result, buffer, region, source, axis, start, (*views, *own), lacks_axis=True)


def _cat(result: Node, buffer: Node, region: tuple[Slice, ...]) -> CacheWrite:
    parts = list(result.args[0])
    axis = result.args[1] if len(result.args) > 1 else result.kwargs.get("dim", 0)
    axis %= 4
    old = [region_of(part, buffer) for part in parts]
    new = [part for part, where in zip(parts, old) if where is None]
    if len(new) != 1 or len(parts) > 3:
        raise Refused("it is written by a cat that is not old, new and old tokens")
    at = parts.index(new[0])
    count = number(value_of(new[0]).shape[axis])
    position: Any = 0
    begin: Number = 0
    if at == 1:
        where = old[0]
        if len(parts) == 2 and where == (*region, (axis, count, None)):
            views = slices(parts[0], buffer)
            return _write(result, buffer, region, new[0], axis, None, views)
        if where is None or where[:-1] != region or where[-1][:2] != (axis, 0):
            raise Refused("the old tokens of its cat are not the first ones")
        begin, position = where[-1][2], slice_arguments(parts[0])[2]
    if at + 1 < len(parts) and old[at + 1] != (*region, (axis, begin + count, None)):
        raise Refused("the new tokens of its cat do not replace as many old ones")
    views = tuple(view for part in parts if part is not new[0] for view in slices(part, buffer))
    return _write(result, buffer, region, new[0], axis, position, views)


def _new_data(source: Node, buffer: Node, region: tuple[Slice, ...]) -> tuple[Node, tuple]:
    """What is written, without the `copy` onto the old contents that a slice assignment adds."""
    if op_name(source) != "copy":
        return source, ()
    target = source.args[0]
    return source.args[1], (source, *_same_part(target, buffer, region))


def _same_part(target: Any, buffer: Node, region: tuple[Slice, ...]) -> tuple[Node, ...]:
    if region_of(target, buffer) != region:
        raise Refused(f"{target} is not the part of it that is written")
    return slices(target, buffer)
