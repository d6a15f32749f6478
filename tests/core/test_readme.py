"""What the README shows is true: its code runs, its numbers are computed, its links resolve."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from kvarn_ops import KVarNConfig


@pytest.fixture(scope="module")
def readme(repo_root: Path) -> str:
    return (repo_root / "README.md").read_text()


def test_quickstart_is_short_and_runs(readme: str, repo_root: Path) -> None:
    block = re.search(r"## Quickstart\n\n```python\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    lines = [line for line in block[1].splitlines() if line.strip()]
    assert len(lines) <= 10
    script = block[1].replace("max_new_tokens=200", "max_new_tokens=3")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repo_root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "packed" in done.stdout


def test_blocks_of_the_page_on_caches_run_in_order(repo_root: Path) -> None:
    page = (repo_root / "docs" / "caches.md").read_text()
    script = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    script = script.replace('"max_new_tokens": 20', '"max_new_tokens": 2')
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repo_root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'codes'" in done.stdout


def test_table_of_presets(readme: str) -> None:
    rows = re.findall(r"\| (k\dv\d) \| (\d+) \| ([\d.]+)× \| ([\d.]+)× \| ([\d.]+)× \|", readme)
    assert len(rows) == 3
    for preset, size, *ratios in rows:
        config = KVarNConfig.from_preset(preset)
        assert config.bytes_per_token(128, 1) == int(size)
        computed = [config.compression_ratio(128, length) for length in (2048, 8192, 32768)]
        assert [float(ratio) for ratio in ratios] == [round(value, 1) for value in computed]


def test_counts_of_models_are_those_of_the_sweep(readme: str, repo_root: Path) -> None:
    with (repo_root / "benchmarks" / "results" / "model_families.csv").open() as file:
        counts = Counter(row["outcome"] for row in csv.DictReader(file))
    assert set(counts) == {"works", "dense by design", "refused", "not built"}
    text = " ".join(readme.split())
    assert (
        f"{counts['works']} work, {counts['dense by design']} have nothing to pack, "
        f"{counts['refused']} are refused with a sentence, {counts['not built']} could not be"
    ) in text


def test_links_lead_to_files(repo_root: Path) -> None:
    for page in [repo_root / "README.md", *sorted((repo_root / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_test_command_is_what_ci_runs(readme: str, repo_root: Path) -> None:
    command = re.search(r"## Tests\n\n```\n(.*?)\n```", readme, re.DOTALL)
    assert command is not None
    assert command[1] in (repo_root / ".ci" / "run").read_text()
