"""Text, teacher-forced: every method against the dense run, at every position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .pieces import Case, Piece, Tick
from .protocols import Protocol, teacher_forced
from .scores import compare_logits

__all__ = ["DenseRun", "text_piece"]

_KEPT_BYTES = 1 << 30  # dense logits that are kept for the next method; more are computed again


class DenseRun:
    """Logits of the dense cache over one batch of windows, kept if they are small enough.

    Parameters
    ----------
    model : callable
        Gives the model; asked for when it is needed.
    windows : Tensor
        `[B, n + 1]` int64; the last token is only a target.
    protocol : Protocol
        How the tokens are fed.
    """

    _last: ClassVar[DenseRun | None] = None  # only this one keeps its logits

    def __init__(self, model: Callable[[], Any], windows: Tensor, protocol: Protocol) -> None:
        self.model, self.windows, self.protocol = model, windows, protocol
        self._kept: list[tuple[range, Tensor]] = []

    @property
    def ids(self) -> Tensor:
        """`[B, n]` int64: what is fed."""
        return self.windows[:, :-1]

    @property
    def forwards(self) -> int:
        """Calls of the model."""
        return len(self.protocol.spans(self.ids.shape[1]))

    def logits(self) -> Iterator[tuple[range, Tensor]]:
        """Positions and logits `[B, s, V]`, in order."""
        if DenseRun._last is not self:
            if DenseRun._last is not None:
                DenseRun._last._kept = []
            DenseRun._last = self
        if self._kept:
            return iter(self._kept)
        model = self.model()
        cache = DynamicCache(config=model.config)
        run = teacher_forced(model, cache, self.ids, self.protocol)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        positions = len(self.protocol.scored(self.ids.shape[1]))
        if len(self.ids) * positions * vocabulary * model.dtype.itemsize > _KEPT_BYTES:
            return run
        self._kept = list(run)
        return iter(self._kept)


def text_piece(case: Case, dense: DenseRun, key: str, label: str) -> Piece:
    """Scores `[B, positions]` of one method on one batch of windows; see `compare_logits`."""
    ids = dense.ids

    def run(tick: Tick) -> dict[str, Tensor]:
        model, references = dense.model(), dense.logits()

        def body(cache: Any) -> dict[str, Tensor]:
            parts: list[dict[str, Tensor]] = []
            mine = teacher_forced(model, cache, ids, dense.protocol, tick)
            for (span, reference), (_, logits) in zip(references, mine, strict=True):
                targets = dense.windows[:, span.start + 1 : span.stop + 1]
                parts.append(compare_logits(reference, logits, targets))
            return {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}

        return case.run(model, ids.shape[1], body)

    return Piece(key, label, dense.forwards, run)
