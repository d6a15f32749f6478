"""`KVarNCache`: a transformers cache whose full-attention layers are packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from .. import dispatch
from .._compat import is_compiling
from ..config import DEFAULT_PRESET, KVarNConfig
from ..errors import InputError
from ..layout import CODE_FIELDS, SCALE_FIELDS, SINK_FIELDS, TAIL_FIELDS
from .layer import KVarNLayer

__all__ = ["KVarNCache"]


class KVarNCache(Cache):
    """A KV cache for `model(..., past_key_values=)` and `generate` of a patched model.

    Full-attention layers are stored packed; sliding, chunked and linear layers are those of
    transformers' `StaticCache`. Memory is allocated at the first forward.

    Parameters
    ----------
    model_config : PreTrainedConfig
        `model.config`.
    max_cache_len : int
        Tokens per row that fit, padding included.
    config : KVarNConfig or str
        Config or preset name.
    backend : {"auto", "reference", "aten", "triton"}
        Which implementation the ops use.
    device : torch.device or str, optional
        Where the model is, to resolve `backend="auto"`.
    **config_overrides
        Fields of `KVarNConfig`.
    """

    def __init__(
        self,
        model_config: Any,
        max_cache_len: int,
        config: KVarNConfig | str = DEFAULT_PRESET,
        *,
        backend: str = "auto",
        device: torch.device | str = "cpu",
        **config_overrides: Any,
    ) -> None:
        if isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int):
            raise InputError(f"max_cache_len={max_cache_len!r}: give a number of tokens (int).")
        if max_cache_len < 1:
            raise InputError(f"max_cache_len={max_cache_len}: give at least 1.")
        if not hasattr(model_config, "get_text_config"):
            raise InputError(
                f"model_config is {type(model_config).__name__}: pass model.config of a "
                "transformers model."
            )
        self.kvarn_config = KVarNConfig.coerce(config, **config_overrides)
        resolved = dispatch.resolve(backend, device)
        rotations: dict[tuple[int, torch.device], Tensor] = {}
        stock = StaticCache(config=model_config, max_cache_len=max_cache_len)
        layers = [
            KVarNLayer(max_cache_len, self.kvarn_config, resolved, rotations)
            if type(layer) is StaticLayer
            else layer
            for layer in stock.layers
        ]
        super().__init__(layers=layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As in transformers, but tokens that do not fit are refused before any layer changes."""
        if not (is_compiling() or isinstance(self.layers[layer_idx], KVarNLayer)):
            later = self.layers[layer_idx:]
            packed = next((layer for layer in later if isinstance(layer, KVarNLayer)), None)
            if packed is not None:
                packed.check_room(key_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def memory(self) -> dict[str, int]:
        """Bytes held now, by kind.

        Returns
        -------
        dict
            `codes`, `scales`, `sinks`, `tail` of the packed layers, `state` (lengths, rotation
            matrices), `dense` (layers that are not packed) and `total`, which is the size of all
            distinct storages that the cache holds.
        """
        groups = {
            "codes": CODE_FIELDS,
            "scales": SCALE_FIELDS,
            "sinks": SINK_FIELDS,
            "tail": TAIL_FIELDS,
        }
        sizes = dict.fromkeys((*groups, "state", "dense"), 0)
        seen: set[int] = set()

        def add(kind: str, tensor: Any) -> None:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    sizes[kind] += storage.nbytes()

        for layer in self.layers:
            if not isinstance(layer, KVarNLayer):
                for tensor in _tensors(vars(layer)):
                    add("dense", tensor)
                continue
            if layer.tiles is not None:
                for kind, names in groups.items():
                    for name in names:
                        add(kind, getattr(layer.tiles, name))
            for tensor in _tensors(vars(layer)):
                add("state", tensor)
        return sizes | {"total": sum(sizes.values())}


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
