"""Run tests under other versions of Python, torch and transformers, and write down what came out.

Each combination gets a virtual environment outside of the checkout and a copy of the checkout as it
is now. Results go to `benchmarks/results/versions.csv`, a row per combination, and from there into
the table of README.md. Standard library only; `make versions` runs it.

    python tests/versions.py                      every combination that has no row of this commit
    python tests/versions.py --only py3.12        those whose name contains it, always
    python tests/versions.py --table              only draw the README's table again
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

from versions_table import (
    COMBINATIONS,
    README,
    RESULTS,
    ROOT,
    Combination,
    Row,
    as_csv,
    in_order,
    read_rows,
    with_table,
)

# What is run: models and ops, and a compiled step (tests/core/test_verify.py). Left to `make test`:
# what does not depend on the versions or is slow.
TESTS = (
    "tests/core",
    "tests/models",
    "-m",
    "not slow",
    "--ignore-glob=tests/core/test_bench*.py",
    "--ignore=tests/core/test_eager_speed.py",
    "--ignore=tests/core/test_encode_properties.py",
    "--deselect=tests/core/test_ops_contract.py::test_opcheck[step",  # minutes
    "--ignore=tests/core/test_other_packages.py",
    "--ignore=tests/core/test_packaging.py",
    "--ignore=tests/core/test_readme.py",
    "--ignore=tests/core/test_version_table.py",  # of the table that this script writes
    "--ignore-glob=tests/models/test_demo*.py",
)
NEEDED_BY_TESTS = ("pytest>=8", "hypothesis", "setuptools>=77", "safetensors", "accelerate")


def commit() -> str:
    """The commit, and whether the tree differs from it by more than this script's own results."""
    own = [f":!{path.relative_to(ROOT)}" for path in (RESULTS, README)]
    changed = _output(["git", "-C", ROOT, "status", "--porcelain", "--", ".", *own])
    return _output(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]) + "+" * bool(changed)


def find_python(version: str) -> str | None:
    """An interpreter of that version, from PATH or pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = sorted(pyenv.glob(f"{version}.*/bin/python"))
    for candidate in (sys.executable, f"python{version}", *map(str, reversed(found))):
        ask = "import sys; print('%d.%d' % sys.version_info[:2])"
        try:
            if _output([candidate, "-c", ask]) == version:
                return candidate
        except (OSError, subprocess.CalledProcessError):
            continue
    return None


def copy_tree(target: Path) -> None:
    """Copy what git knows and what it would add, so that edits during the run do not matter."""
    listed = _output(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "-z"])
    shutil.rmtree(target, ignore_errors=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def install(combination: Combination, folder: Path, torch_index: str | None) -> Path:
    """Make the environment, unless it is there, and return its interpreter."""
    python, stamp = folder / "venv" / "bin" / "python", folder / "venv" / "installed"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if stamp.exists():
        subprocess.run(
            [*pip, "--no-deps", "--no-build-isolation", "-e", folder / "tree"], check=True
        )
        return python
    interpreter = find_python(combination.python)
    if interpreter is None:
        raise LookupError(f"no Python {combination.python} was found on PATH or in pyenv")
    subprocess.run([interpreter, "-m", "venv", "--clear", folder / "venv"], check=True)
    pins = [f"torch=={combination.torch}", f"transformers=={combination.transformers}"]
    index = ["--extra-index-url", torch_index] if torch_index else []
    # The extra `hf` is not asked for: it would refuse transformers that are tried on purpose.
    package = f"{folder / 'tree'}[bench]"
    subprocess.run([*pip, *index, *pins, *NEEDED_BY_TESTS, "-e", package], check=True)
    stamp.touch()
    return python


def run_tests(python: Path, folder: Path, limit_minutes: float) -> dict[str, int]:
    """Run `TESTS` in the copy of the tree and count the outcomes."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    # One thread, so that combinations can run beside other work; a compile cache of their own.
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "PYTHONPATH": "",
    }
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    limit = limit_minutes * 60
    subprocess.run([*command, *TESTS], cwd=folder / "tree", env=env, timeout=limit, check=False)
    suites = ET.parse(report).getroot().iter("testsuite")
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in suites:
        for key in counts:
            counts[key] += int(suite.get(key, 0))
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    return {"passed": passed, "failed": failed, "skipped": counts["skipped"]}


def installed_versions(python: Path) -> dict[str, str]:
    """What really is in the environment."""
    code = (
        "import json, platform, torch, transformers; print(json.dumps(dict("
        "python=platform.python_version(), torch=torch.__version__, "
        "transformers=transformers.__version__)))"
    )
    return json.loads(_output([python, "-c", code]))


def try_out(combination: Combination, folder: Path, args: argparse.Namespace) -> Row:
    """One combination, from nothing to a row."""
    commit_now = commit()
    copy_tree(folder / "tree")
    python = install(combination, folder, args.torch_index)
    start = time.monotonic()
    counts = run_tests(python, folder, args.limit)
    return Row(
        combination=combination.name,
        **installed_versions(python),
        **counts,
        minutes=round((time.monotonic() - start) / 60, 1),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        commit=commit_now,
        platform=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    )


def main() -> int:
    """Run what was asked for; exit code 1 if a test failed or a combination could not be tried."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--only", action="append", default=[], help="part of a name; repeatable")
    parser.add_argument("--list", action="store_true", help="names of the combinations")
    parser.add_argument("--table", action="store_true", help="only draw README.md's table again")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "kvarn_versions")
    parser.add_argument("--torch-index", help="index url of the CPU wheels of torch: smaller")
    parser.add_argument("--remove", action="store_true", help="delete each environment afterwards")
    parser.add_argument("--limit", type=float, default=60, help="minutes of tests per combination")
    args = parser.parse_args()
    if args.list:
        print("\n".join(combination.name for combination in COMBINATIONS))
        return 0
    wrong = [] if args.table else _run(args)
    README.write_text(with_table(README.read_text(), read_rows()))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def _run(args: argparse.Namespace) -> list[str]:
    """Try the combinations one after the other; return what went wrong."""
    now = commit()
    done = {row.combination for row in read_rows() if row.commit == now and "+" not in now}
    chosen = [
        combination
        for combination in COMBINATIONS
        if (
            any(part in combination.name for part in args.only)
            if args.only
            else combination.name not in done
        )
    ]
    wrong = []
    for number, combination in enumerate(chosen, 1):
        print(f"=== {number} of {len(chosen)}: {combination.name}", flush=True)
        folder = args.work / combination.name
        try:
            row = try_out(combination, folder, args)
        except (LookupError, subprocess.SubprocessError, OSError, ET.ParseError) as error:
            wrong.append(f"{combination.name}: not tried: {error}")
            continue
        finally:
            if args.remove:
                shutil.rmtree(folder, ignore_errors=True)
        others = [other for other in read_rows() if other.combination != row.combination]
        RESULTS.write_text(as_csv(in_order([*others, row])))
        if row.failed or not row.passed:
            wrong.append(f"{combination.name}: {row.failed} failed, {row.passed} passed")
    return wrong


def _output(command: list[str | Path]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
