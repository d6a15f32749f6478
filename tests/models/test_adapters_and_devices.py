"""A patched model among other tools: PEFT adapters, quantized weights, accelerate, images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import kvarn_ops
from tiny_models import random_ids, run, sharpened, small_cache, tiny_model

PRESET = "k8v8_g32"
GREEDY = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
KVarNCache = kvarn_ops.KVarNCache


def patch(model: Any) -> Any:
    return kvarn_ops.patch(model, PRESET, num_sink_tokens=8)


def text(model: Any, kind: type = KVarNCache, **inputs: Any) -> Tensor:
    out = model.generate(**({"input_ids": random_ids(2, 60)} | inputs), **GREEDY)
    assert type(out.past_key_values) is kind
    return out.sequences


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return text(tiny_model(), DynamicCache)


# PEFT


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("when", ["before", "peft model", "inner model"])
def test_an_adapter_may_come_before_or_after_the_patch(
    when: str, plain: Tensor, tmp_path: Path
) -> None:
    adapted = text(lora(tiny_model()), DynamicCache)
    assert not torch.equal(adapted, plain), "the adapter does nothing"
    model = tiny_model()
    if when == "before":
        model = lora(patch(model))
    else:
        model = lora(model)
        assert patch(model if when == "peft model" else model.base_model.model) is not None
    assert kvarn_ops.explain(model).config is not None
    assert torch.equal(text(model), adapted)
    with model.disable_adapter():
        assert torch.equal(text(model), plain)
    model.save_pretrained(tmp_path)
    kvarn_ops.unpatch(model)
    assert torch.equal(text(model, DynamicCache), adapted)
    merged = patch(model).merge_and_unload()
    assert torch.equal(text(merged), adapted)


def test_an_adapter_is_trained_on_a_patched_model() -> None:
    grads = []
    for model in (lora(patch(tiny_model())), lora(tiny_model())):
        model.train()
        model(input_ids=random_ids(2, 60), labels=random_ids(2, 60)).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) == 8
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize(("kind", "cache"), [("Prompt", KVarNCache), ("Prefix", DynamicCache)])
def test_prompt_learning(kind: str, cache: type) -> None:
    """A learned prompt takes room in the cache; a learned prefix is a dense cache of its own."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = getattr(peft, f"{kind}TuningConfig")(task_type="CAUSAL_LM", num_virtual_tokens=6)
    model = peft.get_peft_model(tiny_model(), config).eval()
    wanted = text(model, DynamicCache)
    assert torch.equal(text(patch(model), cache), wanted)


# Quantized weights


class CodedLinear(nn.Module):
    """As bitsandbytes and others replace `nn.Linear`: int8 codes and a scale per row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes * self.scale).T


def replace_linears(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, CodedLinear(child))


def torchao_int8(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("quantize", [replace_linears, torchao_int8])
def test_weights_may_be_quantized_before_or_after(
    quantize: Callable[[nn.Module], None], when: str
) -> None:
    dense, model = tiny_model(), tiny_model()
    full = run(dense, random_ids(1, 50), None)
    quantize(dense)
    assert not torch.equal(run(dense, random_ids(1, 50), None), full), "nothing was quantized"
    for step in (quantize, patch) if when == "before" else (patch, quantize):
        step(model)
    wanted = text(dense, DynamicCache)
    assert torch.equal(text(model), wanted)
    assert torch.equal(text(kvarn_ops.unpatch(model), DynamicCache), wanted)


# accelerate: modules whose weights come and go

PLACES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
SPREAD: dict[str, Any] = dict.fromkeys((*PLACES, "model.rotary_emb"), "cpu")
CPU = torch.device("cpu")
DISPATCH: dict[str, Callable[[Any, Path], Any]] = {
    "one device": lambda m, _: dispatch_model(m, {"": "cpu"}, main_device="cpu", force_hooks=True),
    "a device each": lambda m, _: dispatch_model(m, SPREAD, main_device="cpu", force_hooks=True),
    "weights in RAM": lambda m, _: cpu_offload(m, execution_device=CPU),
    "weights on disk": lambda m, path: disk_offload(m, str(path), execution_device=CPU),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", DISPATCH)
def test_a_dispatched_model(how: str, when: str, plain: Tensor, tmp_path: Path) -> None:
    model = tiny_model()
    if when == "after":
        patch(model)
    DISPATCH[how](model, tmp_path)
    assert any(hasattr(module, "_hf_hook") for module in model.modules())
    if when == "before":
        patch(model)
    assert torch.equal(text(model), plain)
    if how.startswith("weights"):
        assert next(model.parameters()).device.type == "meta", "nothing was offloaded"
    assert torch.equal(text(kvarn_ops.unpatch(model), DynamicCache), plain)


def test_a_model_loaded_with_a_device_map(plain: Tensor, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    places = SPREAD | {"model.layers.1": "disk"}
    folder = str(tmp_path / "offloaded")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=folder)
    assert torch.equal(text(patch(model)), plain)


def test_a_cache_layer_is_where_its_layer_is() -> None:
    """On the meta device, which stands for a second one."""
    model = patch(tiny_model())
    cache = small_cache(model)
    for index, device in enumerate(("cpu", "meta")):
        layer = cache.layers[index]
        keys = torch.randn(2, 2, 60, 32, device=device)
        layer.armed = True
        layer.update(keys, keys)
        tensors = (*layer.tiles, layer.rotation, layer.cumulative_length)
        assert {tensor.device.type for tensor in tensors} == {device}


# Images


def test_the_text_tower_of_an_image_model_is_packed() -> None:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(text_config=tiny_model().config, vision_config=vision, image_token_id=95)
    model = sharpened(LlavaForConditionalGeneration(config)).eval()
    ids = random_ids(2, 60, vocab=90)
    ids[:, 3:7] = 95
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    wanted = text(model, DynamicCache, **inputs)
    patch(model)
    packed = [layer.module for layer in kvarn_ops.explain(model).layers if layer.packed]
    assert packed == [f"model.language_model.layers.{i}.self_attn" for i in (0, 1)]
    assert torch.equal(text(model, **inputs), wanted)
    other = inputs | {"pixel_values": torch.randn(2, 3, 16, 16)}
    assert not torch.equal(text(model, **other), wanted), "the image is not seen"
    assert torch.equal(text(kvarn_ops.unpatch(model), DynamicCache, **inputs), wanted)
