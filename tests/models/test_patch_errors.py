"""What `patch` refuses: a clear error, and nothing changes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import kvarn_ops
from kvarn_ops.errors import BackendError, ConfigError, UnsupportedModelError
from tiny_models import (
    random_ids,
    tiny_model,
)

_SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_FULL = ["full_attention", "full_attention"]


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=96, d_model=64, d_kv=32, d_ff=64, num_layers=2, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def deepseek() -> Any:
    config = transformers.DeepseekV3Config(
        **_SIZES,
        intermediate_size=64,
        num_key_value_heads=2,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def gemma3n() -> Any:
    config = transformers.Gemma3nTextConfig(
        **_SIZES,
        intermediate_size=64,
        num_key_value_heads=2,
        head_dim=32,
        num_kv_shared_layers=1,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=96,
        laurel_rank=4,
        activation_sparsity_pattern=None,
        layer_types=_FULL,
    )
    return transformers.Gemma3nForCausalLM(config)


def mpt() -> Any:
    return transformers.MptForCausalLM(
        transformers.MptConfig(vocab_size=96, d_model=64, n_heads=2, n_layers=2)
    )


def bloom() -> Any:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=2)
    )


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**_SIZES, intermediate_size=64))


UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "encoder_decoder": (t5, "encoder-decoder"),
    # Up to 4.57 BERT did not use the attention interface, which is asked first.
    "encoder": (
        bert,
        "attention interface" if transformers.__version__ < "5" else "causal attention",
    ),
    "mla": (deepseek, "latent"),
    "kv_sharing": (gemma3n, "shares keys and values"),
    "own_attention_mpt": (mpt, "attention interface"),
    "own_attention_bloom": (bloom, "attention interface"),
    "bidirectional": (
        lambda: tiny_model("gemma3_text", use_bidirectional_attention=True),
        "both directions",
    ),
    "not_causal": (lambda: tiny_model(is_causal=False), "non-causal"),
    "head_dim_40": (lambda: tiny_model(head_dim=40), "head_dim=40"),
    "head_dim_16": (lambda: tiny_model(head_dim=16), "head_dim=16"),
    "head_dim_without_construction": (lambda: tiny_model(head_dim=176), "rotate_keys=False"),
}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a patch could touch: attributes, hooks, config, of every module."""
    return {
        path: (
            set(vars(module)),
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_model_that_cannot_be_packed_is_refused(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = UNSUPPORTED[kind]
    model = make()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        kvarn_ops.patch(model)
    assert str(error.value).startswith(type(model).__name__), "the message names no model"
    assert snapshot(model) == before, "a refused model was changed"
    with caplog.at_level(logging.WARNING, logger="kvarn_ops"):
        assert kvarn_ops.patch(model, strict=False) is model
    assert any(
        "left dense" in record.getMessage() and reason in record.getMessage()
        for record in caplog.records
    )
    assert snapshot(model) == before
    assert kvarn_ops.explain(model).config is None


def test_the_way_out_that_a_message_names_works() -> None:
    model = kvarn_ops.patch(
        tiny_model(head_dim=176), "k8v8_g32", rotate_keys=False, rotate_values=False
    )
    out = model.generate(random_ids(1, 200), max_new_tokens=3, return_dict_in_generate=True)
    assert out.past_key_values.memory()["codes"] > 0


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), None, "gpt2"], ids=repr)
def test_what_is_no_transformers_model_is_refused(thing: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="not a Hugging Face model"):
        kvarn_ops.patch(thing)


@pytest.mark.parametrize(
    ("thing", "match"),
    [
        (lambda: nn.ModuleDict({"a": tiny_model(), "b": tiny_model()}), "2 .* a .*, b .*Patch the"),
        (lambda: [tiny_model()], "list is not a Hugging Face model"),
    ],
)
def test_what_is_not_one_model_is_refused(thing: Any, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        kvarn_ops.patch(thing())


@pytest.mark.parametrize(
    ("config", "fields", "match"),
    [
        ("k5v2", {}, "grammar"),
        ("k4v2_g16", {}, "grammar"),
        ("K4V2", {}, "grammar"),
        ("", {}, "grammar"),
        (4, {}, "grammar"),
        ("k4v2", {"bits": 4}, "no such field"),
        ("k4v2", {"tail_tokens": -1}, "tail_tokens"),
        ("k4v2", {"key_bits": 5}, "key_bits"),
        (kvarn_ops.KVarNConfig(), {"nonsense": 1}, "no such field"),
    ],
)
def test_a_config_that_is_none_is_refused(config: Any, fields: dict[str, Any], match: str) -> None:
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=match):
        kvarn_ops.patch(model, config, **fields)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("backend", "match"), [("triton", "CUDA"), ("cuda", "choose one of"), ("", "choose one of")]
)
def test_a_backend_that_cannot_run_is_refused(
    backend: str, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which would let kernels run here
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(BackendError, match=match):
        kvarn_ops.patch(model, backend=backend)
    assert snapshot(model) == before
    with pytest.raises(BackendError, match=match):
        kvarn_ops.KVarNCache(model.config, 64, backend=backend)


def test_a_second_patch_must_ask_for_the_same() -> None:
    model = kvarn_ops.patch(tiny_model(), "k8v8_g32")
    before = snapshot(model)
    assert kvarn_ops.patch(model, "k8v8_g32") is model
    assert snapshot(model) == before, "hooked twice"
    for config, fields in (("k8v8_g64", {}), ("k8v8_g32", {"tail_tokens": 5})):
        with pytest.raises(ConfigError, match=r"already patched with k8v8_g32.*unpatch"):
            kvarn_ops.patch(model, config, **fields)
    with pytest.raises(ConfigError, match="already patched"):
        kvarn_ops.patch(model, "k8v8_g32", backend="reference")
    assert snapshot(model) == before
    assert kvarn_ops.explain(model).config == kvarn_ops.KVarNConfig.from_preset("k8v8_g32")


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
def test_a_compiled_model_is_patched_with_a_warning(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    if how == "torch.compile":
        compiled: Any = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        compiled = model
    with caplog.at_level(logging.WARNING, logger="kvarn_ops"):
        assert kvarn_ops.patch(compiled, "k8v8_g32") is compiled
    assert "compiled before it was patched" in caplog.text
    assert kvarn_ops.explain(model).config == kvarn_ops.explain(compiled).config is not None
    assert kvarn_ops.unpatch(compiled) is compiled
    assert kvarn_ops.explain(model).config is None


def test_patching_says_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kvarn_ops"):
        kvarn_ops.patch(tiny_model("gemma3_text"), "k4v2_g32")
    (line,) = [r.getMessage() for r in caplog.records if "packed" in r.getMessage()]
    for part in ("Gemma3ForCausalLM", "2 attention layers packed", "k4v2_g32", "aten", "2 stay"):
        assert part in line


def test_a_copy_of_a_refused_model_is_as_good_as_new() -> None:
    model = copy.deepcopy(tiny_model(head_dim=40))
    with pytest.raises(UnsupportedModelError):
        kvarn_ops.patch(model)
    ids = random_ids(1, 20)
    assert torch.equal(model.generate(ids), tiny_model(head_dim=40).generate(ids))
