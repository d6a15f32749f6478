"""`kvarn-ops tune`: what it writes is what kernels launch with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvarn_ops import KVarNConfig, dispatch, kernel_tools, tuning
from kvarn_ops.cli import app
from kvarn_ops.errors import BackendError

CONFIG = KVarNConfig.from_preset("k4v2_g32", num_sink_tokens=32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVARN_OPS_TUNING_DIR", str(tmp_path))
    kernel_tools.forget_tuning()
    yield tmp_path
    kernel_tools.forget_tuning()


def shape(device: torch.device, head_dim: int = 64, rows: int = 2):
    from kvarn_ops.kernels.heuristics import attend_shape

    return attend_shape(device, 4, rows, 100, 64, head_dim, 32, 4, 2)


def test_the_fastest_setting_is_kept_and_used(
    folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, wide, many = shape(device), shape(device, 128), shape(device, rows=16)
    monkeypatch.setattr(tuning, "CANDIDATES", {"block_tokens": (64, 128), "programs_per_sm": (1,)})
    tried: list[dict] = []
    # 64 tokens per block are pretended to be fast, one program per multiprocessor slow.
    times = {"{}": 2.0, "64": 1.0, "128": 3.0, "1": 1.5}

    def pretend(step: object, rounds: int, where: torch.device) -> float:
        from kvarn_ops.kernels import heuristics

        tried.append(dict(heuristics._trial[-1]))
        last = tried[-1]
        key = "1" if "programs_per_sm" in last else str(last.get("block_tokens", "{}"))
        return times[key]

    monkeypatch.setattr(tuning, "_time", pretend)
    path = tuning.tune([CONFIG], [64], "4/2", [(1, 100), (2, 200)], device)
    assert path.parent == folder
    assert json.loads(path.read_text()) == {"k4v2_g32_d64_r8": {"block_tokens": 64}}
    assert len(tried) == 2 * 4
    assert shape(device).block_tokens == 64
    assert shape(device, 128) == wide
    assert shape(device, rows=16) == many, "measured with 8 rows only"
    path.unlink()
    kernel_tools.forget_tuning()
    assert shape(device) == rule


def test_command_measures_and_says_where_it_wrote(
    folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "CANDIDATES", {"stages": (1,)})
    (folder / kernel_tools.tuning_path(device).name).write_text('{"k2v2_d32": {"warps": 1}}')
    done = CliRunner().invoke(
        app,
        ["tune", "--presets", "k4v2_g32", "--head-dims", "32", "--heads", "4/2", "--batches", "1",
         "--contexts", "200", "--rounds", "1", "--device", str(device)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    written = json.loads(kernel_tools.tuning_path(device).read_text())
    assert written["k2v2_d32"] == {"warps": 1}, "cases of an earlier run stay"
    assert "k4v2_g32_d32_r8" in written


def test_nothing_to_tune_without_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._obstacle.cache_clear()
    with pytest.raises(BackendError, match="on cpu"):
        tuning.tune([CONFIG], [64], "4/2", [(1, 100)], torch.device("cpu"))
    dispatch._obstacle.cache_clear()
    assert not list(folder.iterdir())
