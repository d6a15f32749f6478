"""`KVarNCache` used wrongly: a clear error, and nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvarn_ops
from kvarn_ops.errors import CacheError, ConfigError, InputError
from tiny_models import assert_same_state, cache_state, random_ids, run, small_cache, tiny_model

PRESET = "k8v8_g32"


def patched(family: str = "llama") -> Any:
    return kvarn_ops.patch(tiny_model(family), PRESET, num_sink_tokens=8)


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
