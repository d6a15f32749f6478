"""An exported program as a module that can be rewritten, and back."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from kvarn_ops._compat import size_expression
from kvarn_ops.errors import UnsupportedModelError, reason

from .axes import Node
from .evaluate import attribute, remove_attribute

__all__ = ["exported_again", "opened", "ranges_of"]


def opened(program: ExportedProgram) -> tuple[ExportedProgram, torch.fx.GraphModule]:
    """The program without mutation of inputs and views, and its module with buffers.

    Raises
    ------
    UnsupportedModelError
        If torch cannot make the program functional.
    """
    try:
        functional = _merged(program).run_decompositions({})
        module = functional.module()
    except Exception as error:
        raise UnsupportedModelError(
            f"this program cannot be made functional: torch says {reason(error)!r}. Export the "
            "model with strict=True, or register each cache as a buffer where it is made."
        ) from error
    _without_checks(module)
    return functional, module


def _without_checks(module: torch.fx.GraphModule) -> None:
    """Without checks of inputs, dtypes and devices, which exporting again adds anew."""
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            module.graph.erase_node(node)
            delattr(module, "_guards_fn")
        elif node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)


def _merged(program: ExportedProgram) -> ExportedProgram:
    """The program with one name for each tensor.

    Export with `strict=False` lifts a tensor twice that is both a buffer and an attribute of a
    plain object such as a cache; torch cannot make such a program functional.
    """
    module = program.module()
    first: dict[Any, Node] = {}
    merged = False
    for node in module.graph.find_nodes(op="get_attr"):
        tensor = attribute(module, str(node.target))
        if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
            continue
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        other = first.setdefault(key, node)
        if other is not node and other.target != node.target:
            names = sorted((other, node), key=lambda one: "lifted_tensor" in str(one.target))
            names[1].replace_all_uses_with(names[0])
            first[key], merged = names[0], True
    if not merged:
        return program
    _without_checks(module)
    for node in reversed(list(module.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    used = {node.target for node in module.graph.find_nodes(op="get_attr")}
    for name in [name for name, _ in module.named_buffers() if name not in used]:
        remove_attribute(module, name)
    module.recompile()
    return exported_again(module, program)


def ranges_of(program: ExportedProgram) -> dict[Any, tuple[int, int]]:
    """Smallest and largest value of each unknown size."""
    return {
        symbol: (_integer(limits.lower, 0), _integer(limits.upper, sys.maxsize))
        for symbol, limits in program.range_constraints.items()
    }


def exported_again(module: torch.fx.GraphModule, program: ExportedProgram) -> ExportedProgram:
    """Export a rewritten module with the inputs and dynamic sizes of its program."""
    args, kwargs = _example_inputs(module, program)
    with torch.no_grad():
        return torch.export.export(
            module, args, kwargs, dynamic_shapes=_dynamic_shapes(module, program), strict=False
        )


def _example_inputs(
    module: torch.fx.GraphModule, program: ExportedProgram
) -> tuple[tuple, dict[str, Any]]:
    if program.example_inputs is None:
        raise UnsupportedModelError(
            "this program has no example inputs, which exporting it again needs: set its "
            "example_inputs to (args, kwargs)."
        )
    return program.example_inputs


def _dynamic_shapes(module: torch.fx.GraphModule, program: ExportedProgram) -> Any:
    """In the form of the arguments: the sizes that the inputs of the graph leave open."""
    ranges = ranges_of(program)
    dims: dict[Any, Any] = {}
    leaves = [_leaf(node, ranges, dims) for node in module.graph.find_nodes(op="placeholder")]
    if not dims:
        return None
    spec = program.call_spec.in_spec
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return (*args, *kwargs.values())


def _leaf(node: Node, ranges: dict[Any, tuple[int, int]], dims: dict[Any, Any]) -> Any:
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        dims[node] = Dim.DYNAMIC
        return Dim.DYNAMIC
    if not isinstance(value, torch.Tensor):
        return None
    found = {}
    for axis, size in enumerate(value.shape):
        if isinstance(size, torch.SymInt):
            expression = size_expression(size)
            found[axis] = _dim(expression, ranges, dims)
    return found or None


def _dim(expression: Any, ranges: dict[Any, tuple[int, int]], dims: dict[Any, Any]) -> Any:
    """A named size for a symbol, `a * size + b` for what is computed from one."""
    symbols = sorted(expression.free_symbols, key=str)
    if len(symbols) != 1:
        dims[expression] = Dim.AUTO
        return Dim.AUTO
    symbol = symbols[0]
    if symbol not in dims:
        low, high = ranges.get(symbol, (0, sys.maxsize))
        limits = {"min": low} | ({"max": high} if high < sys.maxsize else {})
        dims[symbol] = Dim(f"size_{symbol}", **limits)
    if expression == symbol:
        return dims[symbol]
    offset = expression.subs({symbol: 0})
    factor = expression.subs({symbol: 1}) - offset
    if expression != factor * symbol + offset:
        return Dim.AUTO
    scaled = dims[symbol] if factor == 1 else int(factor) * dims[symbol]
    return scaled if offset == 0 else scaled + int(offset)


def _integer(limit: Any, otherwise: int) -> int:
    """A limit, or `otherwise` for an infinite one."""
    return int(limit) if isinstance(limit, int) or limit.is_Integer else otherwise
