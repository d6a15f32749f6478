"""Small questions about FX graphs: which ops of ours they hold, and where a node comes from."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import kvarn_ops
from kvarn_ops._compat import auto_functionalized_v2

__all__ = ["count_ops", "kvarn_op", "module_path", "place", "source_line"]

_PACKAGE = Path(kvarn_ops.__file__).parent


def kvarn_op(node: torch.fx.Node) -> str | None:
    """`"kvarn::append_"` for a call of one of our ops, functionalized or not; None for others."""
    if node.op != "call_function":
        return None
    target: Any = node.target
    if target is auto_functionalized_v2:
        target = node.args[0]
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        name = target._qualified_op_name
        return name if name.startswith("kvarn::") else None
    return None


def count_ops(graph: torch.fx.Graph) -> Counter[str]:
    """How often each op of ours is called in a graph."""
    return Counter(name for node in graph.nodes if (name := kvarn_op(node)) is not None)


def module_path(node: torch.fx.Node) -> str:
    """Path of the innermost module whose forward made a node, `"layers.0.attention"`; "" if none.

    As far as Dynamo recorded it: the name that the traced function gave to its model comes first.
    """
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^[LG]\['(\w+)'\]", lambda match: match[1], path)
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    return path.removeprefix("self.").removeprefix("self")


def source_line(node: torch.fx.Node) -> str:
    """The user's line that made a node, `"model.py:12: y = attend(q, k, v)"`; "" if unknown."""
    trace = node.stack_trace or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', trace)
    theirs = [frame for frame in frames if not Path(frame[0]).is_relative_to(_PACKAGE)]
    if not theirs:
        return ""
    path, line, code = theirs[-1]
    return f"{Path(path).name}:{line}: {code.strip()}"


def place(node: torch.fx.Node) -> str:
    """Where a node comes from, for messages: module and line as far as known, or its name."""
    return ", ".join(part for part in (module_path(node), source_line(node)) if part) or node.name
