"""Match attentions with the static caches that they read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from kvarn_ops.config import KVarNConfig
from kvarn_ops.errors import InputError
from kvarn_ops.hadamard import check_head_dim

from .attention_forms import AttentionCall, read_sdpa
from .axes import Node, number, op_name, value_of, walk_views
from .evaluate import attribute
from .graph import module_path
from .head_repeat import HeadRepeat, is_head_repeat
from .mask_proof import Prover
from .rewrite_report import RewrittenLayer
from .static_cache import CacheWrite, find_caches

__all__ = ["CachedAttention", "match_attentions"]

_SDPA = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class CachedAttention:
    """An attention that can read its K and V from packed buffers."""

    node: Node
    layer: str
    query: Node
    keys: CacheWrite
    values: CacheWrite
    mask: Node | None  # to pass on; None: causal
    note: str  # on the mask
    scale: float
    views: frozenset[Node]  # between the caches and the attention
    assumes: Node | None  # a position input whose elements have to be consecutive


class _Left(Exception):
    """Why an attention is left as it is."""


def match_attentions(
    module: torch.fx.GraphModule, prover: Prover, config: KVarNConfig
) -> tuple[list[CachedAttention], list[RewrittenLayer]]:
    """Attentions whose caches can be packed, and reports on all others.

    Parameters
    ----------
    module : torch.fx.GraphModule
        The functional program.
    prover : Prover
        For this module.
    config : KVarNConfig
        Of the packed caches.
    """
    writes, unlike = find_caches(module.graph)
    found: list[CachedAttention] = []
    left: list[RewrittenLayer] = []
    for node in module.graph.find_nodes(op="call_function", target=_SDPA):
        try:
            found.append(_match(node, writes, unlike, prover, config))
        except _Left as error:
            names = _names(node, writes)
            left.append(RewrittenLayer(_layer(node), names, False, reason=str(error)))
    while True:
        problems = _conflicts(module, found, writes)
        if not problems:
            break
        for one in [one for one in found if one.node in problems]:
            names = (one.keys.name, one.values.name)
            left.append(RewrittenLayer(one.layer, names, False, reason=problems[one.node]))
        found = [one for one in found if one.node not in problems]
    named = {name for one in found for name in (one.keys.name, one.values.name)}
    named |= {name for report in left for name in report.caches}
    for write in writes:
        if write.name not in named:
            reason = "no scaled_dot_product_attention reads it"
            left.append(RewrittenLayer(_layer(write.result), (write.name,), False, reason=reason))
    return found, left


def _match(
    node: Node,
    writes: list[CacheWrite],
    unlike: dict[str, str],
    prover: Prover,
    config: KVarNConfig,
) -> CachedAttention:
    call = read_sdpa(node)
    if call.dropout:
        raise _Left("it has dropout")
    if call.unknown:
        raise _Left(call.unknown)
    keys, key_views = _operand(call.k, writes, unlike)
    values, value_views = _operand(call.v, writes, unlike)
    _check_pair(keys, values, config)
    _check_heads(call, keys, key_views.times, value_views.times)
    mask = call.mask
    sources = prover.shifted(keys, mask) if keys.shifts else prover.position(keys)
    if isinstance(sources, str):
        raise _Left(sources)
    others = sources if values.shifts else prover.position(values)
    if isinstance(others, str):
        raise _Left(others)
    if keys.shifts != values.shifts or others != sources:
        raise _Left("keys and values are not proven to be written to the same slots")
    length = _length(call.k, key_views)
    verdict = prover.mask(keys, sources, mask, call.is_causal, length)
    if verdict.refused:
        raise _Left(verdict.refused)
    if not verdict.causal:
        assert mask is not None  # without one, the verdict is causal or a refusal
        _check_mask(mask, call.q, call.k)
    evidence = [keys.position, values.position, *([mask] if verdict.causal else [])]
    assumes = None
    if prover.assumes_consecutive(keys, sources, evidence):
        assumes = sources.single
        if assumes is not None and assumes.op != "placeholder":
            raise _Left(f"the positions in {assumes.name} may not be consecutive")
    if keys.shifts:
        keys = replace(keys, position=sources.single)
    return CachedAttention(
        node, _layer(node), call.q, keys, values, None if verdict.causal else mask, verdict.note,
        float(call.scale), frozenset({*key_views.nodes, *value_views.nodes}), assumes,
    )  # fmt: skip


def _operand(
    operand: Node, writes: list[CacheWrite], unlike: dict[str, str]
) -> tuple[CacheWrite, HeadRepeat]:
    def cache_of(node: Node) -> CacheWrite | None:
        return next((write for write in writes if write.holds(node)), None)

    root = walk_views(operand, lambda node: cache_of(node) is not None).root
    write = cache_of(root)
    if write is None:
        for node in (root, *root.all_input_nodes):
            name = str(walk_views(node).root.target)
            if name in unlike:
                raise _Left(f"{name} is no recognised cache: {unlike[name]}")
        raise _Left(f"{root.name} is no static cache and no view of the first tokens of one")
    repeat = is_head_repeat(operand, write.holds, write.layout)
    if isinstance(repeat, str):
        raise _Left(repeat)
    return write, repeat


def _check_pair(keys: CacheWrite, values: CacheWrite, config: KVarNConfig) -> None:
    if keys is values:
        raise _Left(f"keys and values are the same buffer {keys.name}")
    one, two = value_of(keys.buffer), value_of(values.buffer)
    if _shape(keys) != _shape(values) or one.dtype != two.dtype or one.device != two.device:
        raise _Left(
            f"{keys.name} {one.dtype} {_shape(keys)} and {values.name} {two.dtype} "
            f"{_shape(values)} differ"
        )
    if number(keys.count) != number(values.count):
        raise _Left("keys and values of different numbers of tokens are written")
    if one.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise _Left(f"its caches are {one.dtype}: float16, bfloat16 and float32 are packed")
    try:
        check_head_dim(_shape(keys)[3], config.rotate_keys or config.rotate_values)
    except InputError as error:
        raise _Left(str(error)) from None


def _shape(write: CacheWrite) -> tuple[int, ...]:
    """`[batch, heads, tokens, channels]` of a buffer."""
    shape = value_of(write.buffer).shape
    return tuple(shape[axis] for axis in write.layout)


def _check_heads(call: AttentionCall, keys: CacheWrite, times: int, value_times: int) -> None:
    shape, key = value_of(call.q).shape, value_of(call.k).shape
    heads = _shape(keys)[1]
    if len(shape) != 4 or number(shape[0]) != number(key[0]):
        raise _Left("queries and keys have different batch sizes")
    if number(shape[2]) != number(keys.count):
        raise _Left(f"{shape[2]} queries attend where {keys.count} tokens are written")
    fits = call.enable_gqa or heads * times in (1, shape[1])
    if times != value_times or not fits or shape[1] % heads:
        raise _Left(f"{shape[1]} query heads do not fit {heads} heads that are repeated {times}x")


def _length(operand: Node, repeat: HeadRepeat) -> Node | int:
    """How many slots an attention reads: an integer, or the node that says it."""
    size = value_of(operand).shape[2]
    wanted = number(size)
    if isinstance(wanted, int):
        return wanted
    for node in repeat.nodes:
        if op_name(node) == "slice":
            end = dict(zip(("dim", "start", "end"), node.args[1:])).get("end")
            if isinstance(end, Node) and number(end.meta["val"]) == wanted:
                return end
    raise _Left(f"how many tokens it reads ({size}) is not found in the graph")


def _check_mask(mask: Node, query: Node, key: Node) -> None:
    value, shape = value_of(mask), value_of(query).shape
    wanted = (shape[0], shape[1], shape[2], value_of(key).shape[2])
    given = (1,) * (4 - value.ndim) + tuple(value.shape)
    fits = len(given) == 4 and number(given[3]) == number(wanted[3])
    for size, full in zip(given[:3], wanted):
        fits = fits and number(size) in (1, number(full))
    if not fits:
        raise _Left(f"its mask {tuple(value.shape)} cannot be passed on as {wanted}")


def _conflicts(
    module: torch.fx.GraphModule, found: list[CachedAttention], writes: list[CacheWrite]
) -> dict[Node, str]:
    """Attentions whose caches have to stay, because something else needs them."""
    problems: dict[Node, str] = {}
    partner: dict[str, str] = {}
    allowed: set[Node] = set()
    for one in found:
        allowed |= {one.node, *one.views}
        for name, other in (
            (one.keys.name, f"the values {one.values.name}"),
            (one.values.name, f"the keys {one.keys.name}"),
        ):
            if partner.setdefault(name, other) != other:
                problems[one.node] = f"{name} is also read with {partner[name]}"
    readers = _readers(found)
    for write in (one for pair in readers for one in pair):
        reason = _other_reader(write, allowed) or _content(module, write)
        if reason:
            for pair, attentions in readers.items():
                if write in pair:
                    problems |= dict.fromkeys(attentions, reason)
    return problems


def _readers(found: Iterable[CachedAttention]) -> dict[tuple[CacheWrite, CacheWrite], list[Node]]:
    readers: dict[tuple[CacheWrite, CacheWrite], list[Node]] = {}
    for one in found:
        readers.setdefault((one.keys, one.values), []).append(one.node)
    return readers


def _other_reader(write: CacheWrite, allowed: set[Node]) -> str:
    stack = [write.result, *([write.part] if write.part else [])]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        for user in node.users:
            if user is write.store or user in write.views or user in seen:
                continue
            seen.add(user)
            if write.holds(user) or user in allowed:
                if value_of(user) is not None and user.target is not _SDPA:
                    stack.append(user)
                continue
            return f"{write.name} is also read by {user.name}"
    return ""


def _content(module: torch.fx.GraphModule, write: CacheWrite) -> str:
    if bool(attribute(module, write.name).any()):
        return f"{write.name} already holds tokens: export with an empty cache"
    return ""


def _names(node: Node, writes: list[CacheWrite]) -> tuple[str, ...]:
    """The caches that the operands of an attention come from, through whatever operations."""
    found: list[str] = []
    for operand in node.args[1:3]:
        stack, seen = [operand], set()
        while stack:
            one = stack.pop()
            if not isinstance(one, Node) or one in seen:
                continue
            seen.add(one)
            write = next((write for write in writes if write.holds(one)), None)
            if write is not None:
                found.append(write.name)
                break
            stack += one.all_input_nodes
    return tuple(found)


def _layer(node: Node) -> str:
    return module_path(node) or node.name
