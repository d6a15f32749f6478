"""What compilers make of kernels, without a GPU: spills, instructions, and Inductor's graph."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from fresh_process import last_line, start_python
from kvarn_ops import kernel_report
from kvarn_ops.benchmark.results import read_rows
from kvarn_ops.errors import BackendError, InputError
from kvarn_ops.layout import TileCache

STEP = ["prepare_kernel", "attend_kernel", "combine_kernel", "encode_kernel"]


def script(repo_root: Path, name: str, *arguments: str) -> dict[str, Any]:
    """What a script of tests/helpers prints; no GPU is visible to it."""
    path = repo_root / "tests" / "helpers" / name
    return json.loads(last_line(start_python(
        path, *arguments, cwd=repo_root, path=[repo_root], CUDA_VISIBLE_DEVICES=""
    )))  # fmt: skip


@pytest.fixture(scope="module")
def rows(repo_root: Path) -> list[dict]:
    command = ("-m", "kvarn_ops", "verify", "--compile", "all", "--json")
    done = start_python(*command, cwd=repo_root, path=[repo_root])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_no_kernel_spills(rows: list[dict]) -> None:
    spilling = [f"{row['kernel']} {row['config']} {row['arch']}" for row in rows
                if row["spill_bytes"]]  # fmt: skip
    assert not spilling


def test_no_kernel_of_the_full_matrix_spilled(repo_root: Path) -> None:
    """The last `make kernels-full`: what it spills, `benchmarks/spill_free.py` settles."""
    rows = read_rows(repo_root / "benchmarks" / "results" / "kernels_static_full.csv")
    assert len(rows) > 2000
    spilling = [f"{row['kernel']} {row['config']} {row['arch']}" for row in rows
                if int(row["spill_bytes"]) and "D576" not in row["config"]]  # fmt: skip
    assert not spilling


@pytest.mark.slow
def test_every_kernel_is_compiled_for_every_architecture(rows: list[dict]) -> None:
    found = {(row["kernel"], row["arch"]) for row in rows}
    names = ("prepare", "attend", "combine", "encode", "store")
    assert found == {(name, arch) for name in names for arch in kernel_report.ARCHS}
    for key in ("kernel", "config", "arch", "registers", "spill_bytes", "shared_bytes"):
        assert all(key in row for row in rows), key


@pytest.mark.slow
def test_decode_loop_stays_within_its_budget(rows: list[dict]) -> None:
    """Two instructions per code: above, an H200 is bound by instructions and not by memory.

    Six programs of two warps have to fit a multiprocessor: registers and shared memory.
    """
    loops = [row for row in rows if row["kernel"] == "attend" and row["config"] == "k4v2 D128 32/8"]
    nvidia = [row for row in loops if row["arch"].startswith("sm_")]
    assert len(nvidia) == 3
    for row in nvidia:
        assert row["instructions_per_code"] <= 2.0, row
        assert row["warps"] == 2
        assert row["registers"] <= 176, row
        assert row["shared_bytes"] <= 24 * 1024, row


@pytest.mark.slow
def test_programs_fit_every_gpu(rows: list[dict]) -> None:
    """Consumer GPUs (sm_86, sm_89, sm_120) have 99 KiB of shared memory, AMD's have 64."""
    for row in rows:
        limit = 64 if row["arch"].startswith("gfx") else 99
        assert row["shared_bytes"] <= limit * 1024, row


@pytest.mark.slow
def test_committed_table_is_of_this_code(rows: list[dict], repo_root: Path) -> None:
    """Registers may move by a few with a release of Triton; more is a change worth a look."""
    table = read_rows(repo_root / "benchmarks" / "results" / "kernels_static.csv")
    committed = {(r["kernel"], r["config"], r["arch"]): r for r in table}
    for row in rows:
        known = committed.get((row["kernel"], row["config"], row["arch"]))
        assert known is not None, f"{row}: run python benchmarks/kernels_static.py"
        assert abs(int(known["registers"]) - row["registers"]) <= 24, (known, row)
        assert abs(int(known["shared_bytes"]) - row["shared_bytes"]) <= 4096, (known, row)


def test_inductor_embeds_the_kernels_without_copies(repo_root: Path) -> None:
    """Two layers: four kernels each, no custom op left, and no buffer is cloned."""
    traced = script(repo_root, "trace_kernels.py")
    assert [kernel["name"] for kernel in traced["kernels"]] == 2 * STEP
    assert all(kernel["clones"] == [] for kernel in traced["kernels"]), traced
    assert traced["ops"] == []
    assert traced["clones"] == []


def test_a_package_for_a_gpu_embeds_the_kernels(repo_root: Path, tmp_path: Path) -> None:
    """A model of two layers: its kernels are embedded, no custom op is called, nothing copied.

    It is Inductor that compiles the kernels here, with the types that it gives their arguments.
    """
    package = script(repo_root, "package_for_gpu.py", str(tmp_path / "step.pt2"))
    assert sorted(name for name in package["launches"] if name in STEP) == sorted(2 * STEP)
    assert set(STEP) <= set(package["embedded"]) == set(package["launches"])
    assert package["ops"] == []
    assert package["copies"] == []
    fields = {*TileCache._fields, "length"}
    assert set(package["state"]) == {f"past_{i}_{name}" for i in (0, 1) for name in fields}


class Pool:
    """Runs jobs in this process, of which the first fails as a compiler does."""

    def __init__(self, *_: Any) -> None:
        self.jobs: list[Future[Any]] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, *_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if self.jobs:
            future.set_result(["row"])
        else:
            future.set_exception(RuntimeError("PassManager::run failed"))
        self.jobs.append(future)
        return future


def test_what_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernel_report, "ProcessPoolExecutor", Pool)
    cases, failures = kernel_report.covering_cases()[:2], []
    rows: list[Any] = kernel_report.compile_kernels(["sm_90"], cases, failures=failures)
    assert (rows, failures) == (["row"], [f"sm_90 {cases[0]}"])
    with pytest.raises(BackendError, match=r"sm_90 k4v2 D128 32/8 does not compile: PassManager"):
        kernel_report.compile_kernels(["sm_90"], cases)


@pytest.mark.parametrize("arch", ["sm90", "h200", "gfx", ""])
def test_unknown_architecture(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="sm_90"):
        kernel_report.compile_kernels(kernel_report.check_archs(arch), [])


def test_compiling_needs_triton_as_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="unset"):
        kernel_report.compile_kernels(["sm_90"], [])
    monkeypatch.setattr(kernel_report, "is_installed", lambda name: False)
    with pytest.raises(BackendError, match="pip install triton"):
        kernel_report.compile_kernels(["sm_90"], [])
