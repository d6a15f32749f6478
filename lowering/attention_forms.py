"""The forms in which code writes attention, read into one description.

`scaled_dot_product_attention` (torch's function and aten's op, by name or by position), and the
formula spelled out:

    scores = q @ k.transpose(-2, -1) * scale        (or / a number, before or after the product)
    scores = cap * tanh(scores / cap)               (optional)
    scores = scores + mask                          (or masked_fill, or where; optional)
    out    = dropout(softmax(scores, -1), 0) @ v
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .axes import op_name, value_of

__all__ = ["AttentionCall", "attention_calls", "read_sdpa"]

Node = torch.fx.Node

_SDPA = "scaled_dot_product_attention"
_SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_CASTS = {"to", "_to_copy", "float", "type_as", "half", "bfloat16", "type"}
_MASKING = {"add", "add_", "iadd", "masked_fill", "masked_fill_", "where"}
_FLEX = "flex_attention"


@dataclass(frozen=True)
class AttentionCall:
    """One attention: `softmax(softcap(scale * q @ k.T) masked) @ v`, `[B, H_q, S, D]`."""

    out: Node
    q: Node
    k: Node  # [B, H, T, D], before it is transposed for the product
    v: Node
    scale: float
    mask: Node | None = None
    mask_hides: bool = False  # True in the mask hides, as in masked_fill
    is_causal: bool = False
    dropout: float = 0.0
    softcap: float = 0.0
    enable_gqa: bool = False
    unknown: str = ""  # why this attention is not fully understood
    inner: tuple[Node, ...] = field(default=(), repr=False)  # scores and weights


def attention_calls(graph: torch.fx.Graph) -> Iterator[AttentionCall]:
    """Every attention in a graph, in its order."""
    for node in graph.nodes:
        name = op_name(node)
        if name == _SDPA:
            yield read_sdpa(node)
        elif name == _FLEX:
            q, k, v = node.args[:3]
            yield AttentionCall(node, q, k, v, 0.0, unknown="FlexAttention is not rewritten")
        elif name in ("softmax", "_softmax"):
            call = _spelled_out(node)
            if call is not None:
                yield call


def read_sdpa(node: Node) -> AttentionCall:
    """A call of `scaled_dot_product_attention`."""
    given: dict[str, Any] = dict(zip(_SDPA_NAMES, node.args, strict=False)) | dict(node.kwargs)
    q = given.pop("query")
    width = value_of(q).shape[-1]
    scale = given.pop("scale", None)
    call = AttentionCall(
        node,
        q,
        given.pop("key"),
        given.pop("value"),
        width**-0.5 if scale is None else scale,
        mask=given.pop("attn_mask", None),
        dropout=given.pop("dropout_p", 0.0),
        is_causal=given.pop("is_causal", False),
        enable_gqa=given.pop("enable_gqa", False),
    )
    if len(node.args) > len(_SDPA_NAMES):
        return replace(call, unknown="it has more positional arguments than are known")
    if given:
        return replace(call, unknown=f"the argument {sorted(given)[0]} is not known")
    if not isinstance(call.scale, (int, float)):
        return replace(call, unknown="the scale is computed in the graph")
    return call


def _spelled_out(softmax: Node) -> AttentionCall | None:
    """`softmax(...) @ v`, or None if this softmax is something else."""
    if not _over_last(softmax):
        return None
    weights, inner, dropout = softmax, [softmax], 0.0
    while True:
        users = list(weights.users)
        if len(users) != 1 or users[0].args[:1] != (weights,):
            return None
        user = users[0]
        if op_name(user) == "dropout":
            p = _argument(user, 1, "p", 0.5)
            training = _argument(
                user, 2, "training" if "training" in user.kwargs else "train", True
            )
            dropout = p if training else 0.0
        elif op_name(user) == "matmul":
            break
        elif op_name(user) not in _CASTS:
            return None
        weights = user
        inner.append(user)
    scores = _read_scores(softmax.args[0], inner)
    if scores is None:
        return None
    return replace(scores, out=user, v=user.args[1], dropout=dropout, inner=tuple(inner))


def _read_scores(node: Any, inner: list[Node]) -> AttentionCall | None:
    """Walk from the softmax back to the product of queries and keys."""
    mask, hides, softcap, scale, unknown = None, False, 0.0, 1.0, ""
    product_scaled = False
    while isinstance(node, Node):
        name = op_name(node)
        if len(node.users) > 1:
            unknown = f"the scores {node.name} are read elsewhere too"
        inner.append(node)
        if name in _CASTS:
            node = node.args[0]
        elif name in _MASKING and not product_scaled:
            if mask is not None:
                unknown = "several masks are applied"
            read = _read_mask(node)
            if read is None:
                return None
            node, mask, hides = read
        elif name == "mul" and _is_cap(node):
            if product_scaled:
                return None
            tanh, softcap = node.args
            inner += [tanh, tanh.args[0]]
            if _number(tanh.args[0], "div", "truediv") != softcap:
                unknown = "a tanh of the scores that is not a softcap"
            node = tanh.args[0].args[0]
        elif name in ("mul", "div", "truediv"):
            number = _number(node, name)
            if number is None:
                return None
            scale *= number if name == "mul" else 1 / number
            product_scaled = True
            node = _tensor_side(node)
        elif name == "matmul":
            return _product(node, scale, softcap, mask, hides, unknown, inner)
        else:
            return None
    return None


def _product(
    node: Node,
    scale: float,
    softcap: float,
    mask: Node | None,
    hides: bool,
    unknown: str,
    inner: list[Node],
) -> AttentionCall | None:
    q, transposed = node.args[:2]
    if not isinstance(q, Node) or not isinstance(transposed, Node):
        return None
    factor = _number(q, op_name(q)) if op_name(q) in ("mul", "div", "truediv") else None
    if factor is not None:  # a scale on the queries
        scale *= factor if op_name(q) == "mul" else 1 / factor
        q = _tensor_side(q)
    keys = transposed
    inner.append(keys)
    if op_name(keys) in ("mul", "div", "truediv"):
        factor = _number(keys, op_name(keys))
        if factor is None:
            return None
        scale *= factor if op_name(keys) == "mul" else 1 / factor
        keys = _tensor_side(keys)
        inner.append(keys)
    if not _swaps_last_two(keys):
        return None
    return AttentionCall(
        node, q, keys.args[0], node, scale,
        mask=mask, mask_hides=hides, softcap=softcap, unknown=unknown,
    )  # fmt: skip


def _read_mask(node: Node) -> tuple[Any, Node, bool] | None:
    """The scores before a mask, the mask, and whether True in it hides."""
    name = op_name(node)
    if "add" in name:
        tensors = [arg for arg in node.args if isinstance(arg, Node)]
        if len(tensors) != 2 or node.kwargs:
            return None
        shapes = [value_of(tensor) for tensor in tensors]
        scores_first = shapes[0] is not None and shapes[0].shape == value_of(node).shape
        if scores_first and shapes[1] is not None and shapes[1].shape == shapes[0].shape:
            scores_first = _leads_to_product(tensors[0])
        scores, mask = tensors if scores_first else tensors[::-1]
        return scores, mask, False
    if name == "where":
        mask, scores, other = node.args
        if not isinstance(mask, Node) or not _is_lowest(other):
            return None
        return scores, mask, False
    scores, mask, value = node.args if len(node.args) == 3 else (*node.args, node.kwargs["value"])
    return (scores, mask, True) if isinstance(mask, Node) and _is_lowest(value) else None


def _leads_to_product(node: Node) -> bool:
    while isinstance(node, Node) and node.args:
        if op_name(node) == "matmul":
            return True
        if op_name(node) not in {"mul", "div", "truediv", "tanh", *_CASTS}:
            return False
        node = _tensor_side(node)
    return False


def _is_lowest(value: Any) -> bool:
    """Whether a fill value takes no weight: -inf, or a dtype's smallest number."""
    return isinstance(value, (int, float)) and value <= torch.finfo(torch.float16).min


def _is_cap(node: Node) -> bool:
    first, second = node.args[:2]
    return (
        isinstance(first, Node)
        and op_name(first) == "tanh"
        and isinstance(second, (int, float))
        and op_name(first.args[0]) in ("div", "truediv")  # type: ignore[arg-type]
    )


def _number(node: Node, *names: str) -> float | None:
    """The number that a product or quotient has beside its tensor."""
    if op_name(node) not in names or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if isinstance(second, (int, float)) and isinstance(first, Node):
        return float(second)
    if op_name(node) == "mul" and isinstance(first, (int, float)):
        return float(first)
    return None


def _tensor_side(node: Node) -> Any:
    return next(arg for arg in node.args if isinstance(arg, Node))


def _swaps_last_two(node: Any) -> bool:
    if not isinstance(node, Node):
        return False
    name, rest = op_name(node), node.args[1:]
    if name in ("transpose", "swapaxes", "swapdims"):
        return sorted(axis % 4 for axis in rest) == [2, 3]  # type: ignore[operator]
    if name == "permute":
        order = rest[0] if len(rest) == 1 else rest
        return [axis % 4 for axis in order] == [0, 1, 3, 2]  # type: ignore[union-attr, operator]
    if name == "getattr":
        return rest == ("mT",)
    return name in ("mT", "adjoint")


def _over_last(softmax: Node) -> bool:
    value = value_of(softmax)
    dim = _argument(softmax, 1, "dim", None)
    return value is not None and value.ndim == 4 and dim in (-1, 3)


def _argument(node: Node, index: int, name: str, default: Any) -> Any:
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)
