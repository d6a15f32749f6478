"""How many bytes a model's cache takes at any context and batch size, without allocating it.

`KVarNCache.memory()` measures what is computed here. The shapes come from one forward of the model
on the meta device, which knows windows, head counts and states of linear layers better than any
reading of the config; the bytes of packed layers come from `KVarNConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import StaticCache

from ..config import KVarNConfig
from ..errors import UnsupportedModelError, reason

__all__ = ["Footprint", "LayerShape", "layer_shapes", "tokens_that_fit"]

_LONG = 1 << 20  # tokens: longer than any window
_LENGTH_BYTES = 8  # of an int64
_ROTATION_BYTES = 4  # rotation matrices are fp32


@dataclass(frozen=True)
class LayerShape:
    """What one layer of a dense cache holds, for one row of the batch."""

    kind: str  # class of the cache layer
    num_kv_heads: int
    head_dim: int  # of keys; 0 for a layer without keys
    slot_bytes: int  # of a token's keys and values
    slots: int | None  # None: as many as the cache has; else a window
    state_bytes: int  # of everything that does not grow with the context
    counters: int  # bytes that the batch shares

    def dense_bytes(self, context: int, batch: int) -> int:
        """Bytes in a static cache with room for `context` tokens per row."""
        slots = context if self.slots is None else min(self.slots, context)
        return batch * (slots * self.slot_bytes + self.state_bytes) + self.counters


@dataclass(frozen=True)
class Footprint:
    """Bytes of a dense and of a KVarN cache of one model.

    Attributes
    ----------
    layers : tuple of LayerShape
    packed : collection of int
        Indices of the layers that a KVarN cache packs.
    config : KVarNConfig
    dtype : torch.dtype
        Of keys and values.
    """

    layers: tuple[LayerShape, ...]
    packed: Collection[int]
    config: KVarNConfig
    dtype: torch.dtype

    def dense(self, context: int, batch: int = 1) -> int:
        """Bytes of transformers' static cache with room for `context` tokens per row."""
        return sum(layer.dense_bytes(context, batch) for layer in self.layers)

    def kvarn(self, context: int, batch: int = 1) -> int:
        """Bytes of a `KVarNCache` with room for `context` tokens per row."""
        tiles = self.config.allocated_tiles(context)
        return (
            sum(
                self._packed_layer(layer, tiles, batch)
                if index in self.packed
                else layer.dense_bytes(context, batch)
                for index, layer in enumerate(self.layers)
            )
            + self._rotations()
        )

    def fixed(self) -> int:
        """Bytes that every sequence takes however short it is, in the packed layers."""
        return sum(
            self._packed_layer(self.layers[index], self.config.allocated_tiles(0), 1)
            for index in self.packed
        )

    def layer_bytes_per_token(self, index: int) -> tuple[float, float]:
        """Bytes of one more token in a layer, far from the start: dense, KVarN."""
        layer = self.layers[index]
        dense = 0 if layer.slots is not None else layer.slot_bytes
        if index not in self.packed:
            return dense, dense
        return dense, self.config.bytes_per_token(layer.head_dim, layer.num_kv_heads)

    def bytes_per_token(self) -> tuple[float, float]:
        """Bytes of one more token in all layers, far from the start: dense, KVarN."""
        pairs = [self.layer_bytes_per_token(index) for index in range(len(self.layers))]
        return sum(dense for dense, _ in pairs), sum(kvarn for _, kvarn in pairs)

    def break_even(self) -> int | None:
        """The context from which on the KVarN cache is smaller, None if it never is."""
        per_token_dense, per_token_kvarn = self.bytes_per_token()
        if not self.packed or per_token_kvarn >= per_token_dense:
            return None
        # The packed size is at most a straight line, which crosses that of the dense size here.
        margin = self.fixed() + self._rotations()
        beyond = int(margin / (per_token_dense - per_token_kvarn)) + self.config.group_size
        last_larger = max(n for n in range(beyond + 1) if self.kvarn(n) >= self.dense(n))
        return last_larger + 1

    def _packed_layer(self, layer: LayerShape, tiles: int, batch: int) -> int:
        config, heads, width = self.config, layer.num_kv_heads, layer.head_dim
        exact = (config.num_sink_tokens + config.ring_len) * 2 * width * self.dtype.itemsize
        row = heads * (tiles * config.tile_bytes(width) + exact + config.equalizer_bytes(width))
        lengths = 2 * _LENGTH_BYTES  # the row's length, and the longest it has been
        return batch * (row + lengths) + _LENGTH_BYTES  # and the slots used so far

    def _rotations(self) -> int:
        if not (self.config.rotate_keys or self.config.rotate_values):
            return 0
        widths = {self.layers[index].head_dim for index in self.packed}
        return sum(width * width * _ROTATION_BYTES for width in widths)


def tokens_that_fit(size: Callable[[int], int], budget: int, limit: int = 1 << 40) -> int | None:
    """The largest context whose cache of `size(context)` bytes fits; None if any context does."""
    if size(1) > budget:
        return 0
    if size(limit) <= budget:
        return None
    low, high = 1, limit  # fits, does not fit
    while high - low > 1:
        middle = (low + high) // 2
        if size(middle) <= budget:
            low = middle
        else:
            high = middle
    return low


def layer_shapes(model: PreTrainedModel) -> tuple[LayerShape, ...]:
    """Shapes of a model's cache, from one forward of the model, which is on the meta device.

    Its config is changed: nothing else should be done with the model.

    Raises
    ------
    UnsupportedModelError
        If that forward fails.
    """
    try:
        cache = StaticCache(config=model.config, max_cache_len=_LONG)
        for layer in cache.layers:  # counters are made on the CPU
            for name, value in vars(layer).items():
                if isinstance(value, Tensor):
                    setattr(layer, name, value.to("meta"))
        # Some models look for padding in the ids, which have no values here. Of the forms of
        # experts, the default needs bfloat16 on this device, and "eager" reads values.
        model.config.pad_token_id = None
        model.config._experts_implementation = "batched_mm"
        ids = torch.zeros(1, 1, dtype=torch.int64, device="meta")
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    except Exception as error:  # whatever a model makes of an empty cache on this device
        raise UnsupportedModelError(
            f"the cache of {type(model).__name__} cannot be sized: a forward of one token with a "
            f"static cache fails without weights ({reason(error)})"
        ) from error
    return tuple(_shape(layer) for layer in cache.layers)


def _shape(layer: Any) -> LayerShape:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    grows = isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == 4
    heads = head_dim = slot_bytes = 0
    slots: int | None = 0
    if grows:
        _, heads, slots, head_dim = keys.shape
        slot_bytes = (keys.nbytes + values.nbytes) // slots
        slots = None if slots == _LONG else slots
    state = counters = 0
    for tensor in _all_tensors(vars(layer)):
        if grows and (tensor is keys or tensor is values):
            continue
        if tensor.ndim == 0:
            counters += tensor.nbytes
        else:
            state += tensor.nbytes
    return LayerShape(type(layer).__name__, heads, head_dim, slot_bytes, slots, state, counters)


def _all_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    if isinstance(items, (str, bytes)) or not hasattr(items, "__iter__"):
        return []
    return [tensor for item in items for tensor in _all_tensors(item)]
