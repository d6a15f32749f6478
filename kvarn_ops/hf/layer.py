"""`KVarNLayer`: one transformers cache layer over packed tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .. import dispatch
from .._compat import is_compiling, mark_static, query_count
from ..config import KVarNConfig
from ..crop import check_crop
from ..errors import CacheError, UnsupportedModelError
from ..hadamard import check_head_dim, hadamard
from ..layout import PackedTiles, TileCache, allocate
from ..ops.append import drop_open_equalizers
from ..ops.validate import check_new_tokens
from .frame import OWN_FRAME, forms
from .rows import selected, selected_shared

__all__ = ["KVarNLayer"]

NOT_PATCHED = (
    "this KVarNCache is used by a model that is not patched: call kvarn_ops.patch(model) first, or "
    "pass another cache."
)


class KVarNLayer(CacheLayerMixin):
    """Packed keys and values of one attention layer.

    `update` returns the new keys and values only: the attention function of a patched model reads
    the rest through `kvarn::step_`, which also stores the new ones. Nothing is allocated before the
    first forward.

    Parameters
    ----------
    max_cache_len : int
        Slots per row, padding included.
    config : KVarNConfig
        How tokens are stored.
    backend : str
        A resolved backend (`kvarn_ops.dispatch.resolve`).
    rotations : dict
        Rotation matrices by (head_dim, device), shared by the layers of a cache.
    offload_tiles : bool
        Keep finished tiles in CPU memory.

    Attributes
    ----------
    tiles : TileCache or None
        What the layer stores; None before the first use.
    shared : PackedTiles or None
        Tiles between the sinks and the layer's own tiles that other layers read too
        (`kvarn_ops.hf.fork`). `tiles.seq_lens` does not count their tokens.
    frozen_tiles : int
        The first tiles of `tiles` that forks read: never written again.
    """

    is_compileable = True
    is_croppable = True
    is_sliding = False
    cumulative_length: Tensor

    def __init__(
        self,
        max_cache_len: int,
        config: KVarNConfig,
        backend: str,
        rotations: dict[tuple[int, torch.device], Tensor],
        offload_tiles: bool = False,
    ) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.forms = forms(config)
        self.config, self.config_line = self.forms[False]
        self.backend = backend
        self.tiles: TileCache | None = None
        self.rotation: Tensor | None = None
        self.armed = False  # set by a patched module right before its update
        self.frame = OWN_FRAME  # in which values arrive (`hf.frame`)
        self.cumulative_length = torch.tensor(0, dtype=torch.int64)  # slots, padding included
        self.shared: PackedTiles | None = None
        self.frozen_tiles = 0
        self.offload_tiles = offload_tiles
        if offload_tiles:
            self.is_compileable = False  # compiled code cannot mix devices
        self._rotations = rotations

    def __repr__(self) -> str:
        return f"KVarNLayer({self.config_line}, max_cache_len={self.max_cache_len})"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch size, heads, dtype and device of the first keys."""
        batch, heads, _, head_dim = key_states.shape
        if value_states.shape[-1] != head_dim:
            raise UnsupportedModelError(
                f"keys have head_dim {head_dim} and values {value_states.shape[-1]}: layers with "
                "different widths are not supported."
            )
        check_head_dim(head_dim, self.config.rotate_keys or self.config.rotate_values)
        tiles = self.allocated(batch, heads, head_dim, key_states.dtype, key_states.device)
        if not is_compiling():
            check_new_tokens(key_states, value_states, None, tiles, self.config)
        self.adopt(tiles)

    def allocated(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        slots: int | None = None,
    ) -> TileCache:
        """Empty storage for `slots` tokens per row (None: the layer's capacity)."""
        slots = self.max_cache_len if slots is None else slots
        shape = (batch, heads, head_dim, slots)
        return allocate(self.config, *shape, dtype, device, self.offload_tiles)

    def adopt(
        self,
        tiles: TileCache,
        shared: PackedTiles | None = None,
        high_water: Tensor | None = None,
    ) -> None:
        """Make storage the layer's own, whatever it held before.

        `high_water` `[B]` int64 is the most tokens that each row held (None: 0), for `crop`.
        """
        head_dim, device = tiles.k_tail.shape[-1], tiles.k_tail.device
        if device.type == "cpu" and self.backend == "triton" and dispatch.traces_kernels():
            self.backend = "aten"  # made where there is a GPU, used or moved elsewhere
        self.tiles, self.shared, self.frozen_tiles = tiles, shared, 0
        self.dtype, self.device, self.batch_size = tiles.k_tail.dtype, device, len(tiles.seq_lens)
        rotated = self.config.rotate_keys or self.config.rotate_values
        width = head_dim if rotated else 0
        if (width, device) not in self._rotations:
            matrix = hadamard(width, device=device) if rotated else torch.zeros(0, 0)
            self._rotations[width, device] = matrix
        self.rotation = self._rotations[width, device]
        self.cumulative_length = self.cumulative_length.to(device)
        self._high_water = torch.zeros_like(tiles.seq_lens) if high_water is None else high_water
        if not is_compiling():
            for tensor in (*tiles, *(shared or ()), self.cumulative_length, self.rotation):
                mark_static(tensor)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Check the new tokens and hand them on; see the class docstring."""
        if not self.armed:
            raise CacheError(NOT_PATCHED)
        self.armed = False
        if not is_compiling():
            self.check_room(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif not is_compiling():
            assert self.tiles is not None
            check_new_tokens(key_states, value_states, None, self.tiles, self.config)
        return key_states, value_states

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None,
        sink_logits: Tensor | None, scale: float, softcap: float,
    ) -> Tensor:  # fmt: skip
        """`[B, H_q, S, D]`: attention to what is stored and to new tokens, which are then stored.

        Exporters whose programs store elsewhere put their own in its place (`kvarn_ops.export`).
        """
        assert self.tiles is not None
        step = torch.ops.kvarn.step_ if self.shared is None else torch.ops.kvarn.step_shared_
        return step(
            query, key, value, valid, *(self.shared or ()), *self.tiles, self.rotation, sink_logits,
            scale, softcap, True, self.config_line, self.backend,
        )  # fmt: skip

    def check_room(self, new: Tensor) -> None:
        """Raise `CacheError` if the new keys have another batch size or do not fit."""
        batch, count = new.shape[0], new.shape[2]
        if self.is_initialized and batch != self.batch_size:
            raise CacheError(
                f"the cache was allocated for batch size {self.batch_size} at its first use and "
                f"now gets {batch}: make a new cache for another batch size."
            )
        # On a GPU reading the length would stall every layer of every step.
        if count == 1 and new.device.type != "cpu":
            return
        needed = int(self.cumulative_length) + count
        if needed > self.max_cache_len:
            raise CacheError(
                f"the cache has room for {self.max_cache_len} tokens per row and {needed} are "
                f"needed: create it with max_cache_len={needed} or more."
            )

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """A negative offset marks masks for KVarN layers (`kvarn_ops.hf.attention`).

        Mask functions of a model that is not patched can live with it, until `update` refuses.
        """
        return query_count(query_length), -1

    def get_seq_length(self) -> Any:
        """Slots used so far, padding included: a tensor once initialized, as in StaticLayer."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Slots in all."""
        return self.max_cache_len

    get_max_cache_shape = get_max_length  # its name before transformers 5.17

    def reset(self) -> None:
        """Empty the layer; memory and addresses stay, unless tiles are shared with a fork."""
        if self.tiles is not None and (self.shared is not None or self.frozen_tiles):
            batch, heads, _, head_dim = self.tiles.k_tail.shape
            self.adopt(self.allocated(batch, heads, head_dim, self.dtype, self.device))
        elif self.tiles is not None:
            for tensor in self.tiles:
                tensor.zero_()
            self._high_water.zero_()
        self.cumulative_length.zero_()
        self.armed = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens of every row, exactly.

        Raises
        ------
        CacheCropError
            If a removed token, or one that becomes part of the tail again, is no longer held in
            full precision: more than `tail_tokens` tokens were to be removed.
        """
        count = -tokens_to_remove
        if count < 0:
            raise CacheError(
                f"crop({tokens_to_remove}): give the number of tokens to remove as a negative "
                "number."
            )
        if count == 0 or self.tiles is None:
            return
        lengths = self.tiles.seq_lens
        high_water = torch.maximum(self._high_water, lengths)
        closed = self.frozen_tiles if self.frozen_tiles or self.shared is not None else None
        check_crop(count, lengths, high_water, self.config, closed)
        self._high_water.copy_(high_water)
        lengths.sub_(count)
        if self.shared is None:
            drop_open_equalizers(self.tiles, self.config)
        self.cumulative_length.sub_(count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the rows (beam search), in place unless tiles are shared with a fork."""
        if self.tiles is None:
            return
        index = beam_idx.to(self.device)
        if self.frozen_tiles or self.shared is not None:
            self.select_rows(index)
            return
        for tensor in (*self.tiles, self._high_water):
            tensor.copy_(tensor.index_select(0, index.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the layer gets new memory."""
        if self.tiles is not None:
            rows = torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats)
            self.select_rows(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows; the layer gets new memory."""
        if self.tiles is not None:
            rows = torch.arange(self.batch_size, device=self.device)
            self.select_rows(rows[indices.to(self.device)])

    def select_rows(self, rows: Tensor) -> None:
        """Make rows `rows` `[n]` int64 of the batch the new batch, in new memory."""
        assert self.tiles is not None
        shared = self.shared
        if shared is not None:
            shared = selected_shared(shared, rows, self.batch_size)
        high_water = self._high_water.index_select(0, rows)
        self.adopt(TileCache(*selected(self.tiles, rows)), shared, high_water)

    def offload(self) -> None:
        """Not offered: transformers would move whole layers to and fro in every step."""
        raise CacheError(
            "KVarN layers are not offloaded this way: use "
            "KVarNCache(..., offload_tiles=True), which keeps finished tiles in CPU memory."
        )

    prefetch = offload

    def to_device(
        self, device: torch.device, rotations: dict[tuple[int, torch.device], Tensor]
    ) -> None:
        """Move the layer, rotation matrices excepted; offloaded tiles stay in CPU memory."""
        if self.tiles is None or device == self.device:
            return
        self._rotations = rotations
        staying = PackedTiles._fields if self.offload_tiles else ()
        moved = {
            name: tensor if name in staying else tensor.to(device)
            for name, tensor in self.tiles._asdict().items()
        }
        shared, frozen, high_water = self.shared, self.frozen_tiles, self._high_water.to(device)
        if shared is not None and not self.offload_tiles:
            shared = PackedTiles(*(tensor.to(device) for tensor in shared))
        self.adopt(TileCache(**moved), shared, high_water)
        self.frozen_tiles = frozen if self.offload_tiles else 0
