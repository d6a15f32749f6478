"""`KVarNLayer`: one transformers cache layer over packed tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .._compat import is_compiling, mark_static
from ..config import KVarNConfig
from ..errors import CacheCropError, CacheError, UnsupportedModelError
from ..hadamard import check_head_dim, hadamard
from ..layout import TileCache, allocate
from ..ops.validate import check_new_tokens

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
    ) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.config = config
        self.config_line = config.to_string()
        self.backend = backend
        self.tiles: TileCache | None = None
        self.rotation: Tensor | None = None
        self.armed = False  # set by a patched module right before its update
        self.cumulative_length = torch.tensor(0, dtype=torch.int64)  # slots, padding included
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
        dtype, device = key_states.dtype, key_states.device
        tiles = allocate(self.config, batch, heads, head_dim, self.max_cache_len, dtype, device)
        if not is_compiling():
            check_new_tokens(key_states, value_states, None, tiles, self.config)
        self.tiles, self.dtype, self.device, self.batch_size = tiles, dtype, device, batch
        rotated = self.config.rotate_keys or self.config.rotate_values
        width = head_dim if rotated else 0
        if (width, self.device) not in self._rotations:
            matrix = hadamard(width, device=self.device) if rotated else torch.zeros(0, 0)
            self._rotations[width, self.device] = matrix
        self.rotation = self._rotations[width, self.device]
        self.cumulative_length = self.cumulative_length.to(self.device)
        self._high_water = torch.zeros_like(self.tiles.seq_lens)
        if not is_compiling():
            for tensor in (*self.tiles, self.cumulative_length, self.rotation):
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

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """A negative offset marks masks for KVarN layers (`kvarn_ops.hf.attention`).

        Mask functions of a model that is not patched can live with it, until `update` refuses.
        """
        return query_length, -1

    def get_seq_length(self) -> Any:
        """Slots used so far, padding included: a tensor once initialized, as in StaticLayer."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Slots in all."""
        return self.max_cache_len

    get_max_cache_shape = get_max_length  # its name before transformers 5.17

    def reset(self) -> None:
        """Empty the layer; memory and addresses stay."""
        if self.tiles is not None:
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
        lengths, config = self.tiles.seq_lens, self.config
        if count > config.tail_tokens:
            raise CacheCropError(
                f"cannot remove {count} tokens: only the newest tail_tokens={config.tail_tokens} "
                "can be removed exactly. Patch with a larger tail_tokens, or reset() the cache."
            )
        if count > int(lengths.min()):
            raise CacheCropError(
                f"cannot remove {count} tokens from a row that holds {int(lengths.min())}."
            )
        high_water = torch.maximum(self._high_water, lengths)
        for new, high in zip((lengths - count).tolist(), high_water.tolist(), strict=True):
            needed = config.num_tiles(new) * config.group_size  # first token of the new tail
            held = high - config.num_sink_tokens - config.ring_len
            if new - config.num_sink_tokens > needed and needed < held:
                raise CacheCropError(
                    f"cannot remove {count} tokens: together with earlier crops this reaches "
                    "tokens that are no longer held in full precision. Use a larger tail_tokens."
                )
        self._high_water.copy_(high_water)
        lengths.sub_(count)
        self.cumulative_length.sub_(count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the rows (beam search), in place."""
        if self.tiles is not None:
            index = beam_idx.to(self.device)
            for tensor in (*self.tiles, self._high_water):
                tensor.copy_(tensor.index_select(0, index))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the layer gets new memory."""
        if self.tiles is not None:
            rows = torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats)
            self._take_rows(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows; the layer gets new memory."""
        if self.tiles is not None:
            rows = torch.arange(self.batch_size, device=self.device)
            self._take_rows(rows[indices.to(self.device)])

    def _take_rows(self, rows: Tensor) -> None:
        assert self.tiles is not None
        self.tiles = TileCache(*(tensor.index_select(0, rows) for tensor in self.tiles))
        self._high_water = self._high_water.index_select(0, rows)
        self.batch_size = len(rows)
        for tensor in self.tiles:
            mark_static(tensor)

    def offload(self) -> None:
        """Not offered: a packed layer is already small."""
        raise CacheError("KVarN layers cannot be offloaded: create the cache without offloading.")

    prefetch = offload
