"""Pointer chase: many dependent look-ups in a quantized prompt, one error derails the chain.

A prompt lists the edges of one cycle over `length` of 128 nodes in random order, then a separator
and a start node; the answer is the next `length` nodes of the cycle. A node has one id where it is
the end of an edge and another one elsewhere, so that every look-up has a single right place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SEPARATOR", "VOCAB_SIZE", "Chase", "make_chases"]

NODES = 128
SEPARATOR = 2 * NODES  # ids below are nodes: NODES + i is node i as the end of an edge
VOCAB_SIZE = SEPARATOR + 2  # one id is left for models that want a padding token
LONGEST = NODES - 2


class Chase(NamedTuple):
    """`prompts` `[n, 2 * length + 2]` and `answers` `[n, length]`, int64."""

    prompts: Tensor
    answers: Tensor


def make_chases(count: int, length: int, generator: torch.Generator) -> Chase:
    """Draw `count` cycles of `length` (2 to 126) nodes; the generator decides everything."""
    order = torch.rand(count, NODES, generator=generator).argsort(-1)[:, :length]  # the cycle
    after = order.roll(-1, dims=-1)
    shuffle = torch.rand(count, length, generator=generator).argsort(-1)
    edges = torch.stack([order.gather(-1, shuffle), after.gather(-1, shuffle) + NODES], dim=-1)
    separator = torch.full((count, 1), SEPARATOR)
    return Chase(torch.cat([edges.flatten(1), separator, order[:, :1]], dim=-1), after)
