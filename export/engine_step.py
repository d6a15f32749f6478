"""What runs an engine's program over and over: the packed cache, and the tokens that it gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvarn_ops.errors import CacheError, InputError

from .engine_program import engine_fields
from .step_model import StepModel

__all__ = ["EngineStep"]


class EngineStep(nn.Module):
    """`input_ids` `[B, S]` int64 to `logits` `[B, S, vocabulary]`; the cache is kept between calls.

    Up to `chunk` new tokens go through the engine, and more of them at once, such as a prompt,
    through the patched model in PyTorch; both read and write the same packed cache. It starts
    empty; `reset()` empties it.

    Parameters
    ----------
    step : StepModel
        The patched model and its cache.
    program : callable
        The engine, or what behaves like it: see `EngineProgram`.
    chunk : int
        Most new tokens of a call that the program takes.

    Attributes
    ----------
    program : callable
        As given.
    length : int
        Tokens that every row holds.
    """

    def __init__(self, step: StepModel, program: Callable[..., Any], chunk: int) -> None:
        super().__init__()
        self.model, self.program, self.chunk = step, program, chunk
        self.length = 0
        self._layers: list[Any] = list(step.cache.layers)
        # Views, which stay valid: the cache is written in place. Engines copy what is not
        # contiguous, at every call.
        self._fields = [x for layer in self._layers for x in engine_fields(layer.tiles)]
        assert all(x.is_contiguous() and x.dtype != torch.uint8 for x in self._fields)
        self.reset()

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of new tokens, which the cache then holds.

        Raises
        ------
        InputError
            If the ids have another shape, dtype or device than the engine was made for.
        CacheError
            If they do not fit.
        """
        self._check(input_ids)
        count = input_ids.shape[1]
        if count > self.chunk:
            logits = self.model(input_ids)
        else:
            lengths = self._layers[0].tiles.seq_lens.to(torch.int32)
            logits, *new = self.program(input_ids.contiguous(), lengths, *self._fields)
            for layer, k, v in zip(self._layers, new[::2], new[1::2], strict=True):
                torch.ops.kvarn.append_(
                    k, v, None, *layer.tiles, layer.rotation, layer.config_line, layer.backend
                )
                layer.cumulative_length.add_(count)
        self.length += count
        return logits

    def reset(self) -> None:
        """Start a new sequence."""
        self.model.reset()
        self.length = 0

    def _check(self, input_ids: Tensor) -> None:
        rows, most = self.model.batch_size, self.model.max_cache_len
        if input_ids.ndim != 2 or input_ids.shape[0] != rows or not input_ids.shape[1]:
            raise InputError(
                f"input_ids has shape {tuple(input_ids.shape)}: give [{rows}, new tokens]; "
                "another number of rows needs another engine."
            )
        if input_ids.dtype != torch.int64 or input_ids.device != self._fields[0].device:
            raise InputError(
                f"input_ids is {input_ids.dtype} on {input_ids.device}: give int64 on "
                f"{self._fields[0].device}."
            )
        needed = self.length + input_ids.shape[1]
        if needed > most:
            raise CacheError(
                f"the cache has room for {most} tokens per row and {needed} are needed: make the "
                f"engine with max_cache_len={needed} or more, or call reset()."
            )
