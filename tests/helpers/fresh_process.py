"""Code in a Python of its own, where packages may be missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# To be formatted with `blocked`, a set of import names that are then not found.
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def start_python(
    *arguments: str | Path, cwd: Path, path: Sequence[Path] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in a fresh process that sees the folders of `path` first.

    Kernels are not interpreted there. `variables` are of its environment.
    """
    dropped = {"PYTHONPATH", "TRITON_INTERPRET"}
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    if path:
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env | variables, capture_output=True, text=True,
        check=False, timeout=900,
    )  # fmt: skip


def run_python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """Run code in a fresh process that sees `path` first, and return what it printed last."""
    return last_line(start_python("-c", code, cwd=cwd, path=() if path is None else (path,)))


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a process that succeeded printed last."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]
