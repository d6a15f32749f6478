"""List the attentions of a graph, and where each reads its keys and values."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .attention_forms import attention_calls
from .axes import op_name
from .dequantized import KEEPS_TOKENS, dequantize_behind
from .graph import kvarn_op, module_path, source_line
from .record import AttentionSite, Refusal

__all__ = ["survey"]

Node = torch.fx.Node

_PACKED = ("kvarn::attention", "kvarn::step_", "kvarn::step", "kvarn::step_shared_")
_SOURCE = "kvarn::dequantize"


def survey(graph: torch.fx.Graph, refusals: Iterable[Refusal]) -> list[AttentionSite]:
    """Every attention of a graph of Dynamo's, in its order.

    Parameters
    ----------
    graph : torch.fx.Graph
        After the passes that fuse.
    refusals : iterable of Refusal
        What these passes said; gives the reasons.
    """
    calls = {call.out: call for call in attention_calls(graph)}
    reasons: dict[str, list[str]] = {}
    for refusal in refusals:
        reasons.setdefault(refusal.node, []).append(f"{refusal.reason} ({refusal.pass_name})")
    found, explained = [], set()
    for node in graph.nodes:
        name = kvarn_op(node)
        if name in _PACKED:
            found.append(_site(node, f"{name}: reads packed tiles", packed=True))
        elif node in calls:
            call = calls[node]
            sources = {s for side in (call.k, call.v) if (s := dequantize_behind(side)) is not None}
            explained |= sources
            what = _what(node)
            if not sources:
                text = f"{what}: dense, its keys and values come from no packed cache"
            else:
                known = [r for one in (node, *call.inner) for r in reasons.get(one.name, ())]
                text = f"{what} over a dequantized cache: {'; '.join(known) or 'no pass says why'}"
            found.append(_site(node, text))
    for node in graph.nodes:
        if kvarn_op(node) == _SOURCE and node not in explained and node.users:
            found.append(_site(node, f"the cache is dequantized: {_reader_reasons(node, reasons)}"))
    return found


def _site(node: Node, text: str, packed: bool = False) -> AttentionSite:
    return AttentionSite(module_path(node), source_line(node), packed, text)


def _what(node: Node) -> str:
    name = getattr(node.target, "__name__", None) or str(node.target)
    return "attention spelled out" if "matmul" in name else name.partition(".")[0]


def _reader_reasons(source: Node, reasons: dict[str, list[str]]) -> str:
    """Why what reads a dequantized cache was left, or at least who reads it."""
    readers: list[Node] = []
    pending = list(source.users)
    while pending:
        node = pending.pop(0)
        if node not in readers:
            readers.append(node)
            pending += node.users if op_name(node) in KEEPS_TOKENS else ()
    for node in (source, *readers):
        if node.name in reasons:
            return reasons[node.name][0]
    names = [node.name for node in readers if op_name(node) not in KEEPS_TOKENS]
    return f"no known form of attention reads it, but {', '.join(names[:3])}"
