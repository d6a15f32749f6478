"""Benchmarks in words: prompts in batches, free-running answers, the task's own scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .data import Codec
from .pieces import Case, Piece, Tick
from .protocols import free_running
from .tasks.questions import Question, TextTask

__all__ = ["answers_of", "question_piece", "stop_ids"]

_ANSWERS = "answers"  # the tensor that holds the texts: JSON as bytes


def question_piece(
    case: Case,
    load: Callable[[], Any],
    codec: Codec,
    task: TextTask,
    questions: Sequence[Question],
    max_new_tokens: int,
    key: str,
    label: str,
) -> Piece:
    """Scores `[questions]` fp32 by metric, and the answers; prompts are padded on the left."""

    def run(tick: Tick) -> dict[str, Tensor]:
        model = load()
        prompts = [codec.prompt(question.prompt) for question in questions]
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        padded = None if bool(mask.all()) else mask.to(model.device)
        stops = stop_ids(model)

        def body(cache: Any) -> Tensor:
            where = ids.to(model.device)
            return free_running(model, cache, where, max_new_tokens, padded, stops, tick)

        starts = (longest - mask.sum(-1)).tolist()
        out = case.run(model, longest + max_new_tokens, body, starts).tolist()
        texts = [codec.decode(_until_stop(row, stops)) for row in out]
        pairs = zip(questions, texts, strict=True)
        scores = [task.score(question, text) for question, text in pairs]
        found = {name: torch.tensor([score[name] for score in scores]) for name in scores[0]}
        lines = [{"id": q.id, "answer": text} for q, text in zip(questions, texts, strict=True)]
        return found | {_ANSWERS: torch.tensor(list(json.dumps(lines).encode()), dtype=torch.uint8)}

    return Piece(key, label, max_new_tokens, run)


def answers_of(tensors: dict[str, Tensor]) -> list[dict[str, str]]:
    """`id` and `answer` of each question of a finished piece."""
    return json.loads(bytes(tensors[_ANSWERS].tolist()))


def stop_ids(model: Any) -> frozenset[int]:
    """Tokens that end an answer."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])


def _until_stop(row: list[int], stops: frozenset[int]) -> list[int]:
    return next((row[:i] for i, token in enumerate(row) if token in stops), row)
