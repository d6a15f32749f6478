"""A transformers cache that stores what any method would give back, on the product's schedule.

The first `num_sink_tokens` tokens of a row and its newest ones stay exact; a tile is replaced by
its quantized version when `KVarNConfig.num_tiles` says that the product would have quantized it:
after the forward that completed it. So new tokens meet each other exactly and all earlier tiles
quantized, as in `kvarn::step_`. Storage is dense: this is for measuring quality, not memory.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..config import KVarNConfig
from ..errors import InputError
from .methods import Method

__all__ = ["MethodCache", "MethodLayer"]

_ROOM = 256  # slots by which storage grows


class MethodLayer(DynamicLayer):
    """Keys and values of one layer, `[B, H_kv, T, D]`, quantized tile by tile.

    Parameters
    ----------
    method : Method
        What replaces a tile.
    config : KVarNConfig
        Bits, tile size, sinks and tail.
    starts : list of int or None
        First real slot of each row (left padding); None: 0.
    """

    is_croppable = False

    def __init__(
        self, method: Method, config: KVarNConfig, starts: list[int] | None = None
    ) -> None:
        super().__init__()
        self.method, self.config = method, config
        self.length = 0
        self._starts = starts
        self._tiles_done: dict[int, int] = {}  # by start
        self._first: dict[int, list[Tensor]] = {}  # exact first tiles of K and V, by start
        self._storage: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values; all of them, with what is quantized by now."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.quantize_finished()
        count = key_states.shape[2]
        keys, values = self._with_room(key_states, value_states)
        keys.narrow(2, self.length, count).copy_(key_states)
        values.narrow(2, self.length, count).copy_(value_states)
        self.length += count
        self.keys = keys.narrow(2, 0, self.length)
        self.values = values.narrow(2, 0, self.length)
        return self.keys, self.values

    def quantize_finished(self) -> None:
        """Replace the tiles that became complete since the last call."""
        if self._storage is None:
            return
        starts = self._starts or [0] * self._storage[0].shape[0]
        for start in sorted(set(starts)):
            done = self._tiles_done.get(start, 0)
            ready = self.config.num_tiles(self.length - start)
            if ready == done:
                continue
            rows = [row for row, value in enumerate(starts) if value == start]
            if done == 0:
                first = self._span(start, 0)
                self._first[start] = [x[rows, :, first].float() for x in self._storage]
            for stored, origin, quantize in zip(
                self._storage,
                self._first[start],
                (self.method.keys, self.method.values),
                strict=True,
            ):
                # Tiles go through one at a time: temporaries stay small in a long prefill.
                for tile in range(done, ready):
                    at = self._span(start, tile)
                    exact = stored[rows, :, at]
                    stored[rows, :, at] = quantize(exact.float(), origin, self.config).to(exact)
            self._tiles_done[start] = ready

    def _span(self, start: int, tile: int) -> slice:
        """Slots of a tile of the rows that begin at `start`."""
        first = start + self.config.num_sink_tokens + tile * self.config.group_size
        return slice(first, first + self.config.group_size)

    def get_seq_length(self) -> int:
        """Slots used, padding included."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Not offered: the exact tokens of quantized tiles are gone."""
        raise InputError("an evaluation cache cannot be cropped: make a new one.")

    def _with_room(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        needed = self.length + keys.shape[2]
        if self._storage is None or self._storage[0].shape[2] < needed:
            slots = max(needed, self.length * 5 // 4) + _ROOM
            grown = []
            for old, new in zip(self._storage or (None, None), (keys, values), strict=True):
                batch, heads, _, width = new.shape
                fresh = new.new_zeros(batch, heads, slots, width)
                if old is not None:
                    fresh.narrow(2, 0, self.length).copy_(old.narrow(2, 0, self.length))
                grown.append(fresh)
            self._storage = (grown[0], grown[1])
        return self._storage


class MethodCache(Cache):
    """A cache whose full-attention layers are `MethodLayer`; others stay as transformers has them.

    Parameters
    ----------
    model_config : PreTrainedConfig
        `model.config`.
    method, config, starts
        As in `MethodLayer`.
    """

    def __init__(
        self,
        model_config: Any,
        method: Method,
        config: KVarNConfig,
        starts: list[int] | None = None,
    ) -> None:
        layers = [
            MethodLayer(method, config, starts) if type(layer) is DynamicLayer else layer
            for layer in DynamicCache(config=model_config).layers
        ]
        if not any(isinstance(layer, MethodLayer) for layer in layers):
            raise InputError(
                f"{type(model_config).__name__} describes no full-attention layer: there is "
                "nothing to quantize."
            )
        super().__init__(layers=layers)
