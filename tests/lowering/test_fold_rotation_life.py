"""A folded model compiled, copied, moved and met by adapters."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._dynamo.utils import counters
from torch.nn.modules import module as nn_module

import kvarn_ops
from kvarn_ops.errors import UnsupportedModelError
from tiny_models import random_ids, run, small_cache, teacher_forced, tiny_model

PRESET = "k8v8_g32"
IDS = random_ids(2, 120)


def folded(model: Any = None, **fields: Any) -> Any:
    model = tiny_model() if model is None else model
    return kvarn_ops.patch(model, PRESET, num_sink_tokens=8, fold_rotation=True, **fields)


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def everything(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module, by identity or by what it holds."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[path] = type(module)
        for name, value in vars(module).items():
            if isinstance(value, dict):
                value = {key: id(item) for key, item in value.items()}
            found[f"{path}.{name}"] = value if isinstance(value, (dict, set)) else id(value)
    return found


def test_unpatch_leaves_nothing() -> None:
    gc.collect()  # models of earlier tests
    model = tiny_model(attention_bias=True)
    before = everything(model)
    for _ in range(2):
        folded(model)
        assert everything(model) != before
        kvarn_ops.unpatch(model)
        assert everything(model) == before
    assert not nn_module._global_module_registration_hooks


# Compiled


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_over_tile_boundaries_and_after_new_weights() -> None:
    model = folded()
    counters.clear()
    step = torch.compile(model, fullgraph=True)
    for seed in (0, 1):
        model.load_state_dict(tiny_model(seed=seed).state_dict())
        found = teacher_forced(model, IDS, small_cache(model), 30, step)
        wanted = teacher_forced(model, IDS, small_cache(model), 30)
        assert distance(found[:, :40], wanted[:, :40]) < 1e-5
        assert distance(found, wanted) < 1e-2
        dense = run(tiny_model(seed=seed), IDS, None)
        assert distance(found, dense) < 0.05, "compiled code has the weights of another model"
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_ops_of_a_graph_do_not_rotate_values() -> None:
    def config_lines(model: Any) -> set[str]:
        record = EagerAndRecordGraphs()
        cache = small_cache(model)
        run(model, IDS[:, :60], cache)
        torch.compiler.reset()
        run(torch.compile(model, backend=record, fullgraph=True), IDS[:, 60:61].clone(), cache)
        arguments = [arg for node in record.graphs[0].graph.nodes for arg in node.args]
        return {arg for arg in arguments if isinstance(arg, str) and arg.startswith("k8v8")}

    assert [":rotkv:" in line for line in config_lines(kvarn_ops.patch(tiny_model()))] == [True]
    assert [":rotk:" in line for line in config_lines(folded())] == [True]


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_with_gradients() -> None:
    model, dense = folded(), tiny_model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for each in (compiled, dense):
        each(IDS, labels=IDS, use_cache=False).loss.backward()
    for one, other in zip(model.parameters(), dense.parameters(), strict=True):
        assert distance(one.grad, other.grad) < 1e-4


# Copies and moves


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_stand_on_their_own(how: str) -> None:
    gc.collect()  # models of earlier tests
    model = folded()
    cache = small_cache(model)
    run(model, IDS[:, :60], cache)
    if how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, cache)))
    else:
        twin, other = copy.deepcopy((model, cache))
    wanted = run(model, IDS[:, 60:], cache)
    assert torch.equal(run(twin, IDS[:, 60:], other), wanted)
    dense = run(tiny_model(), IDS, None)
    assert torch.equal(run(kvarn_ops.unpatch(model), IDS, None), dense)
    assert distance(run(twin, IDS, small_cache(twin)), dense) < 0.05, "unpatching reached the copy"
    with pytest.raises(UnsupportedModelError, match="unpatch"):
        twin.add_adapter(None)
    assert torch.equal(run(kvarn_ops.unpatch(twin), IDS, None), dense)
    assert not nn_module._global_module_registration_hooks


def test_a_saved_model_is_folded_where_it_is_loaded(tmp_path: Path) -> None:
    """In a new process."""
    model = folded()
    torch.save((model, IDS, run(model, IDS, None)), tmp_path / "model.pt")
    script = f"""
import torch
model, ids, wanted = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
import kvarn_ops
with torch.no_grad():
    assert torch.equal(model(ids, use_cache=False).logits, wanted)
    out = model(ids, past_key_values=kvarn_ops.KVarNCache(model.config, 256, "k8v8_g32")).logits
    assert (out - wanted).norm() < 0.05 * wanted.norm()
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_folded_model_in_another_dtype(dtype: torch.dtype) -> None:
    model, dense = folded().to(dtype), tiny_model().to(dtype)
    exact = run(tiny_model(), IDS, None)
    limit = 3 * distance(run(dense, IDS, None).float(), exact) + 1e-6
    assert distance(run(model, IDS, None).float(), exact) < limit
    assert torch.equal(run(kvarn_ops.unpatch(model), IDS, None), run(dense, IDS, None))


def test_a_folded_model_is_offloaded(tmp_path: Path) -> None:
    """accelerate moves the weights, and brings them for each forward."""
    accelerate = pytest.importorskip("accelerate")
    model = folded()
    wanted = run(model, IDS, None)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model.model.layers[0].self_attn.v_proj.weight.is_meta
    assert torch.equal(run(model, IDS, None), wanted)


def test_inference_mode() -> None:
    model = folded()
    wanted = run(model, IDS, None)
    with torch.inference_mode():
        assert torch.equal(model(IDS, use_cache=False).logits, wanted)
        inside = folded()
        assert torch.equal(inside(IDS, use_cache=False).logits, wanted)
    assert torch.equal(run(model, IDS, None), wanted)


# Adapters


def lora_config(**fields: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **fields
    )


def load(model: Any, folder: Path) -> None:
    model.load_adapter(str(folder))


def add(model: Any, folder: Path) -> None:
    model.add_adapter(lora_config())


def get(model: Any, folder: Path) -> None:
    import peft

    peft.get_peft_model(model, lora_config())


def inject(model: Any, folder: Path) -> None:
    import peft

    peft.inject_adapter_in_model(lora_config(), model)


def load_as_peft(model: Any, folder: Path) -> None:
    import peft

    peft.PeftModel.from_pretrained(model, str(folder))


def prefix(model: Any, folder: Path) -> None:
    import peft

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    peft.get_peft_model(model, config)


@pytest.mark.parametrize("way", [load, add, get, inject, load_as_peft, prefix])
def test_adapters_added_later_are_refused(way: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(tiny_model(), lora_config(init_lora_weights=False)).save_pretrained(
        tmp_path
    )
    model = folded()
    before, wanted = everything(model), run(model, IDS, None)
    with pytest.raises(UnsupportedModelError, match=r"call kvarn_ops.unpatch\(model\) first"):
        way(model, tmp_path)
    assert everything(model) == before
    assert torch.equal(run(model, IDS, None), wanted)
    other = tiny_model()
    way(other, tmp_path)  # a model that is not folded, while one is
    way(kvarn_ops.unpatch(model), tmp_path)
    assert way is prefix or any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_a_model_inside_peft_is_left(kind: str) -> None:
    peft = pytest.importorskip("peft")
    config = lora_config(init_lora_weights=False)
    if kind == "prefix":
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    model = peft.get_peft_model(tiny_model(), config).eval()
    folded(model)
    said = [layer.reason for layer in kvarn_ops.explain(model).layers]
    assert all("is an adapter: merge or unload adapters first" in reason for reason in said), said
