"""The generated tasks as the evaluation runs them: a document, a question, an answer of ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import chase, lines

__all__ = ["PUZZLES", "Batch", "Puzzle"]


class Batch(NamedTuple):
    """`document` `[n, d]`, `question` `[n, q]`, `answer` `[n, a]`, int64."""

    document: Tensor
    question: Tensor
    answer: Tensor


class Puzzle(NamedTuple):
    """A task with a model of its own among the examples.

    The document is fed first and quantized, then the question is asked: fed together, the answer's
    first token would read the exact document.
    """

    name: str
    model: str  # folder in examples/
    length: int  # edges, or lines
    group_size: int  # tokens per tile: prompts are short
    num_sink_tokens: int
    make: Callable[[int, int, torch.Generator], Batch]  # (count, length, generator)


def _chase(count: int, length: int, generator: torch.Generator) -> Batch:
    prompts, answers = chase.make_chases(count, length, generator)
    return Batch(prompts[:, :-2], prompts[:, -2:], answers)


def _lines(count: int, length: int, generator: torch.Generator) -> Batch:
    prompts, questions, answers = lines.make_lines(count, length, 1, generator)
    return Batch(prompts, questions[:, 0], answers[:, 0])


PUZZLES = {
    "chase": Puzzle("chase", "chase_model", chase.LONGEST, 64, 0, _chase),
    "lines": Puzzle("lines", "lines_model", 288, 64, 32, _lines),
}
