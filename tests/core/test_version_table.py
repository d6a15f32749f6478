"""The README's table of versions is what runs gave; bounds in the code are tested versions."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kvarn_ops import versions


@pytest.fixture(scope="module")
def table(repo_root: Path) -> ModuleType:
    """tests/versions_table.py, which is no package's module."""
    path = repo_root / "tests/versions_table.py"
    spec = importlib.util.spec_from_file_location("versions_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_what_the_runs_gave(table: ModuleType) -> None:
    readme = table.README.read_text()
    assert table.with_table(readme, table.read_rows()) == readme, "run tests/versions.py --table"


def test_every_combination_was_run_and_passed(table: ModuleType) -> None:
    rows = table.read_rows()
    assert [row.combination for row in rows] == [one.name for one in table.COMBINATIONS]
    for row, wanted in zip(rows, table.COMBINATIONS, strict=True):
        assert row.failed == 0, f"{row.combination}: {row.failed} tests failed"
        assert row.passed > 100, f"{row.combination}: hardly anything ran"
        assert row.python.startswith(wanted.python + ".")
        assert row.torch.partition("+")[0] == wanted.torch
        assert row.transformers == wanted.transformers


def test_bounds_are_tested_versions(table: ModuleType, repo_root: Path) -> None:
    pyproject = (repo_root / "pyproject.toml").read_text()
    lowest = {
        name: re.search(pattern, pyproject)[1]  # type: ignore[index]
        for name, pattern in (
            ("python", r'requires-python = ">=([\d.]+)"'),
            ("torch", r'"torch>=([\d.]+)"'),
            ("transformers", r'"transformers>=([\d.]+)"'),
        )
    }
    every = {versions.release(one.transformers) for one in table.COMBINATIONS}
    assert min(every) == versions.OLDEST_TRANSFORMERS
    oldest = versions.TESTED_TRANSFORMERS[0]
    full = [one for one in table.COMBINATIONS if versions.release(one.transformers) >= oldest]
    for name in ("torch", "transformers"):
        tried = sorted({versions.release(getattr(one, name)) for one in full})
        stated = getattr(versions, f"TESTED_{name.upper()}")
        assert stated == (tried[0], tried[-1])
        assert versions.release(lowest[name]) == tried[0]
    assert lowest["python"] in {one.python for one in full}
    # What `make test` and .ci/run install.
    pins = (repo_root / "constraints.txt").read_text()
    assert any(f"torch=={one.torch}\n" in pins for one in full)
    assert any(f"transformers=={one.transformers};" in pins for one in full)


def test_the_table_is_the_csv(table: ModuleType, tmp_path: Path) -> None:
    rows = [
        table.Row("a", "3.12.1", "2.11.0", "5.17.0", 9, 0, 1, 2.5, "2026-01-02", "c", "p"),
        table.Row("b", "3.10.4", "2.13.0", "5.23.0", 8, 1, 0, 1.0, "2026", "c", "p"),
    ]
    path = tmp_path / "versions.csv"
    path.write_text(table.as_csv(rows))
    assert table.read_rows(path) == rows
    readme = table.with_table(f"before {table.BEGIN} old {table.END} after", rows)
    assert readme.startswith("before <!--")
    assert readme.endswith("--> after")
    assert "| 3.12 | 2.11.0 | 5.17.0 | 9 | 0 | 1 | 2026-01-02 |" in readme
    assert "old" not in readme


def test_the_script_knows_the_combinations(table: ModuleType, repo_root: Path) -> None:
    command = [sys.executable, repo_root / "tests/versions.py", "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert listed.split() == [one.name for one in table.COMBINATIONS]
