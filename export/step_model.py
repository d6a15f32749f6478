"""A patched model and its packed cache as one module, which exporters take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvarn_ops.errors import InputError, UnsupportedModelError

__all__ = ["StepModel", "stored"]


class StepModel(nn.Module):
    """`input_ids` `[B, S]` int64 to `logits` `[B, S, vocabulary]`; the cache is its buffers.

    Buffers `past_<layer>_<field>` are the fields of `kvarn_ops.layout.TileCache`, and
    `past_<layer>_length` is how many tokens came. A sliding-window layer that stays dense has
    `past_<layer>_keys` and `_values` instead of the fields. They are not persistent and start
    empty, whatever the model was used for before.

    Parameters
    ----------
    model : nn.Module
        A patched Hugging Face model.
    max_cache_len : int
        Most tokens of a sequence.
    batch_size : int
        Rows.
    windows : bool
        Whether sliding-window layers may stay dense.

    Raises
    ------
    UnsupportedModelError
        If the model is not patched, or keeps other layers outside the packed cache.
    InputError
        If a size is not positive, or the model is in train mode.
    """

    def __init__(
        self, model: nn.Module, max_cache_len: int, batch_size: int = 1, *, windows: bool = False
    ) -> None:
        super().__init__()
        record = vars(model).get("_kvarn_patch")
        if record is None or not hasattr(model, "config"):
            raise UnsupportedModelError(
                f"{type(model).__name__} is not a patched Hugging Face model: call "
                "kvarn_ops.patch(model) first."
            )
        if model.training:
            raise InputError("the model is in train mode: call model.eval() before an export.")
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: give an integer >= 1.")
        self.model: Any = model
        self.max_cache_len, self.batch_size, self.kvarn_config = (
            max_cache_len, batch_size, record.config,
        )  # fmt: skip
        self.cache = self._empty_cache(record, windows)
        for index, layer in enumerate(self.cache.layers):
            for name, tensor in stored(layer).items():
                self.register_buffer(f"past_{index}_{name}", tensor, persistent=False)
            length = layer.cumulative_length
            self.register_buffer(f"past_{index}_length", length, persistent=False)
        rotation = next(layer.rotation for layer in self.cache.layers if hasattr(layer, "tiles"))
        self.register_buffer("rotation", rotation, persistent=False)

    def _empty_cache(self, record: Any, windows: bool) -> Any:
        """A cache of the shapes and dtypes that the model writes, found by writing one token."""
        from transformers.cache_utils import StaticSlidingWindowLayer

        from kvarn_ops.hf.cache import KVarNCache
        from kvarn_ops.hf.layer import KVarNLayer

        from .window_layer import WindowLayer

        device = next(self.model.parameters()).device
        cache = KVarNCache(
            self.model.config, self.max_cache_len, record.config, backend=record.backend,
            device=device,
        )  # fmt: skip
        for index, layer in enumerate(cache.layers):
            if windows and type(layer) is StaticSlidingWindowLayer:
                cache.layers[index] = WindowLayer(self.max_cache_len)
            elif not isinstance(layer, KVarNLayer):
                also = " or have a sliding window" if windows else ""
                raise UnsupportedModelError(
                    f"layer {index} of {type(self.model).__name__} is a {type(layer).__name__}, "
                    f"which stays dense: here only models whose layers are all packed{also} are "
                    "exported."
                )
        if not any(isinstance(layer, KVarNLayer) for layer in cache.layers):
            raise UnsupportedModelError(
                f"no layer of {type(self.model).__name__} is packed: there is nothing to export."
            )
        token = torch.zeros(self.batch_size, 1, dtype=torch.int64, device=device)
        with torch.no_grad():
            self.model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.reset()
        return cache

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of new tokens, which the cache then holds."""
        return self.model(input_ids=input_ids, past_key_values=self.cache, use_cache=True).logits

    def state(self) -> dict[str, Tensor]:
        """The buffers that calls change, by name."""
        return {name: x for name, x in self.named_buffers() if name.startswith("past_")}

    def reset(self) -> None:
        """Start a new sequence."""
        self.cache.reset()


def stored(layer: Any) -> dict[str, Tensor]:
    """What a layer stores, by name."""
    if hasattr(layer, "tiles"):
        return layer.tiles._asdict()
    return {"keys": layer.keys, "values": layer.values}
