"""Which backend runs where, and what is said about it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from kvarn_ops import dispatch
from kvarn_ops.errors import BackendError

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _decide_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._automatic.cache_clear()
    dispatch._obstacle.cache_clear()
    yield
    dispatch._automatic.cache_clear()
    dispatch._obstacle.cache_clear()


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), multiplies: bool = True
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(dispatch, "_on", lambda device: nullcontext())
    monkeypatch.setattr(dispatch._kernels(), "multiplies_codes", lambda device: multiplies)


def test_triton_on_a_cpu_raises() -> None:
    with pytest.raises(BackendError, match="on cpu") as caught:
        dispatch.resolve("triton", "cpu")
    assert 'backend="aten"' in str(caught.value)


def test_triton_on_a_cpu_runs_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.resolve("triton", "cpu") == "triton"
    assert dispatch.resolve("auto", "cpu") == "aten"


def test_auto_says_once_what_it_chose(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_gpu(monkeypatch)
    with caplog.at_level(logging.INFO, logger="kvarn_ops"):
        for _ in range(3):
            assert dispatch.resolve("auto", CUDA) == "triton"
            assert dispatch.resolve("auto", "cpu") == "aten"
    assert len(caplog.records) == 2
    assert all(record.levelno == logging.INFO for record in caplog.records)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"capability": (7, 5)}, "compute capability"),
        ({"multiplies": False}, "subnormal"),
        (None, "not installed"),
    ],
)
def test_auto_warns_where_kernels_cannot_run(
    change: dict | None, reason: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    pretend_gpu(monkeypatch, **(change or {}))
    if change is None:
        monkeypatch.setattr(dispatch, "is_installed", lambda name: False)
    with caplog.at_level(logging.INFO, logger="kvarn_ops"):
        assert dispatch.resolve("auto", CUDA) == "aten"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert reason in caplog.text
    with pytest.raises(BackendError, match=reason):
        dispatch.resolve("triton", CUDA)


def test_the_self_test_multiplies_codes(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch._kernels().multiplies_codes(device)
