"""Give a cache that `generate` made room for more tokens: the next turn, the next draft."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache

from .._compat import mark_static
from ..errors import CacheError
from ..layout import PackedTiles
from .cache import KVarNCache
from .layer import KVarNLayer

__all__ = ["grow"]


@torch.no_grad()
def grow(cache: KVarNCache, max_cache_len: int) -> None:
    """Make every layer hold `max_cache_len` tokens per row; what is stored stays as it is.

    Buffers are allocated anew and copied, so that compiled code is traced again for the new shapes.

    Raises
    ------
    CacheError
        If a sliding layer has already dropped tokens that its longer version would hold.
    """
    stock = StaticCache(config=cache.model_config, max_cache_len=max_cache_len).layers
    steps = []
    for layer, longer in zip(cache.layers, stock, strict=True):
        wanted = max_cache_len if isinstance(layer, KVarNLayer) else _slots(longer)
        if 0 < _slots(layer) < wanted:
            if not isinstance(layer, KVarNLayer) and _seen(layer) > _slots(layer):
                raise CacheError(
                    f"this cache holds {_slots(layer)} tokens in a sliding layer that needs more: "
                    f"create it with max_cache_len={max_cache_len} or more."
                )
            steps.append((layer, wanted))
    for layer, wanted in steps:  # nothing is changed before all are known to be possible
        _grow_layer(layer, wanted)


def _grow_layer(layer: Any, wanted: int) -> None:
    if isinstance(layer, KVarNLayer):
        if layer.tiles is not None:
            more = layer.config.allocated_tiles(wanted)
            more -= layer.config.allocated_tiles(layer.max_cache_len)
            packed = {name: _longer(getattr(layer.tiles, name), more) for name in _PACKED}
            layer.tiles = layer.tiles._replace(**packed)
    elif layer.is_initialized:
        layer.keys = _longer(layer.keys, wanted - layer.max_cache_len)
        layer.values = _longer(layer.values, wanted - layer.max_cache_len)
    layer.max_cache_len = wanted


_PACKED = PackedTiles._fields


def _longer(tensor: Tensor, more: int) -> Tensor:
    """`[B, H, n, ...]` with `more` zeros behind it in dimension 2."""
    if more == 0:
        return tensor
    batch, heads, count, *rest = tensor.shape
    longer = tensor.new_zeros(batch, heads, count + more, *rest)
    longer.narrow(2, 0, count).copy_(tensor)
    mark_static(longer)
    return longer


def _slots(layer: Any) -> int:
    """Allocated slots of a static layer; 0 for layers that have no such limit."""
    return getattr(layer, "max_cache_len", 0)


def _seen(layer: Any) -> int:
    return int(layer.get_seq_length()) if layer.is_initialized else 0
