"""Decode steps by kernels and by the reference, side by side."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvarn_ops import KVarNConfig
from kvarn_ops.layout import TileCache
from kvarn_ops.ops.samples import filled_cache

CODES = ("k_codes", "v_codes")
SCALES = ("k_channel_affine", "k_token_scale", "v_token_affine", "v_channel_scale")
EQUALIZERS = ("k_equalizer", "v_equalizer")
DENSE = ("k_sink", "v_sink", "k_tail", "v_tail", "seq_lens")


class Problem(NamedTuple):
    """Arguments of a step, and the config they are made for."""

    config: KVarNConfig
    cache: TileCache
    rotation: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None
    sink_logits: Tensor | None
    softcap: float
    causal: bool
    window: int = 0

    def step(self, backend: str) -> tuple[Tensor, TileCache]:
        """Output and cache after `kvarn::step`; the problem's own cache stays as it is."""
        out, *cache = torch.ops.kvarn.step(
            self.q, self.k, self.v, self.valid, *self.cache, self.rotation, self.sink_logits,
            self.q.shape[-1] ** -0.5, self.softcap, self.causal, self.config.to_string(), backend,
            self.window,
        )  # fmt: skip
        return out, TileCache(*cache)

    def attention(self, backend: str, mask: Tensor | None = None) -> Tensor:
        """Output of `kvarn::attention`: the cache alone."""
        return torch.ops.kvarn.attention(
            self.q, *self.cache, self.rotation, self.sink_logits, self.q.shape[-1] ** -0.5,
            self.softcap, self.causal, self.config.to_string(), backend, self.window, mask,
        )  # fmt: skip


def make_problem(
    preset: str,
    head_dim: int,
    lengths: list[int],
    new_tokens: int,
    device: torch.device,
    *,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float32,
    valid: Tensor | None = None,
    sink_logits: bool = False,
    softcap: float = 0.0,
    causal: bool = True,
    window: int = 0,
    **fields: Any,
) -> Problem:
    """Random rows of the given lengths; what a cache does not hold is poisoned."""
    fields = {"num_sink_tokens": 32} | fields
    config = KVarNConfig.from_preset(preset, **fields)
    q_heads, kv_heads = heads
    cache, rotation = filled_cache(
        config, lengths, "cpu", num_kv_heads=kv_heads, head_dim=head_dim, max_cache_len=640,
        dtype=dtype,
    )  # fmt: skip
    poison_unused(cache, config)
    generator = torch.Generator().manual_seed(1)
    rows = len(lengths)
    q = torch.randn(rows, q_heads, new_tokens, head_dim, generator=generator).to(dtype)
    k, v = torch.randn(2, rows, kv_heads, new_tokens, head_dim, generator=generator).to(dtype)
    logits = torch.randn(q_heads, generator=generator) if sink_logits else None

    def there(x: Tensor | None) -> Any:
        return None if x is None else x.to(device)

    return Problem(
        config, TileCache(*(x.to(device) for x in cache)), rotation.to(device), there(q),
        there(k), there(v), there(valid), there(logits), softcap, causal, window,
    )  # fmt: skip


def poison_unused(cache: TileCache, config: KVarNConfig) -> None:
    """NaN, or all ones, wherever no live token or tile is stored."""
    for row, length in enumerate(cache.seq_lens.tolist()):
        tiles, body = config.num_tiles(length), max(0, length - config.num_sink_tokens)
        for name in (*CODES, *SCALES):
            tensor = getattr(cache, name)[row, :, tiles:]
            tensor.fill_(255 if tensor.dtype == torch.uint8 else torch.nan)
        held = torch.zeros(config.ring_len, dtype=torch.bool)
        held[torch.arange(tiles * config.group_size, body) % config.ring_len] = True
        for side in "kv":
            getattr(cache, f"{side}_sink")[row, :, length:] = torch.nan
            getattr(cache, f"{side}_tail")[row, :, ~held] = torch.nan


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of `wanted`."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def share_of_different(found: Tensor, wanted: Tensor) -> float:
    """Share of elements that are not bit-equal; NaN equals NaN."""
    if found.dtype.is_floating_point:
        width = {2: torch.int16, 4: torch.int32}[found.element_size()]
        found, wanted = found.view(width), wanted.view(width)
    return (found != wanted).double().sum().item() / max(1, found.numel())
