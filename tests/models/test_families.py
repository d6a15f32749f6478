"""Every supported family against its dense self: logits, generated text, layers, bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import kvarn_ops
from kvarn_ops.config import KVarNConfig
from tiny_models import (
    FAMILIES,
    SMALL,
    random_ids,
    run,
    small_cache,
    storages_of,
    teacher_forced,
    tiny_model,
)

FIRST_TILE = SMALL["num_sink_tokens"] + SMALL["group_size"]  # tokens until something is quantized
LENGTH, PREFILL = 110, 20
families = pytest.mark.parametrize("family", FAMILIES)


def pair(family: str, preset: str = "k8v8_g32") -> tuple[Any, Any]:
    """A patched model and a dense one with the same weights."""
    patched = kvarn_ops.patch(tiny_model(family), preset, num_sink_tokens=SMALL["num_sink_tokens"])
    return patched, tiny_model(family)


def dense_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@families
def test_logits_are_those_of_the_dense_model(family: str) -> None:
    model, dense = pair(family)
    ids = random_ids(2, LENGTH)
    found = teacher_forced(model, ids, small_cache(model), PREFILL)
    wanted = teacher_forced(dense, ids, dense_cache(dense), PREFILL)
    # The token that completes a tile still attends to the dense one.
    before, after = found[:, :FIRST_TILE], found[:, FIRST_TILE:]
    assert (before - wanted[:, :FIRST_TILE]).abs().max() < 1e-4, "wrong before anything is packed"
    error = relative(after, wanted[:, FIRST_TILE:])
    assert error < 0.01, f"8-bit tiles changed the logits by {error:.1%}"
    if FAMILIES[family][2]:
        assert error > 1e-5, "nothing was read from tiles: the packed path did not run"


def test_fewer_bits_cost_more() -> None:
    ids = random_ids(2, LENGTH)
    dense = tiny_model()
    wanted = teacher_forced(dense, ids, dense_cache(dense), PREFILL)[:, FIRST_TILE:]
    errors = []
    for preset in ("k8v8_g32", "k4v4_g32", "k2v2_g32"):
        model, _ = pair("llama", preset)
        found = teacher_forced(model, ids, small_cache(model, preset=preset), PREFILL)
        errors.append(relative(found[:, FIRST_TILE:], wanted))
    assert errors[0] < errors[1] / 4 < errors[2] / 8, f"errors by bits: {errors}"
    assert errors[1] < 0.1


@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_backends_agree(backend: str) -> None:
    ids = random_ids(2, 80)
    by_default, _ = pair("gemma2")
    wanted = teacher_forced(by_default, ids, small_cache(by_default), PREFILL)
    model = kvarn_ops.patch(tiny_model("gemma2"), "k8v8_g32", backend=backend, num_sink_tokens=8)
    found = teacher_forced(model, ids, small_cache(model, backend=backend), PREFILL)
    assert (found - wanted).abs().max() < 1e-3


@families
def test_greedy_text_is_that_of_the_dense_model(family: str) -> None:
    model, dense = pair(family)
    ids = random_ids(2, 30)
    options = {"max_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    out = model.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
    wanted = dense.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
    is_packed = isinstance(out.past_key_values, kvarn_ops.KVarNCache)
    assert is_packed == bool(FAMILIES[family][2]), "generate did not choose the cache it should"
    for row in range(len(ids)):
        for step, (found, other) in enumerate(zip(out.logits, wanted.logits, strict=True)):
            # Random models have near ties; after one, the texts are about different things.
            if found[row].argmax() != other[row].argmax():
                top = other[row].topk(2).values
                assert top[0] - top[1] < 0.05, f"row {row}, step {step}: not a near tie"
                break
            assert (found[row] - other[row]).abs().max() < 0.1, f"row {row}, step {step}"


def test_sampling_follows_the_seed() -> None:
    model, _ = pair("llama")
    ids = random_ids(2, 30)
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(model.generate(ids, do_sample=True, top_k=20, max_new_tokens=40))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


@families
def test_explain_names_the_packed_layers(family: str) -> None:
    model, _ = pair(family)
    config = KVarNConfig.from_preset("k8v8_g32", num_sink_tokens=8)
    found = kvarn_ops.explain(model)
    assert found.config == config
    assert found.backend == "aten"
    assert [layer.index for layer in found.layers] == list(range(model.config.num_hidden_layers))
    assert [layer.index for layer in found.layers if layer.packed] == FAMILIES[family][2]
    for layer in found.layers:
        if layer.packed:
            module = model.get_submodule(layer.module)
            assert module.layer_idx == layer.index
            assert layer.bytes_per_token == config.bytes_per_token(32, 2)
        else:
            assert layer.bytes_per_token is None
            assert "Sliding" in layer.reason
    assert config.to_string() in str(found)
    assert kvarn_ops.explain(tiny_model(family)).config is None


@families
def test_memory_is_what_the_config_promises(family: str) -> None:
    model, _ = pair(family)
    cache = small_cache(model, 200)
    assert cache.memory()["codes"] == 0, "memory before the first forward"
    run(model, random_ids(3, 64), cache)
    sizes, config = cache.memory(), cache.kvarn_config
    packed = len(FAMILIES[family][2])
    promised = packed * 3 * config.num_tiles(200) * 32 * config.bytes_per_token(32, 2)
    assert sizes["codes"] + sizes["scales"] == promised
    kept = packed * 3 * 2 * 32 * 2 * 4  # layers, rows, heads, head_dim, K and V, bytes of fp32
    assert sizes["sinks"] == kept * config.num_sink_tokens
    assert sizes["tail"] == kept * config.ring_len
    assert (sizes["dense"] > 0) == (packed < model.config.num_hidden_layers)
    assert sizes["total"] == sum(sizes.values()) - sizes["total"]
    assert sizes["total"] == sum(storages_of(cache).values()), "a tensor is held but not counted"


def test_nothing_of_the_size_of_a_dense_cache_is_held() -> None:
    model, _ = pair("llama", "k2v2_g32")
    cache = small_cache(model, 1024, preset="k2v2_g32")
    run(model, random_ids(1, 600), cache)
    run(model, random_ids(1, 1), cache)
    dense_keys_of_one_layer = 600 * 2 * 32 * 4
    held = storages_of(cache) | storages_of(
        [vars(module) for module in model.modules() if not list(module.parameters(recurse=False))]
    )
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    largest = max(size for address, size in held.items() if address not in weights)
    assert largest < dense_keys_of_one_layer / 4
