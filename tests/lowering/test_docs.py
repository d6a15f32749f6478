"""docs/lowering.md says what the code does, and its example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.lowering import stages_table


def block(page: str, name: str) -> str:
    return next(match[0] for match in stages_table.MARKED.finditer(page) if match[2] == name)


@pytest.fixture
def page(repo_root: Path) -> str:
    return (repo_root / "docs" / "lowering.md").read_text(encoding="utf-8")


def test_every_pass_is_described_as_in_its_docstring(page: str) -> None:
    assert stages_table.pass_sections() in block(page, "passes"), "run stages_table.py"


@pytest.mark.slow
@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="reasons name nodes as the newest torch calls them"
)
def test_every_form_is_listed_with_what_becomes_of_it(page: str) -> None:
    assert stages_table.form_table() in block(page, "forms"), "run stages_table.py"


def test_the_check_notices_a_change(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stages_table.BLOCKS, "forms", lambda: "")
    monkeypatch.setitem(stages_table.BLOCKS, "passes", lambda: "other\n")
    changed = stages_table.filled_in(page)
    assert block(changed, "passes") == "<!-- generated: passes -->\nother\n<!-- end -->"
    assert changed.startswith(page.partition("<!-- generated")[0])


def test_the_example_runs(page: str, tmp_path: Path, repo_root: Path) -> None:
    example = re.search(r"<!-- example -->\n```python\n(.*?)```", page, re.DOTALL)
    assert example is not None
    file = tmp_path / "example.py"  # a file: a pass without source is not cached
    file.write_text(f"import sys\nsys.path.insert(0, {str(repo_root)!r})\n{example[1]}")
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    if "rewrites" in done.stdout:  # else it came from the cache on disk
        assert "ScaleOnce x1" in done.stdout
        assert "not a positive number" in done.stdout
