"""Folding the rotation of values into weights: the same function, undone exactly, or left and said.

Its compiled form and its copies are in test_fold_rotation_life.py.
"""

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
from kvarn_ops.errors import CacheError, ConfigError
from tiny_models import random_ids, run, small_cache, teacher_forced, tiny_model

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from tiny_families import build

PRESET = "k8v8_g32"
IDS = random_ids(2, 120)


def fold(model: Any, preset: str = PRESET, **fields: Any) -> Any:
    return kvarn_ops.patch(model, preset, num_sink_tokens=8, fold_rotation=True, **fields)


def with_biases(model: Any) -> Any:
    """transformers initializes biases with 0, which no rotation changes."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def reasons(model: Any) -> list[str]:
    return [layer.reason for layer in kvarn_ops.explain(model).layers if layer.packed]


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


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


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-500.0, 500.0)  # beyond any value of the trial run's text


def after_values(part: Callable[[], nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.v_proj = nn.Sequential(layer.self_attn.v_proj, part())

    return change


def before_output(part: Callable[[], nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.o_proj = nn.Sequential(part(), layer.self_attn.o_proj)

    return change


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


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x.mean(-1, keepdim=True))


class Coded(nn.Module):
    """As quantized linear layers of other packages."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("codes", (linear.weight.detach() * 64).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes.float() / 64).T


def replace_by_codes(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.v_proj = Coded(layer.self_attn.v_proj)


def torchao_int8(model: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def share_weights(model: Any) -> None:
    first, second = (layer.self_attn for layer in model.model.layers)
    second.v_proj.weight = first.v_proj.weight


def share_modules(model: Any) -> None:
    first, second = (layer.self_attn for layer in model.model.layers)
    second.o_proj = first.o_proj


def watch(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: None)


def offload(model: Any) -> None:
    pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"))


def adapt(model: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


class Kept(nn.Module):
    """A projection whose output is read a second time, by `Reader`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.linear(x)
        return self.last


class Reader(nn.Module):
    def __init__(self, mlp: nn.Module, kept: Kept) -> None:
        super().__init__()
        self.mlp = mlp
        vars(self)["source"] = kept

    def forward(self, x: Tensor) -> Tensor:
        last = vars(self)["source"].last
        return self.mlp(x) + nn.functional.pad(last.tanh(), (0, x.shape[-1] - last.shape[-1]))


def read_values_elsewhere(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.v_proj = Kept(attention.v_proj)
    model.model.layers[1].mlp = Reader(model.model.layers[1].mlp, attention.v_proj)


LEFT: dict[str, tuple[Callable[[Any], None], str]] = {
    "norm of values": (after_values(lambda: nn.RMSNorm(64)), "not the output of one linear"),
    "clamp of values": (after_values(Clamp), "not the output of one linear"),
    "norm of outputs": (before_output(lambda: nn.RMSNorm(128)), "not attention's output"),
    "gate of outputs": (before_output(Gate), "not attention's output"),
    "weights of another class": (replace_by_codes, "not the output of one linear"),
    "torchao": (torchao_int8, "v_proj has quantized weights"),
    "tied weights": (share_weights, "v_proj shares its weights"),
    "shared module": (share_modules, "used more than once"),
    "hooks of the user": (watch, "v_proj has hooks"),
    "offloaded": (offload, "not in memory"),
    "adapter": (adapt, "is an adapter: merge or unload"),
    "values read elsewhere": (read_values_elsewhere, "outputs would change by"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_proven_is_left_and_said(name: str) -> None:
    change, said = LEFT[name]
    model = tiny_model()
    change(model)
    dense = run(model, IDS, None)
    fold(model)
    assert all(reason.startswith("packed, not folded: ") for reason in reasons(model))
    assert all(said in reason for reason in reasons(model)), reasons(model)
    assert torch.equal(run(model, IDS, None), dense)
    cache = small_cache(model)
    run(model, IDS[:, :60], cache)
    found = run(model, IDS[:, 60:], cache)
    assert 0 < distance(found, dense[:, 60:]) < 0.05


def test_layers_are_decided_one_by_one() -> None:
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    attention.v_proj = nn.Sequential(attention.v_proj, nn.RMSNorm(64))
    dense = run(model, IDS, None)
    fold(model)
    assert [reason[:18] for reason in reasons(model)] == [
        "packed, rotation f",
        "packed, not folded",
    ]
    assert distance(run(model, IDS, None), dense) < 1e-5
    cache = small_cache(model)
    run(model, IDS, cache)
    assert [layer.config.rotate_values for layer in cache.layers] == [False, True]


def test_gpt2_has_no_linear_layers_to_fold() -> None:
    model = fold(tiny_model("gpt2"))
    assert all("not folded" in reason for reason in reasons(model))


def test_a_trial_run_that_fails_changes_nothing() -> None:
    model = tiny_model()

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("pixel_values are missing")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    fold(model)
    assert all("trial run failed (ValueError: pixel" in reason for reason in reasons(model))
    handle.remove()
    assert torch.equal(run(model, IDS, None), run(tiny_model(), IDS, None))


def test_a_trial_run_leaves_modes_and_random_numbers_alone() -> None:
    model = tiny_model(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    fold(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert set(reasons(model)) == {"packed, rotation folded"}


# Weights


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


# Caches


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
