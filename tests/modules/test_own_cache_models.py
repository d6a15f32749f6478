"""A whole model with cache modules of its own, patched: examples/gpt_fast_style.py."""

from __future__ import annotations

import gc
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import ReinplaceCounters, counters

import kvarn_ops
from gpt_fast_example import gpt_fast_model, gpt_fast_style
from kvarn_ops import ConfigError, UnsupportedModelError
from kvarn_ops.config import KVarNConfig
from kvarn_ops.lowering import hooks, record

CONFIG = KVarNConfig(key_bits=8, value_bits=8, group_size=32, num_sink_tokens=8)
PROMPT, TOTAL = 30, 160  # the first tile is quantized at 40 tokens, the fourth at 136


def prompt() -> Tensor:
    return torch.randint(96, (2, PROMPT), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Teacher-forced: a prefill of `PROMPT` tokens, then one at a time."""
    steps = [model(ids[:, :PROMPT], torch.arange(PROMPT))]
    for place in range(PROMPT, ids.shape[1]):
        steps.append(model(ids[:, place : place + 1], torch.tensor([place])))
    return torch.cat(steps, 1)


@pytest.fixture(scope="module")
def text() -> Tensor:
    return gpt_fast_style.generate(gpt_fast_model(), prompt(), TOTAL - PROMPT)


@pytest.mark.parametrize("native_gqa", [False, True])
def test_eager_is_exact_before_the_first_tile_and_close_after(
    native_gqa: bool, text: Tensor
) -> None:
    dense = logits(gpt_fast_model(native_gqa=native_gqa), text)
    model = kvarn_ops.patch(gpt_fast_model(native_gqa=native_gqa), CONFIG)
    packed = logits(model, text)
    assert torch.equal(packed[:, :39], dense[:, :39])
    error = (packed - dense).norm() / dense.norm()
    assert 0 < error < 2e-3
    # Two bits are coarse: the same test would not see a patch that does nothing.
    coarse = logits(kvarn_ops.patch(gpt_fast_model(), CONFIG, key_bits=2, value_bits=2), text)
    assert (coarse - dense).norm() / dense.norm() > 10 * error


def test_greedy_text_is_that_of_the_dense_model_up_to_a_near_tie(text: Tensor) -> None:
    model, dense = kvarn_ops.patch(gpt_fast_model(), CONFIG), gpt_fast_model()
    first, again = (gpt_fast_style.generate(model, prompt(), TOTAL - PROMPT) for _ in range(2))
    assert torch.equal(first, again)  # position 0 starts over
    for row in (first != text).any(1).nonzero():
        place = int((first != text)[row].nonzero()[0, 1])
        best = logits(dense, text)[row, place - 1].topk(2).values[0]
        assert place > 40
        assert best[0] - best[1] < 1e-2


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_decode_is_one_fused_graph_without_cache_sized_copies(text: Tensor) -> None:
    record.clear()
    model = kvarn_ops.patch(gpt_fast_model(), CONFIG)
    wanted = logits(model, text)
    step = torch.compile(model, fullgraph=True)
    counters.clear()
    ReinplaceCounters.clear()
    with torch.no_grad():
        model(text[:, :PROMPT], torch.arange(PROMPT))
        for place in range(PROMPT, TOTAL):
            got = step(text[:, place : place + 1], torch.tensor([place]))
            torch.testing.assert_close(got[:, 0], wanted[:, place], rtol=1e-2, atol=1e-2)
    assert counters["stats"]["unique_graphs"] == 1
    assert ReinplaceCounters.get_total_missed() == 0
    [graph] = record.recorded()
    assert graph.rewrites["FuseAttention"] == 2
    assert graph.ops["pre_grad"] == {"kvarn::append_at_": 2, "kvarn::attention": 2}


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_model_may_be_compiled_first(text: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    model = gpt_fast_model()
    compiled = torch.compile(model)
    with torch.no_grad():
        compiled(text[:, :PROMPT], torch.arange(PROMPT))
    with caplog.at_level(logging.WARNING, "kvarn_ops"):
        assert kvarn_ops.patch(compiled, CONFIG) is compiled
    assert "compiled before it was patched" in caplog.text
    with torch.no_grad():
        for _ in range(2):
            got = compiled(text, torch.arange(TOTAL))
            wanted = model(text, torch.arange(TOTAL))
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
            kvarn_ops.unpatch(compiled)
    assert kvarn_ops.explain(compiled).config is None


def test_without_caches_the_error_names_the_call() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"model\.setup_caches\(max_batch_size, max_seq_length\)"
    ):
        kvarn_ops.patch(gpt_fast_model(tokens=0))


def test_new_caches_after_the_patch_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model = kvarn_ops.patch(gpt_fast_model(), CONFIG)
    model.setup_caches(2, 300)
    with caplog.at_level(logging.WARNING, "kvarn_ops"), torch.no_grad():
        for _ in range(2):
            model(prompt(), torch.arange(PROMPT))
    assert caplog.text.count("was given new caches") == 1
    kvarn_ops.patch(model, CONFIG)
    assert all(layer.packed for layer in kvarn_ops.explain(model).layers)
    assert model.layers[0].attention.kv_cache.kvarn_cache.max_cache_len == 300
    kvarn_ops.unpatch(model)
    assert model.layers[0].attention.kv_cache.k_cache.shape[2] == 300
    assert not model._forward_pre_hooks


def test_the_patch_is_described_and_undone(text: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    model = gpt_fast_model()
    keys, bytes_held = list(model.state_dict()), gpt_fast_style.held_bytes(model)
    with caplog.at_level(logging.INFO, "kvarn_ops"), kvarn_ops.patched(model, CONFIG):
        size = CONFIG.bytes_per_token(32, 2)
        assert f"2 attention layers packed ({CONFIG.to_string()}, backend aten" in caplog.text
        said = kvarn_ops.explain(model)
        assert [layer.module for layer in said.layers] == [
            f"layers.{index}.attention.kv_cache" for index in range(2)
        ]
        assert {layer.bytes_per_token for layer in said.layers} == {size}
        assert "update(input_pos, k_val, v_val)" in str(said)
        assert list(model.state_dict()) == keys
        assert gpt_fast_style.held_bytes(model) < bytes_held
        with pytest.raises(ConfigError, match="unpatch"):
            kvarn_ops.patch(model, "k2v2_g32")
        kvarn_ops.patch(model, CONFIG)
        model(text, torch.arange(TOTAL))
    assert gpt_fast_style.held_bytes(model) == bytes_held
    assert torch.equal(logits(model, text), logits(gpt_fast_model(), text))
    assert "_kvarn_patch" not in vars(model)


def test_the_inductor_pass_goes_with_the_patch() -> None:
    before = set(hooks._users)
    model = kvarn_ops.patch(gpt_fast_model(), CONFIG)
    assert set(hooks._users) > before
    kvarn_ops.unpatch(model)
    gc.collect()
    assert not set(hooks._users) - before


def test_a_width_that_cannot_be_packed_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"kv_cache.*head_dim=40"):
        kvarn_ops.patch(gpt_fast_model(head_dim=40), CONFIG)


def test_transformers_is_not_needed_and_the_example_runs(repo_root: Path) -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules['transformers'] = None\n"
        "sys.argv = ['x', '--prompt', '60', '--new', '4', '--context', '256']\n"
        "runpy.run_path('examples/gpt_fast_style.py', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "k4v2_g128" in done.stdout


def test_the_page_runs(repo_root: Path, capsys: pytest.CaptureFixture) -> None:
    page = (repo_root / "docs" / "modules.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), {})
    assert "packed, through update(input_pos, k, v)" in capsys.readouterr().out
