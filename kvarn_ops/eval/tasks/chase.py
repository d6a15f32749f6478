"""Pointer chase: many dependent look-ups in a quantized prompt, one error derails the chain.

A prompt lists the edges `EDGE from to` of one cycle over `length` of 128 nodes in random order,
then `WALK start`; the answer is the next `length` nodes of the cycle. The mark before each edge
tells its two ends apart: without it, what follows a node is its successor in one place only of two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["EDGE", "VOCAB_SIZE", "WALK", "Chase", "make_chases"]

NODES = 128
EDGE, WALK = NODES, NODES + 1
VOCAB_SIZE = NODES + 3  # one id is left for models that want a padding token
LONGEST = NODES - 2


class Chase(NamedTuple):
    """`prompts` `[n, 3 * length + 2]` and `answers` `[n, length]`, int64."""

    prompts: Tensor
    answers: Tensor


def make_chases(count: int, length: int, generator: torch.Generator) -> Chase:
    """Draw `count` cycles of `length` (2 to 126) nodes; the generator decides everything."""
    order = torch.rand(count, NODES, generator=generator).argsort(-1)[:, :length]  # the cycle
    after = order.roll(-1, dims=-1)
    shuffle = torch.rand(count, length, generator=generator).argsort(-1)
    ends = [order.gather(-1, shuffle), after.gather(-1, shuffle)]
    edges = torch.stack([torch.full_like(order, EDGE), *ends], dim=-1)
    walk = torch.full((count, 1), WALK)
    return Chase(torch.cat([edges.flatten(1), walk, order[:, :1]], dim=-1), after)
