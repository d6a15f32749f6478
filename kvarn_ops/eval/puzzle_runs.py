"""Puzzles, free running: is the answer right, and where does it first go wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .pieces import Case, Piece, Tick
from .protocols import free_running, last_logits_only
from .tasks.puzzles import Batch

__all__ = ["puzzle_piece"]


def puzzle_piece(case: Case, load: Callable[[], Any], batch: Batch, key: str, label: str) -> Piece:
    """`intact` `[n]`: every answer token is right; `accuracy` `[n]`: share of answers that are."""
    count, steps = batch.answers.shape[1:]

    def run(tick: Tick) -> dict[str, Tensor]:
        model = load()

        def body(cache: Any) -> Tensor:
            with torch.no_grad():
                model(
                    input_ids=batch.document,
                    past_key_values=cache,
                    use_cache=True,
                    **last_logits_only(model),
                )
            tick()
            answers = []
            for index in range(count):
                question = batch.questions[:, index]
                if index:  # the last token of an answer has not been fed yet
                    question = torch.cat([answers[-1][:, -1:], question], dim=-1)
                answers.append(free_running(model, cache, question, steps, tick=tick))
            return torch.stack(answers, dim=1)

        slots = batch.document.shape[1] + count * (batch.questions.shape[2] + steps)
        right = (case.run(model, slots, body) == batch.answers).all(-1)
        return {"intact": right.all(-1), "accuracy": right.float().mean(-1)}

    return Piece(key, label, count * steps + 1, run)
