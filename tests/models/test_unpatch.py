"""After `unpatch` nothing is left of a patch; copies of a patched model stand on their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kvarn_ops
from tiny_models import FAMILIES, random_ids, run, small_cache, tiny_model

families = pytest.mark.parametrize("family", FAMILIES)


def everything(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module, by identity where values cannot be compared."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, dict):
                value = {key: id(item) for key, item in value.items()}
            elif isinstance(value, (set, list, tuple)):
                value = repr(value)
            elif not isinstance(value, (bool, int, float, str, type(None))):
                value = id(value)
            found[f"{path}.{name}"] = value
        config = getattr(module, "config", None)
        if config is not None:
            found[f"{path}.config.*"] = {
                key: value if isinstance(value, (bool, int, float, str)) else repr(value)
                for key, value in vars(config).items()
            }
    return found


def answers(model: Any) -> list[torch.Tensor]:
    ids = random_ids(2, 40)
    return [run(model, ids, None), model.generate(ids, max_new_tokens=10, do_sample=False)]


@families
def test_unpatch_puts_everything_back(family: str) -> None:
    model = tiny_model(family)
    wanted = answers(model)
    before = everything(model)
    kvarn_ops.patch(model, "k2v2_g32", num_sink_tokens=8)
    assert everything(model) != before, "the test sees no patch at all"
    model.generate(random_ids(1, 60), max_new_tokens=10)
    assert kvarn_ops.unpatch(model) is model
    after = everything(model)
    assert after == before, {key for key in before | after if before.get(key) != after.get(key)}
    for found, other in zip(answers(model), wanted, strict=True):
        assert torch.equal(found, other)
    assert kvarn_ops.unpatch(model) is model, "a second unpatch is harmless"
    assert everything(model) == before


@pytest.mark.parametrize("base", ["eager", "sdpa"])
def test_the_attention_that_was_chosen_comes_back(base: str) -> None:
    model = tiny_model(attn_implementation=base)
    kvarn_ops.unpatch(kvarn_ops.patch(model))
    assert model.config._attn_implementation == base


@families
def test_what_is_saved_does_not_know_of_the_patch(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "before")  # first: saving itself completes the config
    keys, config = list(model.state_dict()), model.config.to_dict()
    kvarn_ops.patch(model)
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "after" / name).read_text() == (tmp_path / "before" / name).read_text()
    loaded = type(model).from_pretrained(tmp_path / "after")
    assert kvarn_ops.explain(loaded).config is None
    assert not hasattr(loaded, "_kvarn_patch")


def test_the_context_manager_unpatches_also_after_an_error() -> None:
    model = tiny_model()
    before = everything(model)
    with kvarn_ops.patched(model, "k8v8_g32", tail_tokens=5) as same:
        assert same is model
        assert kvarn_ops.explain(model).config.tail_tokens == 5
    assert everything(model) == before
    with pytest.raises(RuntimeError, match="inside"), kvarn_ops.patched(model):
        raise RuntimeError("inside")
    assert everything(model) == before
    with pytest.raises(kvarn_ops.ConfigError), kvarn_ops.patched(model, "nonsense"):
        pass
    assert everything(model) == before


def test_a_copy_is_patched_and_unpatched_on_its_own() -> None:
    model = kvarn_ops.patch(tiny_model(), "k8v8_g32", num_sink_tokens=8)
    twin = copy.deepcopy(model)
    ids = random_ids(2, 70)
    wanted = run(model, ids, small_cache(model))
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(-1)
    assert not torch.equal(run(twin, ids, small_cache(twin)), wanted)
    out = twin.generate(ids, max_new_tokens=3, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, kvarn_ops.KVarNCache)

    kvarn_ops.unpatch(model)
    assert kvarn_ops.explain(twin).config is not None
    assert run(twin, ids, small_cache(twin)).isfinite().all()
    kvarn_ops.unpatch(twin)
    assert not any(module._forward_pre_hooks for module in twin.modules())
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(-1)
    assert torch.equal(run(twin, ids, None), run(model, ids, None))
