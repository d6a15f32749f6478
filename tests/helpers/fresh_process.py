"""Code in a Python of its own, where packages may be missing."""

from __future__ import annotations

import os
import subprocess
import sys
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


def run_python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """Run code in a fresh process that sees `path` first, and return what it printed last."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]
