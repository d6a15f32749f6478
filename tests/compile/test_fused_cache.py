"""`KVCache.update` and ordinary attention under `torch.compile`: fused, in place, one graph."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import ReinplaceCounters, counters
from torch._inductor.utils import run_and_get_code

from tests.lowering import forms
from tests.lowering.test_fuse_attention import Attention, B, D, H, Q, T


@pytest.mark.parametrize("name", ["repeat_kv_bool", "enable_gqa", "spelled_out"])
def test_decode_through_inductor(name: str, fresh_dynamo) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, B, H, T, D, generator=generator)
    eager, compiled = (Attention(forms.FUSED[name]).eval() for _ in range(2))
    for module in (eager, compiled):
        module.cache.append(k[:, :, :150], v[:, :, :150], input_pos=torch.arange(150))
    call = torch.compile(compiled, fullgraph=True)
    ReinplaceCounters.clear()
    counters.clear()
    with torch.inference_mode():
        for start in range(150, 190):
            q = torch.randn(B, Q, 1, D, generator=generator)
            part, at = slice(start, start + 1), torch.tensor([start])
            if start == 150:
                got, code = run_and_get_code(call, q, k[:, :, part], v[:, :, part], at)
            else:
                got = call(q, k[:, :, part], v[:, :, part], at)
            wanted = eager(q, k[:, :, part], v[:, :, part], at)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert ReinplaceCounters.get_total_missed() == 0
    text = "\n".join(code)
    assert "append_at_" in text
    assert "kvarn.dequantize" not in text, "the cache is still read back dense"
    assert "kvarn.attention" not in text, "one query per row is not fused"
    assert f"({B}, {H}, {T}, {D})" not in text, "something has the size of a dense cache"
