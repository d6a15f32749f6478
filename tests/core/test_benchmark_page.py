"""docs/benchmarks.md says what the committed CSV files say, and its generator notices when not."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

CONDITIONS = {
    "device": "a CPU", "threads": "2", "torch": "2.13", "transformers": "5.23",
    "kvarn_ops": "0.1", "load": "0.10", "date": "2026-01-01 10:00", "command": "x",
}  # fmt: skip
ATTENTION = {
    "preset": "k4v2", "batch": "1", "q_heads": "16", "kv_heads": "4", "head_dim": "128",
    "kvarn_compiled_ms": "4", "kvarn_eager_ms": "8", "dense_bf16_ms": "5",
    "dense_bf16_packed_gqa_ms": "3", "speedup_over_packed_gqa": "0.75", "spread": "0.02",
}  # fmt: skip
MODEL = {
    "context": "8192", "step_ms": "50", "flush_ms": "", "amortized_ms": "50",
    "bytes": str(1 << 26), "times_smaller": "1", "promised_bytes": "", "fill_ms": "10",
    "spread": "0.01",
}  # fmt: skip


def run(repo_root: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, repo_root / "benchmarks" / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A run whose attention target is met, one model target missed and one not measured."""
    rows = [
        ATTENTION | {"context": context, "speedup": speedup} | CONDITIONS
        for context, speedup in (("4096", "0.5"), ("16384", "1.25"))
    ]
    write(tmp_path / "decode_attention_cpu.csv", rows)
    speeds = {"kvarn k4v2, compiled": "18", "dense static": "20"}
    rows = [MODEL | {"cache": name, "tokens_per_s": n} | CONDITIONS for name, n in speeds.items()]
    write(tmp_path / "model_decode_cpu.csv", rows)
    return tmp_path


def test_the_committed_page_is_what_the_committed_files_say(repo_root):
    checked = run(repo_root, "tables.py", "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_losses_missed_targets_and_missing_runs_are_shown(repo_root, results):
    page = results / "page.md"
    page.write_text((repo_root / "docs" / "benchmarks.md").read_text())
    arguments = ("--results", results, "--page", page)
    assert run(repo_root, "tables.py", *arguments).returncode == 0
    text = page.read_text()
    assert "| k4v2 | 1 | 16/4 | 128 | 0.50 (0.75) | **1.25** (0.75) |" in text
    assert "| 1.0 | 1.25 | met |" in text
    assert "| 1.0 | 0.90 | **missed** |" in text
    assert "| 2.2 | - | not measured |" in text
    assert "No run yet: encode_cpu.csv." in text
    assert "threads: 2; torch 2.13" in text

    assert run(repo_root, "tables.py", "--check", *arguments).returncode == 0
    page.write_text(text.replace("**missed**", "met"))
    assert run(repo_root, "tables.py", "--check", *arguments).returncode == 1


def test_pictures_are_drawn_from_the_files_that_are_there(repo_root, results):
    (results / "encode_cpu.csv").write_text("preset,context\nk4v2,1024\n")  # an older version's
    drawn = run(repo_root, "plot.py", "--results", results, "--out", results / "images")
    assert drawn.returncode == 0, drawn.stderr
    found = {path.stem: path.stat().st_size for path in (results / "images").glob("*.png")}
    assert set(found) == {"decode_attention", "model_decode"}
    assert min(found.values()) > 10_000
    assert "encode_cpu.csv has no run of this version" in drawn.stdout
