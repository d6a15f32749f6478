"""Eager attention on CPU is no slower than dequantizing everything and calling SDPA."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from kvarn_ops import KVarNConfig
from kvarn_ops.ops.samples import filled_cache


def best_of(function, rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def test_no_slower_than_dequantize_then_sdpa(unpoisoned) -> None:
    config = KVarNConfig()
    length, heads, dim = 4096, 4, 128
    cache, rotation = filled_cache(
        config, [length], "cpu", num_kv_heads=heads, head_dim=dim, max_cache_len=length + 256
    )
    tiles, line = config.num_tiles(length), config.to_string()
    q = torch.randn(1, 4 * heads, 1, dim)
    equalizers = [x.unsqueeze(2) for x in (cache.k_equalizer, cache.v_equalizer)]

    def packed() -> torch.Tensor:
        return torch.ops.kvarn.attention(
            q, *cache, rotation, None, dim**-0.5, 0.0, True, line, "aten"
        )

    def dequantized() -> torch.Tensor:
        live = cache.tiles(0, tiles)
        k = torch.ops.kvarn.dequantize_keys(*live[:3], rotation, equalizers[0], line)
        v = torch.ops.kvarn.dequantize_values(*live[3:6], rotation, equalizers[1], line)
        k, v = k.flatten(2, 3), v.flatten(2, 3)
        k = torch.cat([cache.k_sink, k, cache.k_tail[:, :, : length - 128 - 128 * tiles]], 2)
        v = torch.cat([cache.v_sink, v, cache.v_tail[:, :, : length - 128 - 128 * tiles]], 2)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    torch.testing.assert_close(packed(), dequantized(), rtol=1e-3, atol=1e-4)
    assert best_of(packed) <= best_of(dequantized)
