"""`benchmarks/gpu_check.py` without a GPU: it refuses, and its dry run goes through the stages."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

CONDITIONS = {"device", "threads", "torch", "triton", "transformers", "kvarn_ops", "date",
              "command"}  # fmt: skip
COLUMNS = {
    "copy": {"kind", "gb_per_s"},
    "correctness": {"preset", "codes_differ", "step", "attention", "within"},
    "attention": {"preset", "batch", "context", "kvarn_us", "gb_per_s", "share_of_copy", "dense",
                  "dense_us", "ratio", "flash_gqa_us", "flex_us", "fp8_us", "dequantized_us"},
    "smallest": {"batch", "context", "settings", "splits", "us", "rule_us", "ratio"},
}  # fmt: skip
LOG = """
tests/kernels/test_step.py::test_step[one_token] PASSED      [  3%]
tests/kernels/test_step.py::test_step[k2v2] FAILED           [  7%]
tests/models/test_x.py::test_y SKIPPED (no CUDA device)      [ 10%]
[gw3] [ 12%] PASSED tests/kernels/test_encode.py::test_z[a b]
[gw0] [100%] ERROR tests/kernels/test_encode.py::test_w
=========================== short test summary info ============================
FAILED tests/kernels/test_step.py::test_step[k2v2] - assert 1 == 2
"""


@pytest.fixture
def scripts(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(repo_root / "benchmarks")


def check(repo_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, repo_root / "benchmarks" / "gpu_check.py", *arguments], check=False,
        capture_output=True, text=True, timeout=170, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_without_a_gpu_it_says_so(repo_root: Path, tmp_path: Path) -> None:
    done = check(repo_root, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "There is no CUDA GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_dry_run(repo_root: Path, tmp_path: Path) -> None:
    stages = ",".join(COLUMNS)
    done = check(repo_root, "--dry-run", "--only", stages, "--out", str(tmp_path))
    log = (tmp_path / "gpu_check.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert "DRY RUN" in done.stdout
    for stage, columns in COLUMNS.items():
        found = rows(tmp_path / f"gpu_{stage}.csv")
        assert found, stage
        assert columns | CONDITIONS <= set(found[0]), stage
        assert {row["device"] for row in found} == {"dry run"}
        assert not any(row["error"] for row in found), found
        assert all(row["command"].startswith("gpu_check.py --dry-run") for row in found)
    summary = rows(tmp_path / "gpu_check.csv")
    assert [row["stage"] for row in summary] == list(COLUMNS)
    assert {row["outcome"] for row in summary} == {"passed"}


def stage(folder: Path, seconds: float, resume: bool = False) -> Any:
    import gpu_stage  # pyright: ignore[reportMissingImports]

    options = argparse.Namespace(
        stage="copy", dry_run=True, warm=None, layers=1, seconds=seconds, out=folder,
        report=folder / "report.json", command="test", resume=resume, skip=[],
    )  # fmt: skip
    module = SimpleNamespace(KEYS=("kind",), COLUMNS=("gb_per_s", "error"))
    return gpu_stage.Stage(options, module)


def go_through(one: Any, names: str) -> list[str]:
    seen = []
    for keys, name in one.each([({"kind": name}, name) for name in names]):
        seen.append(name)
        with one.guarded(keys):
            if name == "b":
                raise ValueError("not today")
            one.add(keys, gb_per_s=1)
    return seen


def test_a_case_that_fails_is_a_row_and_the_next_one_follows(
    scripts: None, tmp_path: Path
) -> None:  # fmt: skip
    first = stage(tmp_path, 60)
    assert go_through(first, "abc") == ["a", "b", "c"]
    assert [row["error"] for row in first.rows] == ["", "ValueError: not today", ""]
    assert first.errors == ["b: ValueError: not today"]
    again = stage(tmp_path, 60, resume=True)
    assert go_through(again, "abcd") == ["d"], "a stage that was restarted repeats nothing"
    assert len(rows(tmp_path / "gpu_copy.csv")) == 4


def test_what_there_is_no_time_for_is_left_out(scripts: None, tmp_path: Path) -> None:
    late = stage(tmp_path, -1)
    assert go_through(late, "ab") == []
    assert late.left_out == ["a", "b"]


def test_results_of_pytest_are_counted(scripts: None) -> None:
    import gpu_check  # pyright: ignore[reportMissingImports]

    counts, failed = gpu_check.count_results(LOG)
    assert counts == {"PASSED": 2, "FAILED": 1, "SKIPPED": 1, "ERROR": 1}
    assert [line.split("::")[1] for line in failed] == ["test_step[k2v2]", "test_w"]
