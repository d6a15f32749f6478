"""Families beyond the main ones: as docs/models.md says, and the comparison behind it can fail."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvarn_ops
from kvarn_ops.benchmark.results import read_rows
from kvarn_ops.errors import UnsupportedModelError
from kvarn_ops.hf import attention
from kvarn_ops.hf.attention_source import why_not_packable
from tiny_models import random_ids, small_cache, teacher_forced, tiny_model

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import check_family  # noqa: E402
from family_page import page, supported, supported_module  # noqa: E402
from tiny_families import build, model_types  # noqa: E402

pytestmark = pytest.mark.transformers(
    "5.17", "the tiny configs name models that older releases lack; test_families.py has the others"
)

ROWS = {
    row["family"]: row for row in read_rows(ROOT / "benchmarks" / "results" / "model_families.csv")
}

# family -> (packed, dense) layers; what makes it special
COMPARED = {
    "phi": (4, 0),  # rotary on half of the head, parallel blocks
    "gpt_neox": (4, 0),  # the cache is called layer_past
    "gpt_bigcode": (4, 0),  # one KV head
    "starcoder2": (4, 0),  # biases
    "stablelm": (4, 0),
    "olmo2": (4, 0),  # norms after the blocks and over all heads
    "mixtral": (4, 0),
    "qwen2_moe": (4, 0),  # makes a sliding mask that no layer uses
    "gemma3_text": (2, 2),  # windows
    "gemma4_text": (2, 2),  # other heads in full layers
    "qwen2, windows": (2, 2),
    "afmoe": (2, 2),  # views the output of attention
    "gpt_oss": (2, 2),  # attention sinks, eager
    "qwen3_next": (2, 2),  # linear layers
    "bamba": (2, 2),  # state-space layers
    "lfm2": (2, 2),  # convolutions
    "nemotron_h": (1, 3),  # layers without attention
}

REFUSED = {
    "deepseek_v3": "latent",
    "gemma4_text, shared layers": "shares keys and values",
    "gemma3_text, both directions": "both directions",
    "falcon, alibi": "attention interface",
    "mpt": "attention interface",
    "mllama": "0 modules that can be hooked",
    "hrm_text": "2 modules that can be hooked",
    "t5gemma2": "encoder-decoder",
    "inkling_text": "builds its own masks",
    "minimax": "cache or state of its own",
    "minimax_m3_vl_text": "block_indices",
    "qwen4_exp_text": "StaticIndexedLayer",
    "deepseek_v4": "no static cache",
    "jetmoe": "changes keys or values between the cache and attention",
    "diffllama": "attends more than once",
    "mimo_v2_flash": "keys of width 32 and values of width 16",
    "zamba2": "full attention and a linear state in one layer",
}


@pytest.mark.parametrize("family", COMPARED)
def test_a_family_gives_what_its_dense_self_does(family: str) -> None:
    found = check_family.check(family)
    assert found.outcome == "works", found.note
    assert (found.packed, found.dense) == COMPARED[family]


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_would_be_wrong_is_refused_with_the_reason(family: str) -> None:
    model = build(family)
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]) as error:
        kvarn_ops.patch(model)
    assert type(model).__name__ in str(error.value)
    assert "strict=False" in str(error.value), "no way out is named"
    assert kvarn_ops.explain(model).config is None


def _ignoring(name: str) -> Any:
    original = attention._packed_attention

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop(name, None)
        return original(*args, **kwargs)

    return broken


@pytest.mark.parametrize(
    ("family", "name"), [("gpt_oss", "s_aux"), ("gemma2", "softcap"), ("granite", "scaling")]
)
def test_the_comparison_notices_an_argument_that_is_ignored(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_packed_attention", _ignoring(name))
    if name == "scaling":  # the default is what this tiny model has: another one
        monkeypatch.setitem(check_family.build.__globals__["SPECIAL"], family, _OTHER_SCALE)
    found = check_family.check(family)
    assert found.outcome == "WRONG", f"{name} ignored: {found}"
    assert "before tiles are packed" in found.note


_OTHER_SCALE = {"attention_multiplier": 0.1}


def test_the_comparison_notices_padding_that_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_new_token_validity", lambda mask, count: None)
    found = check_family.check("llama")
    assert (found.outcome, "generate: row 1" in found.note) == ("WRONG", True), found


def test_the_comparison_notices_coarse_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_family, "PRESET", "k2v2_g32")
    found = check_family.check("llama")
    assert (found.outcome, "8-bit tiles" in found.note) == ("WRONG", True), found


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("family", ["gpt_oss", "lfm2"])
def test_decoding_is_one_unbroken_graph(family: str) -> None:
    model = kvarn_ops.patch(build(family), "k8v8_g32", num_sink_tokens=8)
    ids = random_ids(1, 50)
    wanted = teacher_forced(model, ids, small_cache(model, 96), 36)
    counters.clear()
    step = torch.compile(model, fullgraph=True, backend="eager")
    found = teacher_forced(model, ids, small_cache(model, 96), 36, step)
    assert (found - wanted).abs().max() < 1e-4
    # transformers' sliding layers count their tokens in an int: one more graph.
    limit = 1 if family == "lfm2" else 2
    assert counters["stats"]["unique_graphs"] <= limit


@pytest.mark.parametrize("head_dim", [80, 96, 112, 192, 256])
def test_head_dims_of_real_models(head_dim: int) -> None:
    model, dense = tiny_model(head_dim=head_dim), tiny_model(head_dim=head_dim)
    kvarn_ops.patch(model, "k8v8_g32", num_sink_tokens=8)
    ids = random_ids(2, 80)
    found = teacher_forced(model, ids, small_cache(model), 60)
    wanted = teacher_forced(dense, ids, DynamicCache(config=dense.config), 60)
    error = float((found - wanted)[:, 60:].norm() / wanted[:, 60:].norm())
    assert 1e-5 < error < 0.01
    layer = kvarn_ops.explain(model).layers[0]
    config = kvarn_ops.KVarNConfig.from_preset("k8v8_g32", num_sink_tokens=8)
    assert layer.bytes_per_token == config.bytes_per_token(head_dim, 2)


class Clean(nn.Module):
    """As modules of transformers are written; each subclass changes one thing."""

    layer_idx, scaling = 0, 1.0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_key_values: Any, **kwargs: Any) -> Any:
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return attend(self, q, k, v, None, scaling=self.scaling, **kwargs)


class WithBias(Clean):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_key_values: Any, **kwargs: Any) -> Any:
        k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return attend(self, q, k, v, None, position_bias=q, **kwargs)


class ChangesKeys(Clean):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_key_values: Any, **kwargs: Any) -> Any:
        k, v = past_key_values.update(k, v, self.layer_idx)
        k = k * 2
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return attend(self, q, k, v, None, **kwargs)


class OtherIndex(Clean):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_key_values: Any, **kwargs: Any) -> Any:
        k, v = past_key_values.update(k, v, self.layer_idx + 1)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return attend(self, q, k, v, None, **kwargs)


class OwnAttention(Clean):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_key_values: Any, **kwargs: Any) -> Any:
        k, v = past_key_values.update(k, v, self.layer_idx)
        return torch.softmax(q @ k.mT, -1) @ v


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Clean, None),
        (WithBias, "position_bias"),
        (ChangesKeys, "changes keys or values"),
        (OtherIndex, "more than one set"),
        (OwnAttention, "attention interface"),
    ],
)
def test_what_the_source_of_an_attention_module_tells(
    module: type[nn.Module], reason: str | None
) -> None:
    found = why_not_packable(module)
    assert found is None if reason is None else found is not None and reason in found, found


def test_the_page_says_what_the_committed_run_found() -> None:
    rows = list(ROWS.values())
    again = "run python benchmarks/model_families.py --docs-only"
    assert page(rows) == (ROOT / "docs" / "models.md").read_text(encoding="utf-8"), again
    module = ROOT / "kvarn_ops" / "families.py"
    assert supported_module(rows) == module.read_text(encoding="utf-8"), again
    assert kvarn_ops.supported_models() == tuple(supported(rows))
    bad = [row["family"] for row in rows if row["outcome"] in ("WRONG", "CRASH")]
    assert not bad, f"silently wrong or crashing: {bad}"


def test_the_run_left_no_family_out() -> None:
    made_with = {row["transformers"] for row in ROWS.values()}
    if made_with != {transformers.__version__}:
        pytest.skip(f"the committed run is of transformers {', '.join(made_with)}")
    assert set(ROWS) == set(model_types())


def test_the_families_tested_here_are_those_of_the_page() -> None:
    for family, (packed, dense) in COMPARED.items():
        row = ROWS[family]
        found = (row["outcome"], int(row["packed"]), int(row["dense"]))
        assert found == ("works", packed, dense), family
    for family, reason in REFUSED.items():
        assert ROWS[family]["outcome"] == "refused"
        assert reason in ROWS[family]["note"], family
