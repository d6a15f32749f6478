"""Find whole-cache copies in a compiled graph, and say what causes them."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator

import torch

from kvarn_ops._compat import auto_functionalized_v2, bases_to_clone, hint_of
from kvarn_ops.layout import CODE_FIELDS, TileCache

from . import record
from .graph import kvarn_op, module_path, place
from .record import CacheCopy

__all__ = ["FindCopies", "find_copies"]

Node = torch.fx.Node

_logger = logging.getLogger("kvarn_ops")

_aten = torch.ops.aten
_VIEWS = (_aten.view, _aten.slice, _aten.select, _aten.permute, _aten.expand, _aten.as_strided)


class FindCopies:
    """Report copies of cache buffers that are at least as large as the smaller code buffer.

    Inductor turns a functional append back into one in place, unless it cannot prove that nobody
    needs the old content; it then copies the buffer, whole, in every call. This pass asks
    Inductor's own analysis, on a copy of the graph, and names who reads what. Copies that code
    generation makes to change the strides of an argument come later, and are not seen.

    Before: any graph
    After:  the same graph
    """

    def __call__(self, graph: torch.fx.Graph) -> int:
        """Look at one functional graph; return 0."""
        copies = find_copies(graph)
        if copies:
            _logger.warning(
                "compiled code copies %d cache buffers, for example %s", len(copies), copies[0]
            )
        record.note_copies(copies)
        return 0


def find_copies(graph: torch.fx.Graph) -> list[CacheCopy]:
    """Copies of cache buffers in a functional graph with its write-backs, `copy_(input, value)`."""
    writes = {
        node: _bases(node)
        for node in graph.find_nodes(op="call_function", target=auto_functionalized_v2)
        if kvarn_op(node) is not None
    }
    names = {base: name for bases in writes.values() for base, name in bases}
    sizes = [_bytes(base) for base, name in names.items() if name in CODE_FIELDS]
    least = min((size for size in sizes if size), default=None)
    if least is None:
        return []
    order = {node: index for index, node in enumerate(graph.nodes)}
    for write, bases in writes.items():
        for index, (_, name) in enumerate(bases):
            names |= dict.fromkeys(_results(write, index), name)
    found = []
    for write, index in bases_to_clone(graph):
        if write in writes:
            base, name = writes[write][index]
            if name and _bytes(base) >= least:
                cause = _why_not_in_place(write, index, base, order)
                found.append(CacheCopy(name, _bytes(base), module_path(write), cause))
    for node in graph.nodes:
        name = _name_of_copied(node, names)
        if name and _bytes(node) >= least:
            cause = f"the program copies it, {place(node)}"
            found.append(CacheCopy(name, _bytes(node), module_path(node), cause))
    return found


def _bases(write: Node) -> list[tuple[Node, str]]:
    """Tensors that a functionalized op writes, with the cache's name for them, "" for others."""
    found: list[tuple[Node, str]] = [(base, "") for base in write.kwargs["_all_bases"]]  # type: ignore[union-attr]
    for name in TileCache._fields:
        index = write.kwargs.get(f"_{name}_base_index")
        if isinstance(index, int):
            found[index] = (found[index][0], name)
    return found


def _why_not_in_place(write: Node, index: int, base: Node, order: dict[Node, int]) -> str:
    """Who needs the old content of a buffer after the op that writes it."""
    late = [node for node in _readers(base) if order[node] > order[write]]
    if late:
        new = [node for result in _results(write, index) for node in _readers(result)]
        text = f"its content before the write is needed after it, by {place(late[0])}"
        return f"{text}; the new content by {place(new[0])}" if new else text
    written_back = any(user.target is _aten.copy_.default for user in base.users)
    if base.op in ("placeholder", "get_attr") and not written_back:
        return "the program keeps the old content: the new one is not written back to the buffer"
    if base.op not in ("placeholder", "get_attr"):
        return f"it is a part of another tensor ({base.name}): give every layer its own buffers"
    return "Inductor cannot prove that nobody needs its old content"


def _results(write: Node, index: int) -> list[Node]:
    """The new content of a base: behind the op's own results, or a single None for no results."""
    op = write.args[0]
    assert isinstance(op, torch._ops.OpOverload)
    position = max(1, len(op._schema.returns)) + index
    users = write.users
    return [u for u in users if u.target is operator.getitem and u.args[1] == position]


def _readers(node: Node) -> Iterator[Node]:
    """Who computes with a tensor or a view of it; not who overwrites or returns it."""
    for user in node.users:
        if getattr(user.target, "overloadpacket", None) in _VIEWS:
            yield from _readers(user)
        elif user.op != "output" and user.target is not _aten.copy_.default:
            yield user


def _name_of_copied(node: Node, names: dict[Node, str]) -> str:
    """Name of the buffer that a node copies in memory, "" if none.

    A clone is one if somebody takes it as a tensor of its own: code generation computes the others
    on the fly.
    """
    if node.target is not _aten.clone.default:
        return ""
    source = node.args[0]
    while isinstance(source, Node) and getattr(source.target, "overloadpacket", None) in _VIEWS:
        source = source.args[0]
    if not isinstance(source, Node) or not names.get(source):
        return ""
    taken = any(
        user.op == "output" or not str(user.target).startswith(("aten", "prims"))
        for user in node.users
    )
    return names[source] if taken else ""


def _bytes(node: Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    return hint_of(value.numel()) * value.element_size()
