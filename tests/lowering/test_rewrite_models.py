"""Whole models: exported, rewritten, saved, loaded elsewhere, and compared with the dense program.

The first 128 tokens are sinks, which are stored as they are; the next tile is finished at 256.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import kvarn_ops
from fresh_process import run_python
from kvarn_ops.config import KVarNConfig
from kvarn_ops.errors import CacheError, InputError, UnsupportedModelError
from kvarn_ops.lowering import explain_rewrite, rewrite_kv_cache
from kvarn_ops.lowering.graph import count_ops
from tiny_models import random_ids, tiny_model

pytestmark = pytest.mark.export

ROOT = Path(__file__).resolve().parents[2]
T = 320
CHUNKS = [60, 1, 67, 1, 100, 60, 1, 1]  # tokens per call; a tile is finished in the sixth


def _logits(program, calls):
    module = program.module()
    with torch.no_grad():
        return torch.cat([module(*args, **kwargs) for args, kwargs in calls], 1)


def _assert_close(dense, packed, later=0.1):
    """1e-3 of the largest logit before the first tile, quantization error after."""
    scale = dense.abs().max()
    assert (dense[:, :128] - packed[:, :128]).abs().max() <= 1e-3 * scale
    error = (dense[:, 128:] - packed[:, 128:]).norm() / dense[:, 128:].norm()
    assert error <= later
    return error


def _transformers(family, length=None, strict=True, batch=1):
    executorch = pytest.importorskip("transformers.integrations.executorch")
    from transformers import GenerationConfig

    model = tiny_model(family, attn_implementation="sdpa", max_position_embeddings=512)
    model.generation_config = GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        cache_config={"batch_size": batch, "max_cache_len": T},
    )
    size = Dim("size", min=2, max=T - 1)
    dynamic = None if length else {"input_ids": {1: size}, "cache_position": {0: size}}
    count = length or 5
    return executorch.convert_and_export_with_cache(
        model, torch.zeros(batch, count, dtype=torch.int64), torch.arange(count),
        strict=strict, dynamic_shapes=dynamic,
    )  # fmt: skip


def _calls(counts, batch=1, names=("input_ids", "cache_position")):
    ids, start, calls = random_ids(batch, sum(counts)), 0, []
    for count in counts:
        given = (ids[:, start : start + count], torch.arange(start, start + count))
        calls.append(((), dict(zip(names, given))) if names else (given, {}))
        start += count
    return calls


@pytest.mark.transformers("5.17", "the export of its static cache")
@pytest.mark.parametrize("strict", [True, False])
def test_static_cache_export_of_transformers(strict):
    program = _transformers("llama", 1, strict)
    new = rewrite_kv_cache(program, "k8v8", strict=True)
    report = explain_rewrite(new)
    assert [layer.layer for layer in report.layers] == [
        f"model.model.layers.{index}.self_attn" for index in range(2)
    ]
    assert {layer.mask for layer in report.layers} == {"causal"}
    assert count_ops(new.graph) == {"kvarn::append_at_": 2, "kvarn::attention": 2}
    assert set(new.state_dict) == set(program.state_dict)
    for name, weight in program.state_dict.items():
        assert weight.data_ptr() == new.state_dict[name].data_ptr()  # shared, not copied
    names = {name for name, _ in new.named_buffers()}
    assert {"key_cache_0_k_codes", "value_cache_1_v_codes", "cumulative_length_0"} <= names
    assert not names & {"key_cache_0", "value_cache_0"}
    calls = _calls([1] * 280)
    error = _assert_close(_logits(program, calls), _logits(new, calls), later=0.02)
    assert error > 1e-5  # a tile was quantized


@pytest.mark.transformers("5.17", "the export of its static cache")
def test_prefill_and_window_layers_of_transformers():
    program = _transformers("gemma3_text")
    new = rewrite_kv_cache(program, "k8v8", strict=True)
    masks = [layer.mask for layer in explain_rewrite(new).layers]
    assert [mask.partition(":")[0] for mask in masks] == ["passed on", "causal"] * 2
    calls = _calls([60, 68, 100, 60, 2])
    _assert_close(_logits(program, calls), _logits(new, calls), later=0.02)


def _gpt_fast(native_gqa=False, length=None, batch=2):
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import gpt_fast_style
    finally:
        sys.path.pop(0)
    model = gpt_fast_style.random_model(gpt_fast_style.Config(native_gqa=native_gqa))
    model.setup_caches(batch, T)
    size = Dim("size", min=1, max=T - 1)
    count = length or 5
    return torch.export.export(
        model,
        (torch.zeros(batch, count, dtype=torch.int64), torch.arange(count)),
        dynamic_shapes=None if length else ({1: size}, {0: size}),
    )


@pytest.mark.parametrize("native_gqa", [False, True])
def test_gpt_fast_style_model(native_gqa):
    program = _gpt_fast(native_gqa)
    new = rewrite_kv_cache(program, "k8v8", strict=True)
    assert count_ops(new.graph) == {"kvarn::append_at_": 2, "kvarn::attention": 2}
    gone = set(explain_rewrite(new).removed)
    assert gone == {
        "causal_mask",
        *(f"layers.{i}.attention.kv_cache.{x}_cache" for i in range(2) for x in "kv"),
    }
    calls = _calls(CHUNKS, 2, None)
    _assert_close(_logits(program, calls), _logits(new, calls), later=0.02)


@pytest.mark.parametrize("batch", [1, 2])
def test_gpt_fast_style_decode(batch):
    program = _gpt_fast(length=1, batch=batch)
    new = rewrite_kv_cache(program, "k8v8", strict=True)
    calls = _calls([1] * 270, batch, None)
    _assert_close(_logits(program, calls), _logits(new, calls), later=0.02)


def test_bytes_are_those_of_the_packed_layout():
    """Buffers of the program: what is promised per tile, sinks, tail, and nothing dense."""
    program = _gpt_fast(length=1)
    new = rewrite_kv_cache(program)
    config = KVarNConfig.from_preset("k4v2")
    heads, width, rows, layers = 2, 64, 2, 2
    fp32, tiles = 4, config.allocated_tiles(T)
    per_head = (
        tiles * config.tile_bytes(width)
        + 2 * (config.num_sink_tokens + config.ring_len) * width * fp32
        + config.equalizer_bytes(width)
    )
    lengths = 2 * 8 * rows
    promised = layers * (rows * heads * per_head + lengths) + width * width * fp32
    report = explain_rewrite(new)
    assert report.packed_bytes == promised
    before, after = (
        sum(x.nbytes for x in (*one.state_dict.values(), *one.constants.values()))
        for one in (program, new)
    )
    assert before - after == sum(report.removed.values()) - promised


_STEPS = """
import json, sys, torch, kvarn_ops
program = torch.export.load({path!r})
module = program.module()
with torch.no_grad():
    for position in range(300):
        ids = torch.full((2, 1), position % 90 + 3)
        out = module(ids, torch.tensor([position]))
print(json.dumps([out[0, -1, :8].tolist(), sorted(n for n in sys.modules if "transformers" in n)]))
"""


def test_saved_and_loaded_elsewhere(tmp_path):
    """A dense program that was loaded is rewritten, saved, and run where only we are imported."""
    torch.export.save(_gpt_fast(length=1), tmp_path / "dense.pt2")
    new = rewrite_kv_cache(torch.export.load(tmp_path / "dense.pt2"), strict=True)
    torch.export.save(new, tmp_path / "packed.pt2")
    code = _STEPS.format(path=str(tmp_path / "packed.pt2"))
    values, others = json.loads(run_python(code, cwd=tmp_path, path=ROOT))
    assert others == []
    module = new.module()
    with torch.no_grad():
        for position in range(300):
            out = module(torch.full((2, 1), position % 90 + 3), torch.tensor([position]))
    torch.testing.assert_close(out[0, -1, :8], torch.tensor(values), atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="not returned by rewrite_kv_cache"):
        explain_rewrite(torch.export.load(tmp_path / "packed.pt2"))


class _Rows(nn.Module):
    """Caches `[rows, T, H, D]` of which the first rows and tokens are used, as in Llama's own code;
    the position is a Python integer."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(96, 128)
        self.qkv = nn.Linear(128, 256, bias=False)
        self.head = nn.Linear(128, 96, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8
        self.register_buffer("cache_k", torch.zeros(4, T, 2, 32))
        self.register_buffer("cache_v", torch.zeros(4, T, 2, 32))

    def forward(self, tokens, start_pos: int):
        rows, count = tokens.shape
        x = self.embed(tokens)
        q, k, v = self.qkv(x).split([128, 64, 64], -1)
        self.cache_k[:rows, start_pos : start_pos + count] = k.view(rows, count, 2, 32)
        self.cache_v[:rows, start_pos : start_pos + count] = v.view(rows, count, 2, 32)
        keys = self.cache_k[:rows, : start_pos + count]
        values = self.cache_v[:rows, : start_pos + count]
        keys, values = (one.repeat_interleave(2, dim=2).transpose(1, 2) for one in (keys, values))
        mask = torch.full((count, start_pos + count), float("-inf")).triu(start_pos + 1)
        out = F.scaled_dot_product_attention(
            q.view(rows, count, 4, 32).transpose(1, 2), keys, values, attn_mask=mask
        )
        return self.head(out.transpose(1, 2).contiguous().view(rows, count, -1))


def test_a_dynamic_number_of_rows_and_a_position_that_is_a_number():
    rows, size = Dim("rows", min=1, max=3), Dim("size", min=1, max=T - 1)
    program = torch.export.export(
        _Rows(),
        (torch.zeros(2, 5, dtype=torch.int64), 7),
        dynamic_shapes=({0: rows, 1: size}, Dim.DYNAMIC),
    )
    new = rewrite_kv_cache(program, "k8v8", strict=True)
    assert explain_rewrite(new).layers[0].mask == "causal"
    for batch in (1, 3, 2):
        calls = [
            ((args["ids"], int(args["at"][0])), {})
            for _, args in _calls(CHUNKS, batch, ("ids", "at"))
        ]
        _assert_close(_logits(program, calls), _logits(new, calls), later=0.02)


def test_after_decomposition_without_attention_the_caches_are_named():
    program = _gpt_fast(length=1)
    assert count_ops(rewrite_kv_cache(program.run_decompositions({})).graph)
    core = program.run_decompositions()
    assert rewrite_kv_cache(core) is core
    reasons = {layer.reason for layer in explain_rewrite(core).refused}
    assert reasons == {"no scaled_dot_product_attention reads it"}
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.attention"):
        rewrite_kv_cache(core, strict=True)


def test_a_program_without_cache():
    program = torch.export.export(nn.Linear(4, 4), (torch.zeros(1, 4),))
    assert rewrite_kv_cache(program) is program
    with pytest.raises(UnsupportedModelError, match="no attention with a cache"):
        rewrite_kv_cache(program, strict=True)


def test_errors_of_the_arguments_come_first():
    program = _gpt_fast(length=1)
    with pytest.raises(kvarn_ops.ConfigError):
        rewrite_kv_cache(program, "k5v5")
    with pytest.raises(kvarn_ops.BackendError):
        rewrite_kv_cache(program, backend="fast")


def test_more_tokens_than_the_cache_holds_raise():
    new = rewrite_kv_cache(_gpt_fast(), strict=True)
    module = new.module()
    module(torch.zeros(2, 300, dtype=torch.int64), torch.arange(300))
    with pytest.raises((CacheError, IndexError)):
        module(torch.zeros(2, 30, dtype=torch.int64), torch.arange(300, 330))
