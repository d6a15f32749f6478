"""The compiled decode step on CPU: fused loops, and work that follows the live length."""

from __future__ import annotations

import time

import torch
from torch._inductor.utils import run_and_get_code

import kvarn_ops.lowering
from kvarn_ops import KVarNConfig
from kvarn_ops.ops.samples import filled_cache


@torch.no_grad()
def test_loops_are_fused_and_follow_the_live_length(fresh_dynamo, unpoisoned) -> None:
    config = KVarNConfig()
    capacity, q_heads = 16384, 16
    cache, rotation = filled_cache(
        config, [300], "cpu", num_kv_heads=4, head_dim=128, max_cache_len=capacity
    )
    q, (k, v) = torch.randn(1, q_heads, 1, 128), torch.randn(2, 1, 4, 1, 128)
    tail = (rotation, None, 128**-0.5, 0.0, True, config.to_string(), "aten")

    def step(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.ops.kvarn.step_(q, k, v, None, *tensors, *tail)

    compiled = torch.compile(step, fullgraph=True, options=kvarn_ops.lowering.inductor_options())

    def at(length: int) -> torch.Tensor:
        cache.seq_lens.fill_(length)
        return compiled(*cache)

    _, code = run_and_get_code(at, 300)
    loads = "\n".join(code).count("Vectorized<uint8_t>::loadu")
    hinted = hasattr(torch._dynamo, "override_optimization_hint")  # torch >= 2.13
    assert not hinted or loads <= 2, (
        f"packed bytes are read by {loads} loops instead of one for K and one for V: Inductor no "
        "longer merges the query heads of a group, and every head unpacks the codes again"
    )

    def best(length: int) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            at(length)
            times.append(time.perf_counter() - start)
        return min(times)

    short, full = best(600), best(capacity - 200)
    assert short < full / 3, f"{short * 1e3:.2f} ms at 600 tokens, {full * 1e3:.2f} ms when full"
