"""What `to_tensorrt` says where it cannot run, before anything long is done."""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata
from typing import Any

import pytest
import torch

import kvarn_ops
from kvarn_ops.export import tensorrt_support as support
from kvarn_ops.export import to_tensorrt
from tiny_models import patched, tiny_model

pytestmark = pytest.mark.export


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a machine look like one on which only the rest is missing."""

    def apply(
        torch_version: str = "2.13.0+cu130", trt: str = "2.13.0", cuda: str | None = "13.0",
        device: bool = True, importing: Exception | None = None,
    ) -> None:  # fmt: skip
        def load(name: str) -> None:
            if importing is not None:
                raise importing

        monkeypatch.setattr(torch, "__version__", torch_version)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(metadata, "version", lambda name: trt)
        monkeypatch.setattr(importlib, "import_module", load)

    return apply


def test_missing_package_is_named_with_its_extra() -> None:
    if importlib.util.find_spec("torch_tensorrt") is not None:
        pytest.skip("torch_tensorrt is installed")
    with pytest.raises(kvarn_ops.BackendError, match=r"not installed.*kvarn-ops\[tensorrt\]"):
        to_tensorrt(patched(), max_cache_len=64)


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        ({"trt": "2.14.0"}, r"2\.14\.0 does not fit torch 2\.13\.0\+cu130: install"),
        ({"torch_version": "2.11.0", "trt": "2.11.0"}, r"older than 2\.13.*install a newer"),
        ({"cuda": None, "torch_version": "2.13.0+cpu"}, r"2\.13\.0\+cpu is not a CUDA build.*inst"),
        ({"device": False}, "no CUDA device"),
        ({"importing": Exception("no libnvinfer")}, r"no libnvinfer.*NVIDIA's own package index"),
        ({"importing": RuntimeError("no driver")}, "no driver"),
    ],
)
def test_each_obstacle_is_one_sentence_with_a_remedy(pretend, machine, says) -> None:
    pretend(**machine)
    with pytest.raises(kvarn_ops.BackendError, match=says) as caught:
        to_tensorrt(patched(), max_cache_len=64)
    assert "\n" not in str(caught.value)


def test_nothing_is_in_the_way_where_all_is_there(pretend) -> None:
    pretend()
    assert support.unavailable() == ""
    with pytest.raises(kvarn_ops.BackendError, match=r"model is on cpu.*model\.cuda\(\)"):
        to_tensorrt(patched(), max_cache_len=64)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "inside"}, "fallback, plugin, decompose"),
        ({"inputs": torch.zeros(1, 3)}, r"\[batch_size, chunk\] int64"),
        ({"inputs": [torch.zeros(1, 3, dtype=torch.int64)] * 2}, r"one example of input_ids"),
        ({"inputs": torch.zeros(2, 3, dtype=torch.int64), "batch_size": 3}, "batch_size=3.*2"),
        ({"inputs": torch.zeros(2, 3, dtype=torch.int64), "chunk": 1}, "chunk=1.*3"),
    ],
)
def test_arguments_are_checked_before_the_machine(options, says) -> None:
    with pytest.raises(kvarn_ops.InputError, match=says):
        to_tensorrt(tiny_model(), max_cache_len=64, **options)


def test_example_gives_the_sizes() -> None:
    from kvarn_ops.export.tensorrt import _sizes

    example = torch.zeros(2, 3, dtype=torch.int64)
    assert _sizes(example, None, None) == _sizes((example,), 2, 3) == (2, 3)
    assert _sizes(None, None, None) == (1, 1)
    assert _sizes(None, 4, 8) == (4, 8)
