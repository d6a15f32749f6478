"""What a `kvarn::attention` node needs around it in place of a dense attention."""

from __future__ import annotations

import torch

from .axes import Node, Sizes, value_of

__all__ = ["four_axes", "with_strides_of"]

_ATEN = torch.ops.aten


def four_axes(graph: torch.fx.Graph, mask: Node, axes: int) -> Node:
    """A mask of `axes` axes as `[B or 1, H_q or 1, S or 1, T]`."""
    for _ in range(4 - axes):
        mask = graph.call_function(_ATEN.unsqueeze.default, (mask, 0))
    return mask


def with_strides_of(graph: torch.fx.Graph, result: Node, dense: Node) -> Node:
    """`result`, which is contiguous, with its axes in memory in the order of `dense`.

    Code behind an attention may view its output by them. Axes of size 1 may stand anywhere.
    """
    sizes, value = Sizes(), value_of(dense)
    wide = [axis for axis, size in enumerate(sizes.of(dense)) if size != 1]
    order = list(range(4))
    by_stride = sorted(wide, key=lambda axis: -sizes(value.stride(axis)))
    for place, axis in zip(wide, by_stride, strict=True):
        order[place] = axis
    if order == [0, 1, 2, 3]:
        return result
    moved = graph.call_function(_ATEN.permute.default, (result, order))
    packed = graph.call_function(
        _ATEN.clone.default, (moved,), {"memory_format": torch.contiguous_format}
    )
    back = [order.index(axis) for axis in range(4)]
    return graph.call_function(_ATEN.permute.default, (packed, back))
