"""The generated tasks as the evaluation runs them: a document, then questions about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import chase, lines

__all__ = ["PUZZLES", "Batch", "Puzzle"]

_QUESTIONS_ABOUT_LINES = 32


class Batch(NamedTuple):
    """`document` `[n, d]`, `questions` `[n, k, q]`, `answers` `[n, k, a]`, int64."""

    document: Tensor
    questions: Tensor
    answers: Tensor


class Puzzle(NamedTuple):
    """A task with a model of its own among the examples.

    The document is fed first and quantized, then questions are asked, one after the other: fed
    together, the answer's first token would read the exact document.
    """

    name: str
    model: str  # folder in examples/
    length: int  # edges, or lines
    group_size: int  # tokens per tile: documents are short
    num_sink_tokens: int  # the paper's choice for short prompts
    make: Callable[[int, int, torch.Generator], Batch]  # (count, length, generator)


def _chase(count: int, length: int, generator: torch.Generator) -> Batch:
    prompts, answers = chase.make_chases(count, length, generator)
    return Batch(prompts[:, :-2], prompts[:, None, -2:], answers.unsqueeze(1))


def _lines(count: int, length: int, generator: torch.Generator) -> Batch:
    return Batch(*lines.make_lines(count, length, _QUESTIONS_ABOUT_LINES, generator))


PUZZLES = {
    "chase": Puzzle("chase", "chase_model", chase.LONGEST, 64, 32, _chase),
    "lines": Puzzle("lines", "lines_model", 240, 64, 32, _lines),
}
