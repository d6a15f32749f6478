"""Line retrieval: find the content of a named line among hundreds (after LongEval, at this scale).

A document is `length` lines `LINE name content`, then questions `ASK name` follow, each of which is
answered by the content of that line. Names differ, contents may repeat.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ASK", "CONTENTS", "LINE", "NAMES", "VOCAB_SIZE", "Lines", "make_lines"]

NAMES, CONTENTS = 256, 128
LINE, ASK = NAMES + CONTENTS, NAMES + CONTENTS + 1
VOCAB_SIZE = ASK + 2  # one id is left for models that want a padding token


class Lines(NamedTuple):
    """`documents` `[n, length * 3]`, `questions` `[n, q, 2]` and `answers` `[n, q, 1]`, int64."""

    documents: Tensor
    questions: Tensor
    answers: Tensor


def make_lines(
    count: int,
    length: int,
    questions: int,
    generator: torch.Generator,
    names_in_use: int = NAMES,
) -> Lines:
    """Draw `count` documents of `length` lines (at most 256) and `questions` about each.

    Training begins with few `names_in_use`, from which look-ups are learned sooner.
    """
    names = torch.rand(count, names_in_use, generator=generator).argsort(-1)[:, :length]
    contents = torch.randint(min(names_in_use, CONTENTS), (count, length), generator=generator)
    contents += NAMES
    documents = torch.stack([torch.full_like(names, LINE), names, contents], dim=-1).flatten(1)
    asked = torch.rand(count, length, generator=generator).argsort(-1)[:, :questions]
    asked_names = names.gather(-1, asked)
    return Lines(
        documents,
        torch.stack([torch.full_like(asked_names, ASK), asked_names], dim=-1),
        contents.gather(-1, asked).unsqueeze(-1),
    )
