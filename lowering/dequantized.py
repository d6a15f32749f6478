"""Which dequantized cache a tensor is made from."""

from __future__ import annotations

import torch

from .axes import op_name
from .graph import kvarn_op

__all__ = ["KEEPS_TOKENS", "dequantize_behind"]

Node = torch.fx.Node

# Operations after which keys are still keys. A projection is none: behind it lies another layer,
# whose cache is not this attention's.
KEEPS_TOKENS = {
    *("getitem", "view", "reshape", "expand", "transpose", "permute", "contiguous", "clone"),
    *("unsqueeze", "squeeze", "flatten", "unflatten", "repeat", "repeat_interleave", "mT", "T"),
    *("swapaxes", "movedim", "select", "slice", "narrow", "flip", "roll", "cat", "stack", "pad"),
    *("index_select", "gather", "where", "masked_fill", "to", "_to_copy", "float", "half"),
    *("bfloat16", "type", "type_as", "add", "sub", "mul", "div", "truediv", "neg", "detach"),
}


def dequantize_behind(node: Node) -> Node | None:
    """The `kvarn::dequantize` that keys or values are made from, or None."""
    seen: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop(0)
        if kvarn_op(current) == "kvarn::dequantize":
            return current
        if current not in seen and op_name(current) in KEEPS_TOKENS:
            seen.add(current)
            pending += current.all_input_nodes
    return None
