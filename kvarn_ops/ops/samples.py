"""`sample_inputs`: arguments for every op, for opcheck, benchmarks and readers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..config import KVarNConfig
from ..errors import InputError
from ..hadamard import hadamard
from ..layout import TileCache, allocate
from .append import store
from .plain import prepared
from .read_only import as_engines_take

__all__ = ["OP_NAMES", "sample_inputs"]

OP_NAMES = (
    "quantize_keys",
    "quantize_values",
    "dequantize_keys",
    "dequantize_values",
    "append",
    "append_",
    "append_at",
    "append_at_",
    "attend_slots",
    "attention",
    "dequantize",
    "step",
    "step_",
    "step_attention",
    "step_shared",
    "step_shared_",
)

_HEADS, _DIM, _ROWS = 2, 64, 2
_SMALL = KVarNConfig(group_size=32, num_sink_tokens=32)


def sample_inputs(
    op_name: str, device: torch.device | str = "cpu"
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield `(args, kwargs)` for `torch.ops.kvarn.<op_name>`: several configs, fresh tensors.

    Parameters
    ----------
    op_name : str
        Bare name, for example `"step_"`.
    device : str or torch.device
        Where the tensors live.

    Raises
    ------
    InputError
        If there is no such op.
    """
    if op_name not in OP_NAMES:
        raise InputError(f"there is no op kvarn::{op_name}. Ops: {', '.join(OP_NAMES)}.")
    for key_bits, value_bits, encoder, tail in ((4, 2, "plus", 0), (2, 3, "paper", 32)):
        config = KVarNConfig.coerce(
            _SMALL, key_bits=key_bits, value_bits=value_bits, encoder=encoder, tail_tokens=tail
        )
        yield from _samples(op_name, config, torch.device(device))


def filled_cache(
    config: KVarNConfig,
    lengths: list[int],
    device: torch.device | str,
    *,
    num_kv_heads: int = _HEADS,
    head_dim: int = _DIM,
    max_cache_len: int = 256,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[TileCache, Tensor]:
    """A cache with random rows of the given lengths, and its rotation matrix."""
    generator = torch.Generator().manual_seed(seed)
    cache = allocate(
        config, len(lengths), num_kv_heads, head_dim, max_cache_len, dtype, torch.device(device)
    )
    rotation = hadamard(head_dim, device=device)
    longest = max(lengths, default=0)
    if longest:
        shape = (2, len(lengths), num_kv_heads, longest, head_dim)
        k, v = torch.randn(shape, generator=generator).to(device, dtype)
        valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
        store(cache, k, v, valid.to(device), rotation, config)
    return cache, rotation


def _samples(
    op_name: str, config: KVarNConfig, device: torch.device
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    line = config.to_string()
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    rotation = hadamard(_DIM, device=device)
    if "quantize_" in op_name:
        equalizer = randn(2, _DIM).half() if config.equalizes else None
        options = (rotation, equalizer, line)
        args: tuple[Any, ...] = (randn(2, config.group_size, _DIM), *options)
        if op_name.startswith("de"):
            quantize = getattr(torch.ops.kvarn, op_name.removeprefix("de"))
            args = (*quantize(*args), *options)
        yield args, {}
        return
    queries_heads = 2 * _HEADS
    for lengths, count, masked in (
        ([150, 33], 1, False),
        ([150, 33], 40, True),
        ([0, 0], 5, False),
    ):
        cache, rotation = filled_cache(config, lengths, device)
        k, v = randn(2, _ROWS, _HEADS, count, _DIM)
        valid = torch.ones(_ROWS, count, dtype=torch.bool, device=device) if masked else None
        if valid is not None:
            valid[0, :7] = False
        q = randn(_ROWS, queries_heads, count, _DIM)
        sink_logits = randn(queries_heads) if masked else None
        scale, softcap = _DIM**-0.5, 30.0 if masked else 0.0
        options = (rotation, sink_logits, scale, softcap, True, line, "aten")
        if op_name.startswith("append_at"):
            at = torch.tensor([min(lengths) - config.tail_tokens]).clamp_min(0).to(device)
            cache.seq_lens.fill_(min(lengths))
            yield (k, v, at, cache.seq_lens.clone(), *cache, rotation, line, "aten", 256), {}
        elif op_name.startswith("append"):
            yield (k, v, valid, *cache, rotation, line, "aten"), {}
        elif op_name == "dequantize":
            yield (*cache, rotation, line, "aten", 256), {}
        elif op_name == "attention":
            mask = randn(_ROWS, 1, count, 140) > 0 if masked else None
            yield (q, *cache, *options, 0, mask), {}
        elif op_name == "attend_slots":
            rows = q.reshape(_ROWS, _HEADS, -1, _DIM)
            rotated, unit = prepared(rows, cache.k_equalizer, rotation, config)
            cache = as_engines_take(cache)
            tensors = (rows, rotated.half(), unit, *cache[:-3], k, v, cache.seq_lens)
            yield (*tensors, scale, softcap, config.tail_tokens, 2, 2, 3), {}
        elif op_name == "step_attention":
            cache = as_engines_take(cache)
            yield (q, k, v, *cache, rotation, sink_logits, scale, softcap, line, "aten"), {}
        elif "shared" not in op_name:
            yield (q, k, v, valid, *cache, *options), {}
        elif min(lengths) >= config.num_sink_tokens:
            sources = _ROWS if masked else 1
            donor, _ = filled_cache(config, [200] * sources, device, seed=1)
            yield (q, k, v, valid, *donor.tiles(0, 3), *cache, *options), {}
