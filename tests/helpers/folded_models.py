"""Tiny models with the rotation of values folded into their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvarn_ops
from tiny_models import random_ids

PRESET = "k8v8_g32"
IDS = random_ids(2, 120)


def fold(model: Any, preset: str = PRESET, **fields: Any) -> Any:
    return kvarn_ops.patch(model, preset, num_sink_tokens=8, fold_rotation=True, **fields)


def reasons(model: Any) -> list[str]:
    return [layer.reason for layer in kvarn_ops.explain(model).layers if layer.packed]


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def with_biases(model: Any) -> Any:
    """transformers initializes biases with 0, which no rotation changes."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


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


def torchao_int8(model: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
