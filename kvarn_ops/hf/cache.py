"""`KVarNCache`: a transformers cache whose full-attention layers are packed."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from .. import dispatch
from .._compat import is_compiling
from ..config import DEFAULT_PRESET, KVarNConfig
from ..errors import BackendError, CacheError, InputError
from ..layout import CODE_FIELDS, SCALE_FIELDS, SINK_FIELDS, TAIL_FIELDS
from . import stock
from .fork import forked
from .layer import KVarNLayer

__all__ = ["KVarNCache"]

_logger = logging.getLogger("kvarn_ops")


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
        Where the model is, to resolve `backend="auto"`. Default: the GPU if there is one; on a
        CPU such a cache runs without kernels all the same.
    offload_tiles : bool
        Keep finished tiles in CPU memory and bring them to the device chunk by chunk. The device
        then holds sinks, tail and a few tiles, and decoding waits for the transfers. Such a cache
        runs eagerly.
    **config_overrides
        Fields of `KVarNConfig`.
    """

    made_by_generate = False  # then `generate` may also give it more room (`hf.growth`)

    def __init__(
        self,
        model_config: Any,
        max_cache_len: int,
        config: KVarNConfig | str = DEFAULT_PRESET,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        offload_tiles: bool = False,
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
        self.model_config = model_config
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        resolved = dispatch.resolve(backend, device)
        if offload_tiles and resolved == "triton":
            if backend == "triton":
                raise BackendError(
                    'backend="triton" does not read offloaded tiles: use "auto" or "aten", or '
                    "leave the tiles on the GPU."
                )
            _logger.info("offloaded tiles are read by backend aten; kernels do not read them.")
            resolved = "aten"
        rotations: dict[tuple[int, torch.device], Tensor] = {}
        stock = StaticCache(config=model_config, max_cache_len=max_cache_len)
        layers = [
            KVarNLayer(max_cache_len, self.kvarn_config, resolved, rotations, offload_tiles)
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

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, side by side; the cache gets new memory."""
        for layer in self.layers:
            if isinstance(layer, KVarNLayer):
                layer.batch_repeat_interleave(repeats)
            else:
                stock.repeat_rows(layer, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (int64, or bool over all rows); the cache gets new memory."""
        for layer in self.layers:
            if isinstance(layer, KVarNLayer):
                layer.batch_select_indices(indices)
            else:
                stock.select_rows(layer, indices)

    def fork(self, copies: int = 1, *, max_cache_len: int | None = None) -> KVarNCache:
        """A cache that goes on from here and stores what is common once.

        Finished tiles are shared: n forks of a prompt's cache, or one fork of n rows, hold them
        once, and compiled or not, read them together where they can. Sinks, tail and later tiles
        are the fork's own. This cache can be used further; tokens that are shared can neither be
        changed nor removed by `crop` here or there, and `reset()` takes new memory.

        Parameters
        ----------
        copies : int
            Rows of the fork for every row of this cache, side by side (as
            `Tensor.repeat_interleave`).
        max_cache_len : int, optional
            Capacity of the fork in tokens per row; default: that of this cache.

        Raises
        ------
        CacheError
            If the capacity does not hold what is stored, or differs and layers stay dense.
        """
        if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
            raise InputError(f"copies={copies!r}: give a number of rows of at least 1.")
        if max_cache_len is not None:
            used = int(self.get_seq_length())
            if max_cache_len < used:
                raise CacheError(
                    f"max_cache_len={max_cache_len} does not hold the {used} tokens per row that "
                    "are stored: give at least that many."
                )
            fresh = StaticCache(config=self.model_config, max_cache_len=max_cache_len).layers
            for layer, new in zip(self.layers, fresh, strict=True):
                if not isinstance(layer, KVarNLayer):
                    stock.check_same_capacity(new, getattr(layer, "max_cache_len", None))
        fork = copy.copy(self)
        fork.layers = [
            forked(layer, copies, max_cache_len or layer.max_cache_len)
            if isinstance(layer, KVarNLayer)
            else stock.copied(layer, copies)
            for layer in self.layers
        ]
        return fork

    # Not named `to`: accelerate calls that on every argument of every hooked module.
    def to_device(self, device: torch.device | str) -> KVarNCache:
        """Move everything to a device, in place; offloaded tiles stay in CPU memory."""
        device = torch.empty(0, device=device).device  # with its index
        rotations: dict[tuple[int, torch.device], Tensor] = {}
        for layer in self.layers:
            if isinstance(layer, KVarNLayer):
                layer.to_device(device, rotations)
            else:
                stock.to_device(layer, device)
        return self

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file; see `kvarn_ops.hf.cache_file`."""
        from .cache_file import save

        save(self, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model_config: Any,
        *,
        max_cache_len: int | None = None,
        config: KVarNConfig | str | None = None,
        backend: str = "auto",
        device: torch.device | str = "cpu",
        offload_tiles: bool = False,
    ) -> KVarNCache:
        """Read a cache that `save` wrote; see `kvarn_ops.hf.cache_file`.

        Parameters
        ----------
        model_config : PreTrainedConfig
            Config of the model that will use the cache; must be that of the model that filled it.
        max_cache_len : int, optional
            Capacity in tokens per row; default: that of the saved cache.
        config : KVarNConfig or str, optional
            If given, a file with another config is refused.

        Raises
        ------
        CacheError
            If the file is damaged, of a newer format, or does not belong to this model or config.
        """
        from .cache_file import load

        return load(
            path, model_config, max_cache_len, config, backend, torch.device(device), offload_tiles
        )

    def memory(
        self, *others: KVarNCache, device: torch.device | str | None = None
    ) -> dict[str, int]:
        """Bytes held now, by kind.

        Parameters
        ----------
        *others : KVarNCache
            Caches to be counted together with this one; what forks share is counted once.
        device : torch.device or str, optional
            Count only what lies there, for a cache with `offload_tiles`.

        Returns
        -------
        dict
            `codes`, `scales`, `sinks`, `tail` of the packed layers, `state` (lengths, equalizers,
            rotation matrices), `dense` (layers that are not packed) and `total`, which is the size
            of all distinct storages that the cache holds.
        """
        groups = {
            "codes": CODE_FIELDS,
            "scales": SCALE_FIELDS,
            "sinks": SINK_FIELDS,
            "tail": TAIL_FIELDS,
        }
        sizes = dict.fromkeys((*groups, "state", "dense"), 0)
        seen: set[int] = set()
        only = None if device is None else torch.empty(0, device=device).device

        def add(kind: str, tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            if only in (None, tensor.device) and storage._cdata not in seen:
                seen.add(storage._cdata)
                sizes[kind] += storage.nbytes()

        for layer in (layer for cache in (self, *others) for layer in cache.layers):
            if not isinstance(layer, KVarNLayer):
                for tensor in stock.tensors_of(vars(layer)):
                    add("dense", tensor)
                continue
            for tiles in (layer.tiles, layer.shared):
                for kind, names in groups.items() if tiles is not None else ():
                    for name in names:
                        if hasattr(tiles, name):
                            add(kind, getattr(tiles, name))
            for tensor in stock.tensors_of(vars(layer)):
                add("state", tensor)
        return sizes | {"total": sum(sizes.values())}
