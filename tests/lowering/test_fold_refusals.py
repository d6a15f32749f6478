"""What cannot be proven is not folded, and said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from folded_models import (
    IDS,
    Clamp,
    after_values,
    before_output,
    distance,
    fold,
    reasons,
    torchao_int8,
)
from tiny_models import run, small_cache, tiny_model

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))


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
