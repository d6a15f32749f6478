"""A model that was compiled first: patched, unpatched, and dense again to the bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kvarn_ops
from tiny_models import random_ids, run, small_cache, tiny_model

PRESET = "k2v2_g32"


def compile_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compile_layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def compile_attention(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn = torch.compile(layer.self_attn, backend="eager")
    return model


def compile_whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


WAYS = [compile_forward, compile_layers, compile_attention, compile_whole]


def steps(model: Any, cache: Any) -> list[Tensor]:
    """A prefill over a tile's end, and two decoded tokens."""
    ids = random_ids(2, 62)
    return [run(model, part, cache) for part in (ids[:, :60], ids[:, 60:61], ids[:, 61:])]


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_follows_patch_and_unpatch(
    compiled: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    reference = kvarn_ops.patch(tiny_model(), PRESET, num_sink_tokens=8)
    wanted = steps(reference, small_cache(reference, preset=PRESET))
    model = compiled(tiny_model())
    dense = run(model, random_ids(2, 60), None)
    assert kvarn_ops.patch(model, PRESET, num_sink_tokens=8) is model
    assert "compiled before it was patched" in caplog.text
    assert kvarn_ops.explain(model).config is not None
    for _ in range(2):
        found = steps(model, small_cache(reference, preset=PRESET))
        for one, other in zip(found, wanted, strict=True):
            assert (one - other).abs().max() < 1e-5
        assert torch.equal(run(model, random_ids(2, 60), None), dense)
    assert kvarn_ops.unpatch(model) is model
    assert torch.equal(run(model, random_ids(2, 60), None), dense)
    with pytest.raises(kvarn_ops.CacheError, match="not patched"):
        run(model, random_ids(2, 60), small_cache(reference, preset=PRESET))


@pytest.mark.usefixtures("fresh_dynamo")
def test_threads_share_a_compiled_model() -> None:
    model = compile_forward(kvarn_ops.patch(tiny_model(), PRESET, num_sink_tokens=8))
    prompts = [random_ids(2, 40 + 8 * i, seed=i) for i in range(3)]
    options = {"max_new_tokens": 8, "do_sample": False}
    alone = [model.generate(prompt, **options) for prompt in prompts]
    together: dict[int, Tensor] = {}

    def work(index: int) -> None:
        together[index] = model.generate(prompts[index], **options)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, tokens in enumerate(alone):
        assert torch.equal(together[index], tokens), f"thread {index} saw another one"
