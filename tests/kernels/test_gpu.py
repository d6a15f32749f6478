"""What only a GPU can show: capture and replay, no waiting, compiled models, long caches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kvarn_ops
from kernel_cases import CODES, relative_error
from kvarn_ops import KVarNConfig
from kvarn_ops.layout import TileCache
from kvarn_ops.ops.samples import filled_cache
from tiny_models import random_ids, run, tiny_model

pytestmark = pytest.mark.gpu

STEPS = 300
CONFIG = KVarNConfig.from_preset("k4v2_g32", num_sink_tokens=32, tail_tokens=16)
HEADS, Q_HEADS, DIM = 2, 8, 64


def clone(cache: TileCache) -> TileCache:
    return TileCache(*(x.clone() for x in cache))


def step(cache: TileCache, rotation: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
         v: torch.Tensor) -> torch.Tensor:  # fmt: skip
    return torch.ops.kvarn.step_(
        q, k, v, None, *cache, rotation, None, DIM**-0.5, 0.0, True, CONFIG.to_string(), "triton"
    )


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(STEPS, 2, Q_HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, STEPS, 2, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    return q, k, v


def test_replayed_graph_equals_launches() -> None:
    """Rows of different lengths finish tiles at different steps of one captured graph."""
    cache, rotation = filled_cache(
        CONFIG, [40, 21], "cuda", num_kv_heads=HEADS, head_dim=DIM, max_cache_len=512,
        dtype=torch.bfloat16,
    )  # fmt: skip
    start, q, k, v = clone(cache), *inputs()
    launched = torch.stack([step(cache, rotation, *(x[i] for x in (q, k, v)))
                            for i in range(STEPS)])  # fmt: skip

    captured = clone(start)
    buffers = [x[0].clone() for x in (q, k, v)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(clone(start), rotation, *buffers)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(captured, rotation, *buffers)
    for target, source in zip(captured, start, strict=True):
        target.copy_(source)
    for i in range(STEPS):
        for buffer, source in zip(buffers, (q, k, v), strict=True):
            buffer.copy_(source[i])
        graph.replay()
        assert torch.equal(out, launched[i]), i
    for name, a, b in zip(TileCache._fields, captured, cache, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def test_a_decode_step_never_waits_for_the_device() -> None:
    cache, rotation = filled_cache(
        CONFIG, [100, 60], "cuda", num_kv_heads=HEADS, head_dim=DIM, dtype=torch.bfloat16
    )
    q, k, v = inputs()
    step(cache, rotation, q[0], k[0], v[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(1, 40):
            step(cache, rotation, q[i], k[i], v[i])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_model_generates_the_same_text(mode: str, fresh_dynamo: None) -> None:
    model = kvarn_ops.patch(tiny_model().to("cuda"), "k8v8_g32", num_sink_tokens=8)
    ids = random_ids(2, 50).to("cuda")
    wanted = model.generate(ids, max_new_tokens=150, do_sample=False)
    kvarn_ops.unpatch(model)
    model = kvarn_ops.patch(model, "k8v8_g32", num_sink_tokens=8, backend="triton")
    eager = model.generate(ids, max_new_tokens=150, do_sample=False)
    model.forward = torch.compile(model.forward, mode=mode, fullgraph=True)
    compiled = model.generate(ids, max_new_tokens=150, do_sample=False)
    assert (eager == wanted).float().mean() > 0.98
    assert (compiled == eager).float().mean() > 0.98


@pytest.mark.export
def test_package_decodes_as_the_model_does(tmp_path: Path) -> None:
    """`aot_compile` for a GPU, one token a call, over several tiles and a second sequence."""
    model = kvarn_ops.patch(tiny_model().to("cuda"), "k4v2_g32", num_sink_tokens=8)
    ids = random_ids(2, 150).cuda()
    path = kvarn_ops.export.aot_compile(
        model, tmp_path / "step.pt2", max_cache_len=200, batch_size=2, chunk=1
    )
    package = torch._inductor.aoti_load_package(str(path))
    state = json.loads(package.get_metadata()["kvarn_ops.state"])
    empty = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype), device="cuda")
        for name, (dtype, shape) in state.items()
    }
    cache = kvarn_ops.KVarNCache(model.config, 200, "k4v2_g32", num_sink_tokens=8)
    wanted = torch.cat([run(model, token, cache) for token in ids.split(1, 1)], 1)
    for _ in range(2):
        got = torch.cat([package(token.contiguous()) for token in ids.split(1, 1)], 1)
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)
        package.load_constants(empty, check_full_update=False)


def test_offsets_beyond_32_bits() -> None:
    """A cache of more than 2**31 bytes of codes: the last head's tiles lie beyond."""
    config = KVarNConfig.from_preset("k8v8_g128")
    tokens = 2**31 // (4 * 128) + 4096
    cache, rotation = filled_cache(
        config, [0], "cuda", num_kv_heads=4, head_dim=128, max_cache_len=tokens,
        dtype=torch.bfloat16,
    )  # fmt: skip
    assert cache.k_codes.numel() > 2**31
    k, v = torch.randn(2, 1, 4, 2048, 128, device="cuda", dtype=torch.bfloat16)
    line = config.to_string()
    torch.ops.kvarn.append_(k, v, None, *cache, rotation, line, "triton")
    small, _ = filled_cache(
        config, [0], "cuda", num_kv_heads=4, head_dim=128, max_cache_len=4096, dtype=torch.bfloat16
    )
    torch.ops.kvarn.append_(k, v, None, *small, rotation, line, "triton")
    q = torch.randn(1, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    rest = (rotation, None, 0.1, 0.0, True, line, "triton")
    found = torch.ops.kvarn.attention(q, *cache, *rest)
    wanted = torch.ops.kvarn.attention(q, *small, *rest)
    assert relative_error(found, wanted) < 1e-2
    tiles = config.num_tiles(2048)
    for field in CODES:
        assert torch.equal(getattr(cache, field)[:, :, :tiles], getattr(small, field)[:, :, :tiles])
