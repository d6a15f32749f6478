"""Run the part of a program that depends on positions alone.

Masks, written slots and lengths are computed from an input (or a counter that the program keeps)
that says where the new tokens go. To prove something about them, that part is run with real
tensors, one position after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from kvarn_ops._compat import is_unbacked, size_expression

from .axes import Node, number, op_name, value_of

__all__ = ["Evaluator", "Sources", "attribute", "remove_attribute", "size_at"]

_INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Sources:
    """What some nodes depend on, apart from constants and sizes."""

    positions: frozenset[Node]  # integer inputs and integer buffers that change
    unknown: frozenset[str]  # everything else

    @property
    def single(self) -> Node | None:
        """The position, if there is exactly one."""
        return next(iter(self.positions)) if len(self.positions) == 1 else None


class Evaluator:
    """Values of nodes of one program at a given position."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self._module = module
        self._changing = {
            node.args[0].target
            for node in module.graph.find_nodes(
                op="call_function", target=torch.ops.aten.copy_.default
            )
            if isinstance(node.args[0], Node) and node.args[0].op == "get_attr"
        }
        self._inputs = {
            size_expression(node.meta["val"]): node
            for node in module.graph.find_nodes(op="placeholder")
            if isinstance(node.meta.get("val"), torch.SymInt)
        }
        self._plans: dict[Any, tuple[list[Node], dict[Node, Any]]] = {}
        self._signatures: dict[Node, int] = {}
        self._numbers: dict[Any, int] = {}
        self._order = {node: index for index, node in enumerate(module.graph.nodes)}

    def sources(self, nodes: Iterable[Any]) -> Sources:
        """What `nodes` depend on."""
        positions: set[Node] = set()
        unknown: set[str] = set()
        for node in self._closure(nodes):
            if _is_size(node):
                symbols = size_expression(node.meta["val"]).free_symbols
                positions |= {self._inputs[symbol] for symbol in symbols & self._inputs.keys()}
            elif node.op == "get_attr":
                if node.target not in self._changing:
                    continue
                value = value_of(node)
                if value is not None and value.dtype in _INTEGERS:
                    positions.add(node)
                else:
                    unknown.add(node.name)
            elif node.op == "placeholder":
                value = value_of(node)
                if value is not None and value.dtype in _INTEGERS:
                    positions.add(node)
                else:
                    unknown.add(node.name)
        return Sources(frozenset(positions), frozenset(unknown))

    def __call__(
        self,
        wanted: dict[str, Any],
        source: Node | None,
        position: int,
        sizes: dict[Any, int],
        disturb: int = 0,
    ) -> dict[str, Any]:
        """Values of the `wanted` nodes; what is no node is its own value.

        Parameters
        ----------
        source : Node, optional
            Gets `position, position + 1, ...` along its last axis.
        sizes : dict
            Value of each unknown size, by its sympy symbol.
        disturb : int
            Added to every element of the source but the first.
        """
        sizes = dict(sizes)
        if source is not None and isinstance(source.meta.get("val"), torch.SymInt):
            sizes[size_expression(source.meta["val"])] = position
        nodes = tuple(node for node in wanted.values() if isinstance(node, Node))
        if (nodes, source) not in self._plans:
            self._plans[nodes, source] = self._plan(nodes, source)
        changing, constants = self._plans[nodes, source]
        values = dict(constants)
        for node in changing:
            values[node] = self._value(node, source, position, sizes, values, disturb)
        return {
            name: values[node] if isinstance(node, Node) else node for name, node in wanted.items()
        }

    def signature(self, node: Any) -> int:
        """The same number for nodes that compute the same, in whatever layer they are."""
        if not isinstance(node, Node):
            return self._numbers.setdefault(("constant", repr(node)), len(self._numbers))
        if node in self._signatures:
            return self._signatures[node]
        key: Any = node
        if _is_size(node):
            key = ("size", size_expression(node.meta["val"]))
        elif op_name(node) == "copy":
            example = value_of(node)
            shape = tuple(number(size) for size in example.shape)
            key = ("copy", shape, example.dtype, self.signature(node.args[1]))
        elif node.op == "call_function":
            given = (node.args, dict(node.kwargs))
            arguments = torch.fx.map_arg(given, lambda one: f"%{self.signature(one)}")
            key = (node.target, repr(arguments))
        self._signatures[node] = self._numbers.setdefault(key, len(self._numbers))
        return self._signatures[node]

    def _plan(
        self, wanted: Iterable[Node], source: Node | None
    ) -> tuple[list[Node], dict[Node, Any]]:
        """Nodes to run at every position, in order, and the values of those that never change."""
        changing: list[Node] = []
        constants: dict[Node, Any] = {}
        for node in sorted(self._closure(wanted), key=self._order.__getitem__):
            moves = node is source or _is_size(node) or op_name(node) == "copy"
            if moves or any(one not in constants for one in node.all_input_nodes):
                changing.append(node)
            else:
                constants[node] = self._value(node, source, 0, {}, constants, 0)
        return changing, constants

    def _closure(self, nodes: Iterable[Any]) -> set[Node]:
        seen: set[Node] = set()
        stack = [node for node in nodes if isinstance(node, Node)]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if not _is_size(node):
                stack.extend([node.args[1]] if op_name(node) == "copy" else node.all_input_nodes)
        return seen

    def _value(
        self,
        node: Node,
        source: Node | None,
        position: int,
        sizes: dict[Any, int],
        values: dict[Node, Any],
        disturb: int,
    ) -> Any:
        if _is_size(node):
            return size_at(node.meta["val"], sizes)
        if node is source:
            example = value_of(node)
            shape = [size_at(size, sizes) for size in example.shape]
            where = {"dtype": example.dtype, "device": example.device}
            given = torch.full(shape, position, **where)
            if given.numel() > 1:
                given += torch.arange(shape[-1], **where)
                given.view(-1)[1:] += disturb
            return given
        if node.op == "get_attr":
            return attribute(self._module, str(node.target))
        if op_name(node) == "copy":  # of its target, only shape and dtype matter
            example = value_of(node)
            shape = [size_at(size, sizes) for size in example.shape]
            return values[node.args[1]].to(example.dtype).expand(shape)
        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        target: Any = node.target
        return target(*args, **kwargs)


def attribute(module: Any, path: str) -> Any:
    """The parameter, buffer or submodule at a dotted path."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def remove_attribute(module: Any, path: str) -> None:
    """Delete the parameter, buffer or submodule at a dotted path."""
    owner, _, leaf = path.rpartition(".")
    delattr(attribute(module, owner) if owner else module, leaf)


def _is_size(node: Node) -> bool:
    """Whether a node is a number that is known from the sizes of the inputs."""
    value = node.meta.get("val")
    return isinstance(value, torch.SymInt) and not is_unbacked(value)


def size_at(size: Any, sizes: dict[Any, int]) -> int:
    """A size for given values of its symbols."""
    if isinstance(size, int):
        return size
    return int(size_expression(size).subs(sizes))
