"""After `unpatch` nothing is left of a patch; copies of a patched model stand on their own."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import nn

import kvarn_ops
from kvarn_ops.lowering import source_pass
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


# The Inductor pass


def current() -> Any:
    return inductor_config.post_grad_custom_pre_pass


@pytest.fixture
def _empty_slot() -> Iterator[None]:
    """No pass of anybody in the slot: other tests of this process may hold patched models."""
    gc.collect()
    with inductor_config.patch(post_grad_custom_pre_pass=None):
        users = dict(source_pass._users)
        source_pass._users.clear()
        yield
        source_pass._users.update(users)


@pytest.mark.usefixtures("_empty_slot")
def test_the_pass_goes_with_the_last_patched_model() -> None:
    assert current() is None
    one, two = kvarn_ops.patch(tiny_model()), kvarn_ops.patch(tiny_model())
    assert isinstance(current(), source_pass.SourcePass)
    kvarn_ops.unpatch(one)
    assert isinstance(current(), source_pass.SourcePass), "gone while a model is patched"
    kvarn_ops.unpatch(two)
    assert current() is None, "left behind by unpatch"


@pytest.mark.usefixtures("_empty_slot")
def test_the_pass_goes_when_the_model_is_collected() -> None:
    model = kvarn_ops.patch(tiny_model(), "k8v8_g32")
    model.generate(random_ids(1, 20), max_new_tokens=2)
    assert current() is not None
    del model
    gc.collect()
    assert current() is None, "the pass outlived the model, or something keeps the model alive"


@pytest.mark.usefixtures("_empty_slot")
def test_the_pass_stays_for_a_copy() -> None:
    model = kvarn_ops.patch(tiny_model())
    twin = copy.deepcopy(model)
    kvarn_ops.unpatch(model)
    assert current() is not None, "the copy would be compiled without the pass"
    kvarn_ops.unpatch(twin)
    assert current() is None


@pytest.mark.usefixtures("_empty_slot")
def test_passes_of_others_stay() -> None:
    def theirs(graph: torch.fx.Graph) -> None:
        pass

    def later(graph: torch.fx.Graph) -> None:
        pass

    inductor_config.post_grad_custom_pre_pass = theirs
    model = kvarn_ops.patch(tiny_model())
    assert current()[0] is theirs
    assert isinstance(current()[1], source_pass.SourcePass)
    inductor_config.post_grad_custom_pre_pass = [*current(), later]
    kvarn_ops.unpatch(model)
    assert current() == [theirs, later]
    inductor_config.post_grad_custom_pre_pass = theirs
    kvarn_ops.unpatch(kvarn_ops.patch(model))
    assert current() is theirs
