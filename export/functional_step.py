"""A patched model as a pure function: the packed cache comes in and goes out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvarn_ops.errors import UnsupportedModelError
from kvarn_ops.layout import TileCache

from .pure_step import PureStep
from .step_model import StepModel

__all__ = ["FunctionalStep"]


class FunctionalStep(PureStep):
    """`(input_ids, past, attention_mask)` to `(logits, present)`.

    `past` and `present` are the fields of `kvarn_ops.layout.TileCache` by name, one dict per layer,
    of the same shapes and dtypes; `past` is not written. All zeros are an empty cache. Positions
    are counted from the first real token of each row.

    Parameters
    ----------
    step : StepModel
        Gives the model, and the shapes of its cache.
    chunk : int
        Most new tokens of a call.
    masked : bool
        Whether an `attention_mask` will be given.

    Raises
    ------
    UnsupportedModelError
        If a mask will be given and the model takes no positions, which padding would shift.
    """

    def __init__(self, step: StepModel, chunk: int, masked: bool) -> None:
        super().__init__(step, chunk, torch.int64)
        self.chunk, self.masked = chunk, masked
        if masked and not self.takes_positions:
            raise UnsupportedModelError(
                f"{type(step.model).__name__} takes no position_ids, so that padding would shift "
                "its positions: export it with attention_mask=False."
            )

    @property
    def num_layers(self) -> int:
        """Layers of the cache."""
        return len(self._layers)

    def empty(self) -> list[dict[str, Tensor]]:
        """The empty cache."""
        return [
            {name: torch.zeros_like(x) for name, x in layer.tiles._asdict().items()}
            for layer in self._layers
        ]

    def forward(
        self,
        input_ids: Tensor,
        past: list[dict[str, Tensor]],
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Logits `[B, S, vocabulary]` and the cache with the new tokens.

        Parameters
        ----------
        input_ids : Tensor
            `[B, S]` int64.
        past : list of dict
            Fields of `TileCache` by name, one dict per layer.
        attention_mask : Tensor, optional
            `[B, S]` int64 or bool, for the new tokens only; 0 is padding, which is not stored.
        """
        lengths = past[0]["seq_lens"]
        present = [TileCache(**{name: x.clone() for name, x in own.items()}) for own in past]
        kwargs: dict[str, Any] = {}
        # Looked up, so that runtimes refuse more tokens than `chunk`: tiles would be missing.
        count = torch.arange(input_ids.shape[1], device=input_ids.device)
        rank = self.ranks.index_select(0, count).unsqueeze(0)
        input_ids = torch.where(rank >= 0, input_ids, 0)  # for models that take no positions
        if attention_mask is not None:
            valid = attention_mask.bool()
            rank = (valid.long().cumsum(-1) - 1).clamp_min(0)
            kwargs["attention_mask"] = valid[:, None, None, :]
        if self.takes_positions:
            kwargs["position_ids"] = lengths[:, None] + rank
        with self.holding(present, lengths):
            logits = self.model(
                input_ids=input_ids, past_key_values=self._cache, use_cache=True, **kwargs
            ).logits
        return logits, [tiles._asdict() for tiles in present]
