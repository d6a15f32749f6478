"""`KVCache`: packed keys and values of one attention layer, for models of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch
from ._compat import is_compiling, mark_static
from .config import DEFAULT_PRESET, KVarNConfig
from .errors import InputError
from .hadamard import check_head_dim, hadamard
from .layout import TileCache, allocate
from .ops.validate import check_new_tokens

__all__ = ["KVCache"]

_OPS = torch.ops.kvarn
# Their dtype is part of the stored format: `module.to(torch.bfloat16)` must not change it.
_FIXED_DTYPE = {*TileCache._fields[:6], "k_equalizer", "v_equalizer", "rotation"}


class KVCache(nn.Module):
    """A KV cache in packed tiles, in place of two dense buffers `[B, H_kv, max_cache_len, D]`.

    ``update`` has the form that most model code expects: it stores the new tokens and returns all
    keys and values, dense. In a compiled model the pass `FuseAttention` removes these dense copies
    and reads the tiles where the attention is computed. ``append`` and ``attend`` do the same
    without a pass, also in eager mode.

    Parameters
    ----------
    batch_size, num_kv_heads, head_dim, max_cache_len : int
        Sizes of the dense buffers that this replaces.
    config : KVarNConfig or str
        Config or preset name.
    dtype : torch.dtype, optional
        Of keys, values and results; torch's default dtype if absent.
    device : torch.device or str, optional
        Where the cache lives; torch's default device if absent.
    backend : {"auto", "reference", "aten", "triton"}
        As in `kvarn_ops.patch`.
    **config_overrides
        Fields of `KVarNConfig`, for example `tail_tokens=512`.

    Raises
    ------
    ConfigError
        For an invalid config.
    BackendError
        If the backend cannot run on the device.
    InputError
        For an unsupported head_dim or a size that is not positive.

    Examples
    --------
    >>> cache = kvarn_ops.KVCache(1, 8, 128, 32_768, dtype=torch.bfloat16)
    >>> cache.append(k, v, input_pos=positions)          # [1, 8, S, 128] each, [S]
    >>> out = cache.attend(q)                            # [1, 32, S, 128]
    """

    seq_lens: Tensor
    high_water: Tensor
    rotation: Tensor

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        max_cache_len: int,
        config: KVarNConfig | str = DEFAULT_PRESET,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
        **config_overrides: Any,
    ) -> None:
        from .patching import Lifetime  # it imports the passes

        super().__init__()
        sizes = {"batch_size": batch_size, "num_kv_heads": num_kv_heads}
        for name, size in (sizes | {"max_cache_len": max_cache_len}).items():
            if size < 1:
                raise InputError(f"{name}={size} is not valid: give an integer >= 1.")
        self.config = KVarNConfig.coerce(config, **config_overrides)
        self.config_line = self.config.to_string()
        self.max_cache_len = max_cache_len
        rotated = self.config.rotate_keys or self.config.rotate_values
        check_head_dim(head_dim, rotated)
        dtype = dtype or torch.get_default_dtype()
        device = torch.device(device) if device is not None else torch.get_default_device()
        self._wanted_backend = backend
        self.backend = dispatch.resolve(backend, device)
        tiles = allocate(
            self.config, batch_size, num_kv_heads, head_dim, max_cache_len, dtype, device
        )
        for name, tensor in tiles._asdict().items():
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("high_water", torch.zeros_like(tiles.seq_lens), persistent=False)
        matrix = hadamard(head_dim, device=device) if rotated else torch.zeros(0, 0, device=device)
        self.register_buffer("rotation", matrix, persistent=False)
        self._fix_addresses()
        self._passes = Lifetime()

    def extra_repr(self) -> str:
        """Sizes and format."""
        batch, heads, _, head_dim = self.tiles.k_tail.shape
        return f"{batch}, {heads}, {head_dim}, {self.max_cache_len}, {self.config_line!r}"

    @property
    def tiles(self) -> TileCache:
        """The stored tensors; shapes in `kvarn_ops.layout`."""
        return TileCache(*(getattr(self, name) for name in TileCache._fields))

    def update(
        self, k: Tensor, v: Tensor, *, input_pos: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens and return everything stored, dense.

        Parameters
        ----------
        k, v : Tensor
            `[B, H_kv, S, D]` in the cache's dtype, keys after their position embedding.
        input_pos : Tensor, optional
            `[S]` int64 positions of the new tokens, consecutive; only the first is read. It is
            the length of the rows before: 0 starts a new sequence, less than the length removes
            the tokens from there on. None appends.

        Returns
        -------
        k_hat, v_hat : Tensor
            `[B, H_kv, max_cache_len, D]` in the original frame, zeros beyond a row's length.

        Raises
        ------
        CacheError
            If the tokens do not fit or leave a gap. Nothing is stored then. In compiled code on a
            GPU nothing is raised, and the rows' results are NaN until a new sequence starts.
        CacheCropError
            If tokens were to be removed that are no longer held in full precision.
        InputError
            For wrong shapes, dtypes or devices.
        """
        self.append(k, v, input_pos=input_pos)
        return self.dequantized()

    def append(self, k: Tensor, v: Tensor, *, input_pos: Tensor | None = None) -> None:
        """Store new tokens; arguments and errors as in `update`."""
        if not is_compiling():
            check_new_tokens(k, v, None, self.tiles, self.config)
            _check_positions(input_pos, k)
        position = self.seq_lens.clone() if input_pos is None else input_pos
        _OPS.append_at_(
            k, v, position, self.high_water, *self.tiles, self.rotation, self.config_line,
            self.backend, self.max_cache_len,
        )  # fmt: skip

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H_kv, max_cache_len, D]`, zeros beyond a row's length."""
        return _OPS.dequantize(
            *self.tiles, self.rotation, self.config_line, self.backend, self.max_cache_len
        )

    def attend(
        self,
        q: Tensor,
        *,
        mask: Tensor | None = None,
        is_causal: bool = True,
        scale: float | None = None,
        softcap: float = 0.0,
        sink_logits: Tensor | None = None,
        window: int = 0,
    ) -> Tensor:
        """Attention over what is stored, the newest tokens included.

        Parameters
        ----------
        q : Tensor
            `[B, H_q, S, D]` in the original frame, H_q a multiple of H_kv.
        mask : Tensor, optional
            `[B or 1, H_q or 1, S or 1, T]`, bool (True: is seen) or float (added to the scores);
            columns are positions. Tokens at T or later are not seen.
        is_causal : bool
            The queries belong to the S newest tokens, and none sees a later one. False: every
            query sees every token that the mask shows.
        scale : float, optional
            Factor of the scores; `D ** -0.5` if absent.
        softcap : float
            Scores become `softcap * tanh(scores / softcap)`, before the mask; 0 means none.
        sink_logits : Tensor, optional
            `[H_q]` logits of attention sinks.
        window : int
            A query sees its own position and the `window - 1` before; 0 means all.

        Returns
        -------
        Tensor
            `[B, H_q, S, D]` in q's dtype; zeros where a query sees nothing.

        Raises
        ------
        InputError
            For shapes, dtypes or devices that do not fit.
        """
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return _OPS.attention(
            q, *self.tiles, self.rotation, sink_logits, scale, softcap, is_causal,
            self.config_line, self.backend, window, mask,
        )  # fmt: skip

    def reset(self) -> None:
        """Empty the cache; memory and addresses stay."""
        for tensor in (*self.tiles, self.high_water):
            tensor.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KVCache:
        kept = {name: self._buffers.pop(name) for name in _FIXED_DTYPE}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            assert tensor is not None
            self._buffers[name] = tensor.to(fn(tensor[..., :0]).device)
        self.backend = dispatch.resolve(self._wanted_backend, self.seq_lens.device)
        self._fix_addresses()
        return self

    def _fix_addresses(self) -> None:
        for tensor in (*self.tiles, self.high_water, self.rotation):
            mark_static(tensor)


def _check_positions(input_pos: Tensor | None, k: Tensor) -> None:
    """Positions are int64, as many as tokens (or the first alone), and consecutive."""
    if input_pos is None:
        return
    flat = input_pos.flatten()
    if input_pos.dtype not in (torch.int64, torch.int32) or len(flat) not in (1, k.shape[2]):
        raise InputError(
            f"input_pos is {input_pos.dtype} {tuple(input_pos.shape)}: give the int64 positions "
            f"of the {k.shape[2]} new tokens, or the first alone."
        )
    if len(flat) > 1 and not flat.is_cuda and bool((flat.diff() != 1).any()):
        raise InputError(
            f"input_pos {flat.tolist()[:8]} is not consecutive: tokens are stored one after "
            "another. Other positions (gaps, several sequences in a row) need another cache."
        )
