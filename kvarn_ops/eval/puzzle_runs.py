"""Puzzles, free running: is the answer right, and where does it first go wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .pieces import Case, Piece, Tick
from .protocols import free_running
from .tasks.puzzles import Batch

__all__ = ["puzzle_piece"]


def puzzle_piece(case: Case, load: Callable[[], Any], batch: Batch, key: str, label: str) -> Piece:
    """`intact` `[n]`: the whole answer is right; `correct` `[n]`: leading tokens that are."""
    steps = batch.answer.shape[1]

    def run(tick: Tick) -> dict[str, Tensor]:
        model = load()

        def body(cache: Any) -> Tensor:
            with torch.no_grad():
                model(
                    input_ids=batch.document,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            tick()
            return free_running(model, cache, batch.question, steps, tick=tick)

        slots = batch.document.shape[1] + batch.question.shape[1] + steps
        right = case.run(model, slots, body) == batch.answer
        correct = right.int().cumprod(-1).sum(-1)
        return {"intact": right.all(-1), "correct": correct}

    return Piece(key, label, steps + 1, run)
