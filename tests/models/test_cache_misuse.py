"""A patched model and its cache used wrongly: a clear error, and nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvarn_ops
from kvarn_ops.errors import CacheError, ConfigError, InputError
from tiny_models import (
    assert_same_state,
    cache_state,
    patched,
    random_ids,
    run,
    small_cache,
    tiny_model,
)

PRESET = "k8v8_g32"


@pytest.fixture(scope="module")
def model() -> Any:
    return patched()


def assert_refused(
    model: Any, cache: Any, ids: Tensor, error: type[Exception], match: str, **kwargs: Any
) -> None:
    state = cache_state(cache)
    with pytest.raises(error, match=match):
        run(model, ids, cache, **kwargs)
    assert_same_state(cache_state(cache), state)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_cache_too_small_says_the_size_and_goes_on(family: str) -> None:
    model = patched(family)
    cache, wanted = small_cache(model, 64), small_cache(model, 200)
    ids = random_ids(2, 65)
    assert_refused(model, cache, ids, CacheError, "max_cache_len=65 ")
    for use in (cache, wanted):
        run(model, ids[:, :50], use)
    assert_refused(model, cache, ids[:, :15], CacheError, "max_cache_len=65 ")
    found, expected = (run(model, ids[:, 50:64], use) for use in (cache, wanted))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert_refused(model, cache, ids[:, :1], CacheError, "max_cache_len=65 ")
    with pytest.raises(CacheError, match="max_cache_len=100 "):
        model.generate(random_ids(2, 100), past_key_values=small_cache(model, 64))


def test_a_refused_first_use_leaves_the_cache_unallocated(model: Any) -> None:
    cache = small_cache(model, 20)
    with pytest.raises(CacheError, match="max_cache_len=30 "):
        run(model, random_ids(2, 30), cache)
    assert not cache.is_initialized
    assert cache.memory()["codes"] == 0
    run(model, random_ids(1, 10), cache)  # another batch size is fine


@pytest.mark.parametrize("batch", [1, 3])
def test_another_batch_size_is_refused(model: Any, batch: int) -> None:
    cache = small_cache(model)
    run(model, random_ids(2, 50), cache)
    assert_refused(model, cache, random_ids(batch, 5), CacheError, "batch size 2")


def test_another_dtype_is_refused(model: Any) -> None:
    cache = small_cache(model)
    run(model, random_ids(2, 50), cache)
    half = patched().to(torch.bfloat16)
    assert_refused(half, cache, random_ids(2, 5), InputError, "bfloat16.*float32")
    double = patched().to(torch.float64)
    assert_refused(double, small_cache(double), random_ids(2, 5), InputError, "float64")


def test_another_device_is_refused(model: Any) -> None:
    cache = small_cache(model)
    run(model, random_ids(2, 50), cache)
    elsewhere = torch.zeros(2, 2, 1, 32, device="meta")
    layer = cache.layers[0]
    layer.armed = True
    state = cache_state(cache)
    with pytest.raises(InputError, match="meta"):
        layer.update(elsewhere, elsewhere)
    assert_same_state(cache_state(cache), state)


def test_a_model_that_is_not_patched_refuses_the_cache(model: Any) -> None:
    plain, ids = tiny_model(), random_ids(1, 20)
    for config in (plain.config, model.config):
        cache = kvarn_ops.KVarNCache(config, 64, PRESET)
        assert_refused(plain, cache, ids, CacheError, "not patched")
        assert_refused(plain, cache, ids, CacheError, "not patched", attention_mask=ids > 30)
    with pytest.raises(CacheError, match="not patched"):
        plain.generate(ids, past_key_values=cache, max_new_tokens=3)
    run(model, ids, cache)  # still usable where it belongs
    assert_refused(plain, cache, ids[:, :1], CacheError, "not patched")


@pytest.mark.parametrize("length", [0, -5, 2.5, "100", True])
def test_a_length_that_is_none_is_refused(model: Any, length: Any) -> None:
    with pytest.raises(InputError, match="max_cache_len"):
        kvarn_ops.KVarNCache(model.config, length)


def test_wrong_arguments_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match=r"model\.config"):
        kvarn_ops.KVarNCache(model, 64)
    with pytest.raises(ConfigError, match="grammar"):
        kvarn_ops.KVarNCache(model.config, 64, "k5v5")
    with pytest.raises(CacheError, match="offload"):
        small_cache(model).layers[0].offload()


# The model


@pytest.mark.parametrize("mask_rank", ["bool", "float"])
def test_4d_masks_are_refused(mask_rank: str) -> None:
    model = patched()
    cache = small_cache(model)
    run(model, random_ids(1, 50), cache)
    state = cache_state(cache)
    mask = torch.ones(1, 1, 4, 54, dtype=torch.bool).tril(50)
    with pytest.raises(InputError, match="2-D padding mask"):
        run(
            model,
            random_ids(1, 4),
            cache,
            attention_mask=mask if mask_rank == "bool" else mask.float(),
        )
    assert_same_state(cache_state(cache), state)
    assert run(model, random_ids(1, 4), None, attention_mask=mask[..., :4]).isfinite().all()


def test_attention_matrices_are_refused() -> None:
    model = patched(attn_implementation="eager")
    cache, ids = small_cache(model), random_ids(1, 20)
    run(model, ids, cache)
    state = cache_state(cache)
    with pytest.raises(InputError, match="output_attentions"):
        run(model, ids, cache, output_attentions=True)
    assert_same_state(cache_state(cache), state)
    with pytest.raises(InputError, match="output_attentions"):
        model.generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    with torch.no_grad():
        attentions = model(ids, use_cache=False, output_attentions=True).attentions
    assert [attention.shape for attention in attentions] == [(1, 4, 20, 20)] * 2

    asked_in_config = tiny_model(attn_implementation="eager")
    asked_in_config.config.output_attentions = True
    kvarn_ops.patch(asked_in_config, "k8v8_g32", num_sink_tokens=8)
    with pytest.raises(InputError, match="output_attentions"):
        run(asked_in_config, ids, cache)
    assert_same_state(cache_state(cache), state)


def test_attention_dropout_is_refused() -> None:
    model = patched(attention_dropout=0.1)
    cache, ids = small_cache(model), random_ids(1, 20)
    model.train()
    run(model, ids, None)
    with pytest.raises(InputError, match="dropout"):
        run(model, ids, cache)
    assert int(cache.get_seq_length()) == 0
    model.eval()
    run(model, ids, cache)
    model.train()
    state = cache_state(cache)
    with pytest.raises(InputError, match="dropout"):
        run(model, ids, cache)
    assert_same_state(cache_state(cache), state)


def test_backward_through_the_cache_is_refused() -> None:
    model = patched()
    ids = random_ids(1, 50)
    wanted = run(model, ids, small_cache(model))
    out = model(ids, past_key_values=small_cache(model)).logits  # gradients are on
    assert torch.equal(out, wanted)
    with pytest.raises(InputError, match="no_grad"):
        out.sum().backward()
    model.zero_grad()
    model(ids, use_cache=False).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
