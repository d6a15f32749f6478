"""Whether an attention's K or V is a cache with each head repeated, and how often.

Grouped-query attention: query head `i` reads KV head `i // times`. The order is proven for any
chain of views, casts and copies (`expand` and `reshape`, `repeat_interleave`, `transpose`, ...),
because a chain that repeats the heads in another order has the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .axes import Factor, op_name, walk_views

__all__ = ["HeadRepeat", "is_head_repeat"]


@dataclass(frozen=True)
class HeadRepeat:
    """`operand[b, h, t, d] == root[b, h // times, t, d]` for `t < length`, up to casts."""

    root: torch.fx.Node
    times: int
    length: int  # of the operand
    nodes: tuple[torch.fx.Node, ...]  # views and casts, the one next to the operand first


def is_head_repeat(
    operand: torch.fx.Node,
    root: Callable[[torch.fx.Node], bool],
    layout: tuple[int, int, int, int] = (0, 1, 2, 3),
) -> HeadRepeat | str:
    """How `operand` repeats the heads of the tensor that it is a view of, or why it does not.

    Parameters
    ----------
    operand : torch.fx.Node
        `[B, H_q, T, D]`; its `meta` and that of the nodes before it hold example values.
    root : callable
        Whether a node is the cache, where the search stops.
    layout : tuple of 4 int
        Which axes of the root are batch, head, token and channel.
    """
    viewed = walk_views(operand, root)
    if not root(viewed.root):
        return (
            f"{operand.name} is not a view of whole heads of the cache from the first token on: "
            f"{viewed.root.name} ({op_name(viewed.root) or viewed.root.op}) is in between"
        )
    if len(viewed.axes) != 4 or len(viewed.whole) != 4:
        return f"{operand.name} or its cache does not have the 4 axes batch, head, token, channel"
    batch, heads, tokens, channels = (viewed.whole[axis] for axis in layout)
    for name, found, wanted in (
        ("batch", viewed.axes[0], batch),
        ("channel", viewed.axes[3], channels),
    ):
        if found != wanted:
            return f"{operand.name} changes the {name} axis of the cache"
    copies = viewed.axes[1][len(heads) :]
    if (
        viewed.axes[1][: len(heads)] != heads
        or len(copies) > 1
        or any(c.axis is not None for c in copies)
    ):
        return f"{operand.name} has the heads in another order than repeat_interleave gives"
    length = _prefix(viewed.axes[2], tokens)
    if length is None:
        return f"{operand.name} reads other tokens than the first ones of the cache"
    return HeadRepeat(viewed.root, copies[0].size if copies else 1, length, viewed.nodes)


def _prefix(found: tuple[Factor, ...], tokens: tuple[Factor, ...]) -> int | None:
    """How many tokens are seen, if they are the first ones."""
    if found == tokens:
        return tokens[0].size if tokens else 1
    if not found:
        return 1
    same = len(found) == len(tokens) == 1 and found[0][:2] == tokens[0][:2]
    return found[0].size if same else None
