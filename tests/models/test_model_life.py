"""What happens to a patched model in its life: copies, dtypes, settings, training, wrappers."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

import kvarn_ops
from fresh_process import run_python
from kvarn_ops.errors import CacheError, InputError
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
GREEDY = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}


def text(model: Any, kind: type = kvarn_ops.KVarNCache) -> torch.Tensor:
    out = model.generate(random_ids(2, 60), **GREEDY)
    assert type(out.past_key_values) is kind
    return out.sequences


@pytest.fixture(scope="module")
def wanted() -> torch.Tensor:
    return text(patched())


# Copies


def test_a_saved_model_is_patched_where_it_is_loaded(
    tmp_path: Path, repo_root: Path, wanted: torch.Tensor
) -> None:
    """In a new process, where nothing of ours is registered with transformers yet."""
    torch.save(patched(), tmp_path / "model.pt")
    script = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
from torch._inductor import config
assert config.post_grad_custom_pre_pass is not None, "compiled code would lack our passes"
ids = torch.load({str(tmp_path / "ids.pt")!r})
out = model.generate(ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
assert type(out.past_key_values).__name__ == "KVarNCache"
torch.save(out.sequences, {str(tmp_path / "text.pt")!r})
print("saved")
"""
    torch.save(random_ids(2, 60), tmp_path / "ids.pt")
    run_python(script, cwd=repo_root)
    assert torch.equal(torch.load(tmp_path / "text.pt"), wanted)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_of_a_model_and_its_cache_are_their_own(how: str, wanted: torch.Tensor) -> None:
    model = patched()
    cache = small_cache(model)
    run(model, random_ids(2, 60), cache)
    state = cache_state(cache)
    if how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, cache)))
    else:
        twin, other = copy.deepcopy((model, cache))
    token = random_ids(2, 1)
    logits = run(twin, token, other)
    assert_same_state(cache_state(cache), state)
    assert torch.equal(run(model, token, cache), logits)
    assert torch.equal(text(twin), wanted)
    kvarn_ops.unpatch(model)
    assert torch.equal(text(twin), wanted)
    kvarn_ops.unpatch(twin)
    assert not any(module._forward_pre_hooks for module in twin.modules())
    assert torch.equal(run(twin, token, None), run(model, token, None))


def test_models_that_share_a_config_are_unpatched_one_by_one() -> None:
    config = tiny_model().config
    one, two = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    assert one.config is two.config, "transformers copies the config: drop this test"
    dense = [run(model, random_ids(1, 50), None) for model in (one, two)]
    kvarn_ops.patch(one, PRESET)
    kvarn_ops.patch(two, "k4v4_g32")
    kvarn_ops.unpatch(one)
    assert torch.equal(run(one, random_ids(1, 50), None), dense[0])
    assert run(two, random_ids(1, 50), small_cache(two)).isfinite().all()
    kvarn_ops.unpatch(two)
    assert config._attn_implementation == "sdpa"
    assert torch.equal(run(two, random_ids(1, 50), None), dense[1])


# Settings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_after_the_patch(dtype: torch.dtype) -> None:
    model, dense = patched().to(dtype), tiny_model().to(dtype)
    ids, cache = random_ids(2, 60), small_cache(model)
    run(model, ids, cache)
    assert cache.layers[0].tiles.k_tail.dtype == dtype
    found = run(model, ids[:, :1], cache)
    exact = run(dense, torch.cat([ids, ids[:, :1]], dim=1), None)[:, -1:]
    assert (found - exact).norm() / exact.norm() < 0.03
    with pytest.raises(InputError, match="make the cache after casting"):
        run(model.to(torch.float32), ids[:, :1], cache)
    with pytest.raises(InputError, match=r"give float16, bfloat16 or float32"):
        run(model.double(), ids, small_cache(model))


@pytest.mark.transformers("5.17", "models do not run on the meta device there")
def test_shapes_on_the_meta_device() -> None:
    model = patched().to("meta")
    cache = small_cache(model)
    for ids in (random_ids(2, 60), random_ids(2, 1)):
        logits = run(model, ids.to("meta"), cache)
        assert logits.device.type == "meta"
        assert logits.shape == (*ids.shape, 96)
    assert {tensor.device.type for tensor in cache.layers[0].tiles} == {"meta"}


def test_the_attention_implementation_can_be_changed(wanted: torch.Tensor) -> None:
    model = patched()
    model.set_attn_implementation("eager")
    assert torch.equal(text(model), wanted)
    attentions = model(random_ids(1, 9), use_cache=False, output_attentions=True).attentions
    assert attentions[0].shape == (1, 4, 9, 9), "without a KVarN cache it is eager attention"
    kvarn_ops.unpatch(model)
    assert model.config._attn_implementation == "eager"
    assert model.set_attn_implementation.__func__ is type(model).set_attn_implementation


def test_a_config_changed_by_hand_is_noticed(wanted: torch.Tensor) -> None:
    model = patched()
    cache, ids = small_cache(model), random_ids(2, 60)
    run(model, ids, cache)
    state = cache_state(cache)
    model.config._attn_implementation = "eager"
    with pytest.raises(CacheError, match="set_attn_implementation"):
        run(model, ids[:, :1], cache)
    with pytest.raises(CacheError, match="set_attn_implementation"):
        text(model)
    assert_same_state(cache_state(cache), state)
    model.set_attn_implementation("eager")  # as the message says
    assert torch.equal(text(model), wanted)
    model.config._attn_implementation = "eager"
    kvarn_ops.unpatch(model)
    assert model.config._attn_implementation == "eager"


def test_output_attentions_in_the_config(tmp_path: Path, wanted: torch.Tensor) -> None:
    """Set before the patch it means dense calls; afterwards transformers refuses to set it."""
    model = tiny_model(attn_implementation="eager")
    model.config.output_attentions = True
    kvarn_ops.patch(model, PRESET)
    assert len(model(random_ids(1, 9), use_cache=False).attentions) == 2
    model.save_pretrained(tmp_path)
    assert "kvarn" not in (tmp_path / "config.json").read_text()
    model = patched(attn_implementation="eager")
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    assert torch.equal(text(model), wanted)


# Training


def test_train_mode_and_gradients(wanted: torch.Tensor) -> None:
    model = patched().train()
    assert torch.equal(text(model), wanted)
    cache = small_cache(model)
    logits = model(random_ids(2, 60), past_key_values=cache).logits  # gradients are on
    assert logits.requires_grad
    assert not any(tensor.requires_grad for tensor in cache.layers[0].tiles)
    logits = model(random_ids(2, 1), past_key_values=cache).logits
    with pytest.raises(InputError, match="no_grad"):
        logits.sum().backward()
    model.zero_grad()
    loss = model(random_ids(2, 60), labels=random_ids(2, 60)).loss
    loss.backward()
    dense = tiny_model().train()
    dense(random_ids(2, 60), labels=random_ids(2, 60)).loss.backward()
    for one, other in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_gradient_checkpointing_is_refused_with_a_cache(wanted: torch.Tensor) -> None:
    model = patched()
    model.gradient_checkpointing_enable()
    assert torch.equal(text(model), wanted), "in eval mode it does nothing"
    model.train()
    cache = small_cache(model)
    for call in (model, model.model):
        with pytest.raises(CacheError, match="gradient checkpointing"):
            call(random_ids(2, 60), past_key_values=cache)
    with pytest.raises(CacheError, match="gradient checkpointing"):
        text(model)
    assert not cache.layers[0].is_initialized
    model(random_ids(2, 60), labels=random_ids(2, 60)).loss.backward()
    model.gradient_checkpointing_disable()
    assert torch.equal(text(model), wanted)


# Threads


def test_threads_with_a_cache_each() -> None:
    model = patched()
    prompts = [random_ids(2, 40 + 7 * i, seed=i) for i in range(4)]
    alone = [model.generate(prompt, **GREEDY).sequences for prompt in prompts]
    together: dict[int, Any] = {}

    def work(index: int) -> None:
        together[index] = model.generate(prompts[index], **GREEDY).sequences

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, sequences in enumerate(alone):
        assert torch.equal(together[index], sequences), f"thread {index} saw another one"


# Wrappers and parts


class Trainer(nn.Module):
    """As training frameworks wrap a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_model()
        self.probe = nn.Linear(2, 2)


WRAPPERS: dict[str, Any] = {
    "training module": (Trainer, lambda wrapper: wrapper.net),
    "sequential": (lambda: nn.Sequential(tiny_model()), lambda wrapper: wrapper[0]),
    "compiled in sequential": (
        lambda: nn.Sequential(torch.compile(tiny_model(), backend="eager")),
        lambda wrapper: wrapper[0]._orig_mod,
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_model_in_a_wrapper_is_meant(name: str, wanted: torch.Tensor) -> None:
    make, inner = WRAPPERS[name]
    wrapper = make()
    assert kvarn_ops.patch(wrapper, PRESET, num_sink_tokens=8) is wrapper
    assert torch.equal(text(inner(wrapper)), wanted)
    assert "self_attn" in str(kvarn_ops.explain(wrapper))
    assert kvarn_ops.unpatch(wrapper) is wrapper
    assert kvarn_ops.explain(inner(wrapper)).config is None


def test_parts_of_a_model_can_be_patched(wanted: torch.Tensor) -> None:
    model, ids = tiny_model(), random_ids(2, 60)
    dense = run(model, ids, None)
    kvarn_ops.patch(model.model, PRESET, num_sink_tokens=8)
    cache = small_cache(model)
    model.model(ids, past_key_values=cache)
    assert int(cache.get_seq_length()) == 60
    kvarn_ops.patch(model, PRESET, num_sink_tokens=8)  # and the whole one too
    assert torch.equal(text(model), wanted)
    kvarn_ops.unpatch(model)
    assert kvarn_ops.explain(model.model).config is None, "unpatch left a part patched"
    assert torch.equal(run(model, ids, None), dense)


def test_a_classifier_can_read_a_long_text_in_parts() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_model().config).eval()
    ids = random_ids(2, 120)
    dense = run(model, ids, None)
    kvarn_ops.patch(model, PRESET, num_sink_tokens=8)
    assert torch.equal(run(model, ids, None), dense)
    cache = small_cache(model)
    run(model, ids[:, :80], cache)
    found = run(model, ids[:, 80:], cache)
    assert 0 < (found - dense).norm() / dense.norm() < 0.01
