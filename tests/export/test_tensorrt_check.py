"""`benchmarks/tensorrt_check.py`: the engines themselves where there are GPU and TensorRT, the PTX
where there is a GPU, and elsewhere that the script goes through its checks.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from fresh_process import start_python

pytestmark = pytest.mark.export


def outcomes(repo_root: Path, folder: Path, *options: str) -> dict[tuple[str, str], str]:
    script = repo_root / "benchmarks" / "tensorrt_check.py"
    done = start_python(script, "--out", folder, *options, cwd=folder, path=(repo_root,))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with (folder / "tensorrt_check.csv").open() as file:
        return {(row["mode"], row["check"]): row["outcome"] for row in csv.DictReader(file)}


def test_dry_run_goes_through_the_checks_and_says_what_it_skipped(repo_root, tmp_path) -> None:
    found = outcomes(repo_root, tmp_path, "--dry-run", "--only", "kernel,fallback")
    assert {found[key] for key in found if key[0] == "kernel"} == {"skipped"}
    assert {found[key] for key in found if key[0] == "fallback"} == {"passed"}
    assert ("fallback", "logits, from an empty cache") in found
    assert ("fallback", "partition") not in found, "nothing was partitioned"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_says_that_there_is_no_gpu(repo_root, tmp_path) -> None:
    script = repo_root / "benchmarks" / "tensorrt_check.py"
    done = start_python(script, "--out", tmp_path / "x", cwd=tmp_path, path=(repo_root,))
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout
    assert not (tmp_path / "x").exists()


@pytest.mark.gpu
def test_ptx_launched_as_engines_do(repo_root, tmp_path) -> None:
    found = outcomes(repo_root, tmp_path, "--only", "kernel")
    assert {found[key] for key in found if key[0] == "kernel"} == {"passed"}


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fallback", "plugin", "decompose"])
def test_engines(repo_root, tmp_path, mode: str) -> None:
    found = outcomes(repo_root, tmp_path, "--only", mode)
    assert set(found.values()) == {"passed"}
