"""Folding the rotation of values into weights: the same function.

What is left as it is: test_fold_refusals.py; weights and caches: test_fold_weights.py; compiled
forms and copies: test_fold_rotation_life.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvarn_ops
from folded_models import (
    IDS,
    PRESET,
    after_values,
    before_output,
    distance,
    fold,
    reasons,
    with_biases,
)
from tiny_models import random_ids, run, small_cache, teacher_forced, tiny_model

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from tiny_families import build

MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_model,
    "llama with biases": lambda: with_biases(tiny_model(attention_bias=True)),
    "llama, a KV head per query head": lambda: tiny_model(num_key_value_heads=4),
    "llama, one KV head": lambda: tiny_model(num_key_value_heads=1),
    "llama, head_dim 80": lambda: tiny_model(head_dim=80),
    "qwen2, biases of q, k, v": lambda: with_biases(tiny_model("qwen2")),
    "qwen3, norms of q and k": lambda: tiny_model("qwen3"),
    "phi3, one projection of q, k, v": lambda: tiny_model("phi3"),
    "gemma2, softcap and dense layers": lambda: tiny_model("gemma2"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_folded_model_is_the_same_function(name: str) -> None:
    model = MODELS[name]()
    dense = run(model, IDS, None)
    kvarn_ops.patch(model, PRESET, num_sink_tokens=8, encoder="paper")
    caches = [small_cache(model, encoder="paper") for _ in range(2)]
    wanted = teacher_forced(model, IDS, caches[0], 50)
    kvarn_ops.unpatch(model)
    fold(model, encoder="paper")
    assert set(reasons(model)) == {"packed, rotation folded"}
    assert distance(run(model, IDS, None), dense) < 1e-5, "without a KVarN cache"
    found = teacher_forced(model, IDS, caches[1], 50)
    assert distance(found, wanted) < 1e-3
    one, two = (
        next(layer for layer in cache.layers if hasattr(layer, "tiles")) for cache in caches
    )
    assert (one.config.rotate_values, two.config.rotate_values) == (True, False)
    live = one.config.num_tiles(IDS.shape[1])
    assert live >= 3
    for field in ("k_codes", "v_codes"):  # of the first packed layer: the same values up to ties
        a, b = (getattr(layer.tiles, field)[:, :, :live] for layer in (one, two))
        assert (a != b).float().mean() < 1e-3, field
    assert not torch.equal(one.tiles.v_tail, two.tiles.v_tail), "values do not arrive rotated"
    kvarn_ops.unpatch(model)
    assert torch.equal(run(model, IDS, None), dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    """No worse than what the dtype costs anyway."""
    exact = run(tiny_model(), IDS, None)
    model = tiny_model().to(dtype)
    before = distance(run(model, IDS, None).float(), exact)
    fold(model)
    assert distance(run(model, IDS, None).float(), exact) < 2 * before
    weight = model.model.layers[0].self_attn.v_proj.kvarn_weight
    wide = tiny_model().to(dtype).double()
    fold(wide)
    rounded_once = wide.model.layers[0].self_attn.v_proj.kvarn_weight.to(dtype)
    assert torch.equal(weight, rounded_once)


# What lies between


class Permute(nn.Module):
    """Rearranges features: nothing that a rotation of heads could not see through."""

    def __init__(self, features: int) -> None:
        super().__init__()
        order = torch.randperm(features, generator=torch.Generator().manual_seed(1))
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.order]


@pytest.mark.parametrize(
    "change", [after_values(lambda: Permute(64)), before_output(lambda: Permute(128))]
)
def test_a_rearrangement_is_followed(change: Callable[[Any], None]) -> None:
    model = tiny_model()
    change(model)
    dense = run(model, IDS, None)
    fold(model)
    assert set(reasons(model)) == {"packed, rotation folded"}
    assert distance(run(model, IDS, None), dense) < 1e-5


@pytest.mark.transformers("5.17", "not all of these families are there")
@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("gpt_neox", "packed, rotation folded"),  # q, k, v of a head side by side in one projection
        ("gpt_oss", "packed, rotation folded"),  # attention sinks
        ("gpt_bigcode", "packed, rotation folded"),  # one KV head, fused
        ("olmo", "packed, rotation folded"),
        ("dbrx", "not the output of one linear layer"),  # clamps values
        ("gemma3n_text", "not the output of one linear layer"),  # normalizes values
        ("qwen3_next", "is not attention's output"),  # gates outputs
        ("bitnet", "is not attention's output"),  # normalizes outputs
    ],
)
def test_families_of_transformers(family: str, said: str) -> None:
    model = build(family)
    ids = random_ids(1, 60)
    dense = run(model, ids, None)
    fold(model)
    assert reasons(model)
    assert all(said in reason for reason in reasons(model)), reasons(model)
    assert distance(run(model, ids, None), dense) < 1e-5
    cache = small_cache(model, 96)
    run(model, ids[:, :50], cache)
    assert distance(run(model, ids[:, 50:], cache), dense[:, 50:]) < 0.05
