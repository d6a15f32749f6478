"""Line retrieval: find the content of a named line among hundreds (after LongEval).

A prompt is `length` lines `LINE name digit digit digit digit digit`, then `ASK name`; the answer is
the five digits of that line.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ASK", "DIGITS", "LINE", "NAMES", "VOCAB_SIZE", "Lines", "make_lines"]

DIGITS = 5
NAMES = 1024
FIRST_NAME = 10  # ids 0 to 9 are digits
LINE, ASK = FIRST_NAME + NAMES, FIRST_NAME + NAMES + 1
VOCAB_SIZE = ASK + 2  # one id is left for models that want a padding token
LINE_TOKENS = 2 + DIGITS


class Lines(NamedTuple):
    """`prompts` `[n, length * 7]`, `questions` `[n, q, 2]` and `answers` `[n, q, 5]`, int64."""

    prompts: Tensor
    questions: Tensor
    answers: Tensor


def make_lines(count: int, length: int, questions: int, generator: torch.Generator) -> Lines:
    """Draw `count` documents of `length` lines and `questions` (at most `length`) about each."""
    names = torch.rand(count, NAMES, generator=generator).argsort(-1)[:, :length] + FIRST_NAME
    digits = torch.randint(10, (count, length, DIGITS), generator=generator)
    mark = torch.full((count, length, 1), LINE)
    prompts = torch.cat([mark, names.unsqueeze(-1), digits], dim=-1).flatten(1)
    asked = torch.rand(count, length, generator=generator).argsort(-1)[:, :questions]
    asked_names = names.gather(-1, asked).unsqueeze(-1)
    ask = torch.cat([torch.full_like(asked_names, ASK), asked_names], dim=-1)
    answers = digits.gather(1, asked.unsqueeze(-1).expand(-1, -1, DIGITS))
    return Lines(prompts, ask, answers)
