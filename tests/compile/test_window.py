"""A compiled decode step with a sliding window: one graph for all positions."""

from __future__ import annotations

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kvarn_ops import KVarNConfig
from kvarn_ops.layout import TileCache
from kvarn_ops.ops.samples import filled_cache


def test_compiled_window_equals_eager(fresh_dynamo: None) -> None:
    config = KVarNConfig(group_size=32, num_sink_tokens=32)
    cache, rotation = filled_cache(config, [150, 40], "cpu", num_kv_heads=2, head_dim=32)
    twin = TileCache(*(x.clone() for x in cache))
    rest = (rotation, None, 0.2, 0.0, True, config.to_string(), "aten", 50)

    def step(q, k, v, *cache):
        return torch.ops.kvarn.step_(q, k, v, None, *cache, *rest)

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(40):
            q, (k, v) = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 2, 1, 32)
            torch.testing.assert_close(
                compiled(q, k, v, *cache), step(q, k, v, *twin), rtol=1e-4, atol=1e-5
            )
    assert counter.frame_count == 1
