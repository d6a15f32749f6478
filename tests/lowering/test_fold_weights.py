"""Weights and caches of folded models: saved, loaded, changed, shared."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

import kvarn_ops
from folded_models import IDS, PRESET, distance, fold, torchao_int8, with_biases
from kvarn_ops.errors import CacheError, ConfigError
from tiny_models import run, small_cache, tiny_model

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))


def assert_saved_as(model: Any, wanted: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_weights_are_saved_unfolded(tmp_path: Path) -> None:
    model = with_biases(tiny_model(attention_bias=True))
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold(model)
    assert_saved_as(model, wanted)
    model.save_pretrained(tmp_path)
    assert_saved_as(AutoModelForCausalLM.from_pretrained(tmp_path), wanted)
    kvarn_ops.unpatch(model)
    assert_saved_as(model, wanted)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_into_a_folded_model_are_folded(assign: bool) -> None:
    other = with_biases(tiny_model(seed=3, attention_bias=True))
    model = fold(with_biases(tiny_model(attention_bias=True)))
    model.load_state_dict(other.state_dict(), assign=assign)
    dense = run(other, IDS, None)
    assert distance(run(model, IDS, None), dense) < 1e-5
    assert torch.equal(run(kvarn_ops.unpatch(model), IDS, None), dense)


def in_place(model: Any) -> None:
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(2.0)
            layer.self_attn.o_proj.weight.add_(0.01)


def replaced(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight = nn.Parameter(layer.self_attn.v_proj.weight.detach() * 2)


@pytest.mark.parametrize("change", [in_place, replaced])
def test_weights_changed_later_are_folded_again(change: Callable[[Any], None]) -> None:
    model, other = fold(tiny_model()), tiny_model()
    change(model)
    change(other)
    dense = run(other, IDS, None)
    assert distance(run(model, IDS, None), dense) < 1e-5
    assert torch.equal(run(kvarn_ops.unpatch(model), IDS, None), dense)


def test_gradients_are_those_of_the_unfolded_model() -> None:
    model, dense = (with_biases(tiny_model(attention_bias=True)).train() for _ in range(2))
    fold(model)
    for each in (model, dense):
        each(IDS, labels=IDS).loss.backward()
    for (name, one), other in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert one.grad is not None, name
        assert distance(one.grad, other.grad) < 1e-4, name


def test_quantizing_a_folded_model_is_refused() -> None:
    model = fold(tiny_model())
    torchao_int8(model)
    with pytest.raises(kvarn_ops.InputError, match="unpatch"):
        run(model, IDS, None)


def test_a_projection_that_is_replaced_is_noticed() -> None:
    model = fold(tiny_model())
    attention = model.model.layers[1].self_attn
    attention.v_proj = nn.Linear(64, 64, bias=False)
    with pytest.raises(CacheError, match=r"v_proj was replaced .*unpatch"):
        run(model, IDS, None)
    kvarn_ops.unpatch(model)
    assert run(model, IDS, None).isfinite().all()


def test_a_cache_belongs_to_one_frame(tmp_path: Path) -> None:
    model = fold(tiny_model())
    cache = small_cache(model)
    run(model, IDS[:, :80], cache)
    fork = cache.fork(2)
    cache.save(tmp_path / "cache")
    loaded = kvarn_ops.KVarNCache.load(tmp_path / "cache", model.config)
    next_token = IDS[:, 80:81]
    wanted = run(model, next_token, cache)
    assert torch.equal(run(model, next_token, loaded), wanted)
    forked = run(model, next_token.repeat_interleave(2, 0), fork)
    assert distance(forked[::2], wanted) < 1e-5
    kvarn_ops.unpatch(model)
    kvarn_ops.patch(model, PRESET, num_sink_tokens=8)
    held = [tensor.clone() for tensor in cache.layers[0].tiles]
    for used in (cache, loaded, fork):
        with pytest.raises(CacheError, match="equalized and rotated by its weights, and the model"):
            run(model, IDS[: used.layers[0].batch_size, :1], used)
    assert all(map(torch.equal, cache.layers[0].tiles, held))
    plain = small_cache(model)
    run(model, IDS, plain)
    kvarn_ops.unpatch(model)
    with pytest.raises(CacheError, match="values as the model makes them, and the model"):
        run(fold(model), IDS[:, :1], plain)
    kvarn_ops.unpatch(model)
    with pytest.raises(CacheError, match="gives them rotated by its weights"):
        run(fold(model, encoder="paper"), IDS[:, :1], cache)


def test_contradictory_settings_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match="rotate_values=False"):
        fold(model, rotate_values=False)
    assert kvarn_ops.explain(model).config is None
    fold(model)
    with pytest.raises(ConfigError, match=r"fold_rotation=True: call .*unpatch"):
        kvarn_ops.patch(model, PRESET, num_sink_tokens=8)
    with pytest.raises(CacheError, match="rotate_values=False"):
        run(model, IDS, small_cache(model, rotate_values=False))


def test_generate_and_the_context_manager() -> None:
    model = tiny_model()
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    dense = model.generate(IDS[:, :60], **options)
    with kvarn_ops.patched(model, PRESET, num_sink_tokens=8, fold_rotation=True):
        assert torch.equal(model.generate(IDS[:, :60], **options), dense)
        cached = model.generate(IDS[:, :60], past_key_values=DynamicCache(), **options)
        assert torch.equal(cached, dense)
    assert torch.equal(model.generate(IDS[:, :60], **options), dense)
