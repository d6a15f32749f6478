"""Greedy text of examples/byte_model through any step, also in processes without kvarn_ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PRESET, ROOM, CHUNK, COUNT = "k4v2_g32", 512, 64, 180
PROMPT = (
    '"""Utilities for reading configuration files."""\n\nimport os\nimport sys\n\n\n'
    'class Reader:\n    """Read a file."""\n\n    def __init__(self, path):\n'
    "        self.path = path\n        self.values = {}\n\n"
    '    def read(self):\n        """Return the lines of the file."""\n'
    "        lines = []\n        for line in "
)  # every token of the answer leads the second by 0.3: a code at a tie of rounding changes none
OPENS_FILE = 256  # the model's token before a file


@torch.no_grad()
def greedy(step: Callable[[Tensor], Tensor], count: int = COUNT) -> list[int]:
    """New ids after the prompt; `step` takes ids `[1, S]`, S up to `CHUNK`, and gives logits."""
    new, made = [OPENS_FILE, *PROMPT.encode()], []
    while len(made) < count:
        for part in torch.tensor([new]).split(CHUNK, 1):
            logits = step(part.contiguous())
        new = [int(logits[0, -1].argmax())]
        made += new
    return made


def text_of(ids: list[int]) -> str:
    """The bytes among the ids."""
    return bytes(i for i in ids if i < 256).decode()
