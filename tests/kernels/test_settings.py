"""Launch settings that are shipped: which are taken, and that they change no result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from kernel_cases import CODES, SCALES, make_problem, relative_error, share_of_different
from kvarn_ops import kernel_report, kernel_tools
from kvarn_ops.kernels import heuristics

FILE = Path(__file__).resolve().parents[2] / "kernels" / "settings.json"
SHIPPED: dict[str, dict[str, dict[str, int]]] = json.loads(FILE.read_text(encoding="utf-8"))
CPU = torch.device("cpu")
TIES = 1e-4
ROUNDING = 5e-4  # of weights to fp16, relative to the peak of a program: others split otherwise


def distinct() -> list[dict[str, int]]:
    """All settings of the file, and some that it may hold after another search."""
    wide = {"encode_width": 32, "encode_stages": 2, "encode_block_k": 32, "folds": 4}
    held = [settings for cases in SHIPPED.values() for settings in cases.values()]
    return list({str(one): one for one in [wide, {"block_tokens": 32}, *held]}.values())


@pytest.mark.parametrize("settings", distinct(), ids=str)
def test_settings_change_no_result(settings: dict[str, int], device: torch.device) -> None:
    """Row 0 finishes a tile with this token, row 1 is in the middle of one."""
    problem = make_problem("k4v2_g32", 64, [32 + 5 * 32 - 1, 300], 1, device)
    with kernel_tools.trying({}):
        wanted, cache = problem.step("triton")
    with kernel_tools.trying(settings):
        found, after = problem.step("triton")
    assert relative_error(found, wanted) < ROUNDING
    for field in CODES:
        assert share_of_different(getattr(after, field), getattr(cache, field)) <= TIES, field
    for field in SCALES:
        a, b = getattr(after, field).float(), getattr(cache, field).float()
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3, equal_nan=True)


def on(arch: str, name: str = "GPU") -> heuristics.Device:
    return heuristics.Device(name, 132, True, 32, interpreted=False, arch=arch)


def test_file_is_read_for_its_architecture_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured on a device goes before it."""
    shipped = {"sm_90": {"k4v2_g128_d64_r8": {"block_tokens": 64}, "k4v2_g128_d64": {
        "encode_width": 32, "encode_stages": 2,
    }}}  # fmt: skip
    monkeypatch.setattr(heuristics, "_shipped", lambda: shipped)
    monkeypatch.setenv("KVARN_OPS_TUNING_DIR", str(tmp_path))
    kernel_tools.forget_tuning()

    def attend(arch: str) -> heuristics.AttendShape:
        with heuristics.assumed(on(arch)):
            return heuristics.attend_shape(CPU, 4, 2, 100, 64, 64, 128, 4, 2)

    def encode(arch: str) -> tuple[int, int, int]:
        with heuristics.assumed(on(arch)):
            shape = heuristics.encode_shape(CPU, 64, 128, 4, 2)
        return shape.width, shape.chunks, shape.stages

    assert [attend(arch).block_tokens for arch in ("sm_80", "sm_90", "")] == [16, 64, 16]
    assert [encode(arch) for arch in ("sm_80", "sm_90")] == [(64, 1, 1), (32, 2, 2)]
    (tmp_path / "gpu.json").write_text('{"k4v2_g128_d64_r8": {"block_tokens": 32}}')
    kernel_tools.forget_tuning()
    assert attend("sm_90").block_tokens == 32
    assert encode("sm_90") == (32, 2, 2), "encoding was not measured"
    kernel_tools.forget_tuning()


def test_file_names_cases_and_settings_that_exist() -> None:
    """A typing error would be ignored without a word."""
    cases = [*kernel_report.covering_cases(), *kernel_report.full_cases()]
    keys = {
        kernel_report.settings_key(case, name) for case in cases for name in ("attend", "encode")
    }
    names = {"attend": {"block_tokens", "folds", "stages", "warps"},
             "encode": {"encode_width", "encode_stages", "encode_block_k"}}  # fmt: skip
    assert set(SHIPPED) <= set(kernel_report.ARCHS)
    for arch, held in SHIPPED.items():
        assert set(held) <= keys, arch
        for key, settings in held.items():
            kernel = "attend" if re.search(r"_r\d+$", key) else "encode"
            assert set(settings) <= names[kernel], (arch, key)
