"""Attention over a dequantized cache becomes attention over the packed one."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch

from kvarn_ops.layout import TileCache

from . import record
from .attention_forms import AttentionCall, attention_calls
from .attention_node import four_axes, with_strides_of
from .axes import op_name, value_of, walk_views
from .dequantized import dequantize_behind
from .head_repeat import is_head_repeat

__all__ = ["FuseAttention"]

Node = torch.fx.Node

_OPS = torch.ops.kvarn
_CACHE_LEN = len(TileCache._fields)


@dataclass(frozen=True)
class _Match:
    """An attention whose keys and values are those of one `dequantize`."""

    call: AttentionCall
    source: Node  # dequantize
    tokens: int  # length of the keys that it reads


class FuseAttention:
    """Read packed tiles where attention is computed, and drop the dense copies.

    The keys and values may be cut to a prefix, cast, and have their heads repeated in any way that
    gives what `repeat_interleave` gives. The attention may be torch's function or the formula
    spelled out (`lowering.attention_forms`). A mask is passed on, whatever it holds; slots without
    a token are never seen. What is not understood stays as it is, and is reported.

    Before:
        k, v = kvarn.dequantize(cache)                       # [B, H_kv, T, D] each
        out = scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), mask)
    After:
        out = kvarn.attention(q, cache, mask)
    """

    def __call__(self, graph: torch.fx.Graph) -> int:
        """Rewrite one graph; return the number of attentions rewritten."""
        sources = [node for node in graph.nodes if _is_dequantize(node)]
        if not sources:
            return 0
        matches: list[_Match] = []
        refused: set[Node | None] = set()  # caches whose attention was reported already
        read_by: dict[Node, Node] = {}  # everything between a source and an attention
        for call in attention_calls(graph):
            found = _match(call, read_by)
            if isinstance(found, _Match):
                matches.append(found)
            elif found:
                _refuse(call.out, found)
                refused |= {dequantize_behind(call.k), dequantize_behind(call.v)}
        order = {node: index for index, node in enumerate(graph.nodes)}
        count = 0
        for source in sources:
            if source in refused:
                continue
            count += _fuse(source, [m for m in matches if m.source is source], read_by, order)
        if count:
            _erase_unread(graph, {*sources, *read_by, *(match.call.out for match in matches)})
            graph.lint()
        return count


def _match(call: AttentionCall, read_by: dict[Node, Node]) -> _Match | str:
    """The match; why it is none; or an empty text if this attention reads no dequantized cache."""
    k = is_head_repeat(call.k, lambda node: _is_part(node, 0))
    v = is_head_repeat(call.v, lambda node: _is_part(node, 1))
    if not (dequantize_behind(call.k) or dequantize_behind(call.v)):
        return ""
    for reason in (k, v):
        if isinstance(reason, str):
            return reason
    assert not isinstance(k, str)
    assert not isinstance(v, str)
    source = k.root.args[0]
    assert isinstance(source, Node)
    if v.root.args[0] is not source:
        return "keys and values come from two caches"
    if (k.times, k.length) != (v.times, v.length):
        return "keys and values differ in heads or length"
    for node in (*k.nodes, k.root, *v.nodes, v.root, *call.inner):
        read_by[node] = call.out
    refusal = call.unknown or _unsuited(call, k.times, k.length, value_of(k.root).shape)
    return refusal or _Match(call, source, k.length)


def _unsuited(call: AttentionCall, times: int, tokens: int, cache: torch.Size) -> str:
    """Why an attention that reads a cache cannot read it packed; empty if it can."""
    q = value_of(call.q)
    if call.dropout:
        return f"it drops weights (dropout {call.dropout}), which packed attention does not"
    if q is None or q.ndim != 4 or q.shape[0] != cache[0] or q.shape[3] != cache[3]:
        return "its queries are not [batch, heads, tokens, head_dim] of the cache"
    heads, repeated = q.shape[1], cache[1] * times
    if heads != repeated and not (call.enable_gqa and heads % repeated == 0):
        return f"{heads} query heads do not go with {repeated} heads of the keys"
    if call.scale <= 0:
        return f"its scale {call.scale} is not positive"
    if call.mask is None and not call.is_causal:
        return (
            "it has no mask, so that slots without a token would be seen: give a mask of the "
            "positions"
        )
    if call.mask is None:
        return ""
    if call.is_causal:
        return "it has a mask and is_causal"
    mask = value_of(call.mask)
    if mask is None or mask.ndim < 2 or mask.shape[-1] != tokens:
        return f"its mask does not have a column for each of the {tokens} slots"
    if call.mask_hides and mask.dtype != torch.bool:
        return "its mask is filled by numbers"
    return ""


def _fuse(
    source: Node, matches: list[_Match], read_by: dict[Node, Node], order: dict[Node, int]
) -> int:
    """Replace the attentions that read one dequantized cache, if nothing else reads it."""
    fused = {match.call.out for match in matches}
    for reader in _readers(source):
        if read_by.get(reader, reader) not in fused:
            _refuse(reader, f"{source.name} is read by {reader.name}, which is not rewritten")
            return 0
    for match in matches:
        changed = _changed_between(source, match.call.out, order)
        if changed is not None:
            _refuse(match.call.out, f"{changed.name} changes the cache before it is read")
            return 0
    for match in matches:
        _replace(match)
    return len(matches)


def _readers(source: Node) -> list[Node]:
    """Readers of a dequantized cache beyond its two parts and what views them."""
    found, pending = [], list(source.users)
    while pending:
        node = pending.pop()
        viewed = op_name(node) == "getitem" or (value_of(node) is not None and _only_views(node))
        if viewed and node.users:
            pending += list(node.users)
        else:
            found.append(node)
    return found


def _only_views(node: Node) -> bool:
    return node in walk_views(node).nodes


def _changed_between(source: Node, reader: Node, order: dict[Node, int]) -> Node | None:
    """A node between the two that writes into the cache."""
    cache = set(source.args[:_CACHE_LEN])
    for tensor in cache:
        for user in tensor.users:  # type: ignore[union-attr]
            if order[source] < order[user] < order[reader] and _writes(user, cache):
                return user
    return None


def _writes(node: Node, tensors: set[Any]) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_") and node.args[0] in tensors
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        name = op_name(node)
        return name in ("setitem", "iadd", "imul") or (name.endswith("_") and name[0] != "_")
    return any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)


def _replace(match: _Match) -> None:
    call, graph = match.call, match.call.out.graph
    *cache, rotation, config, backend, _ = match.source.args
    with graph.inserting_before(call.out):
        mask = _mask(graph, call, match.tokens)
        new = graph.call_function(
            _OPS.attention.default,
            (call.q, *cache, rotation, None, call.scale, call.softcap, False, config, backend, 0,
             mask),
        )  # fmt: skip
        new = with_strides_of(graph, new, call.out)
        new.meta.update(call.out.meta)
    call.out.replace_all_uses_with(new)


def _mask(graph: torch.fx.Graph, call: AttentionCall, tokens: int) -> Node:
    """The mask with 4 axes, True where a token is seen."""
    mask = call.mask
    if mask is None:  # is_causal: query i sees the first i + 1 slots
        count = graph.call_function(torch.ops.aten.sym_size.int, (call.q, 2))
        options = {"dtype": torch.bool, "device": value_of(call.q).device}
        count.meta["val"] = value_of(call.q).shape[2]
        ones = graph.call_function(torch.ops.aten.ones.default, ([count, tokens],), options)
        mask = graph.call_function(torch.ops.aten.tril.default, (ones,))
        axes = 2
    else:
        axes = value_of(mask).ndim
    mask = four_axes(graph, mask, axes)
    if call.mask_hides:
        mask = graph.call_function(torch.ops.aten.logical_not.default, (mask,))
    return mask


def _is_dequantize(node: Node) -> bool:
    return node.op == "call_function" and node.target in (
        _OPS.dequantize,
        _OPS.dequantize.default,
    )


def _is_part(node: Node, index: int) -> bool:
    return (
        node.op == "call_function"
        and node.target is operator.getitem
        and node.args[1] == index
        and _is_dequantize(node.args[0])  # type: ignore[arg-type]
    )


def _erase_unread(graph: torch.fx.Graph, ours: set[Node]) -> None:
    """Erase those of our nodes that nothing reads any more.

    Not `eliminate_dead_code`: Dynamo's graph holds in-place methods (`counter.add_(1)`), which have
    no readers either, and torch 2.11 takes our own in-place ops for pure.
    """
    for node in reversed(list(graph.nodes)):
        if node in ours and not node.users:
            graph.erase_node(node)


def _refuse(node: Node, reason: str) -> None:
    record.refuse("FuseAttention", node, reason)
