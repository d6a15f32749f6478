"""What steps have in common to which the cache is given: they write to nothing of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kvarn_ops.layout import TileCache

from .step_model import StepModel

__all__ = ["PureStep"]


class PureStep(nn.Module):
    """The model of a step, and its cache object as the place of tensors that are passed in.

    Parameters
    ----------
    step : StepModel
        Gives the model, and the shapes of its cache.
    chunk : int
        Most new tokens of a call.
    counts : torch.dtype
        Of `ranks`, which counts the new tokens.
    """

    rotation: Tensor
    ranks: Tensor

    def __init__(self, step: StepModel, chunk: int, counts: torch.dtype) -> None:
        super().__init__()
        self.model = step.model
        # Models without positions count from the cache's length.
        self.takes_positions = "position_ids" in inspect.signature(step.model.forward).parameters
        self._cache, self._layers = step.cache, list(step.cache.layers)
        self.register_buffer("rotation", step.get_buffer("rotation"), persistent=False)
        ranks = torch.arange(chunk, dtype=counts, device=self.rotation.device)
        self.register_buffer("ranks", ranks, persistent=False)

    @contextmanager
    def holding(
        self,
        tiles: Sequence[TileCache],
        lengths: Tensor,
        attends: Sequence[Callable[..., Tensor]] = (),
    ) -> Iterator[None]:
        """Let the cache object hold these tensors, and attend by `attends`, for one forward."""
        held = [(x.tiles, x.rotation, x.cumulative_length) for x in self._layers]
        try:
            for layer, own in zip(self._layers, tiles, strict=True):
                layer.tiles, layer.rotation = own, self.rotation
                layer.cumulative_length = lengths.max()
            for layer, attend in zip(self._layers, attends, strict=False):
                layer.attend = attend
            yield
        finally:
            for layer, (own, matrix, length) in zip(self._layers, held, strict=True):
                layer.tiles, layer.rotation, layer.cumulative_length = own, matrix, length
                vars(layer).pop("attend", None)
