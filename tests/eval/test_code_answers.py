"""HumanEval: code is found in answers, run with permission only, and ended with its children."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmark_records import first
from kvarn_ops.errors import InputError
from kvarn_ops.eval.tasks.catalogue import TEXT_TASKS
from kvarn_ops.eval.tasks.code_answers import HumanEval, with_code_execution

CHAT = "```python\ndef inc(x):\n    return x + 1\n```"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (f"Sure. First:\n```bash\npip install x\n```\n{CHAT}\nor ```", 1),
        (CHAT.replace("x + 1", "helper(x)"), 1),  # which only the prompt defines
        (CHAT.replace("x + 1", "x") + "\nor better\n" + CHAT, 0),  # the first block counts
        ("```python\nimport os\n```\n" + CHAT, 1),  # of those that define it
        (CHAT.replace("\n```", "\nif __name__ == '__main__':\n    inc(int(input()))\n```"), 1),
        ("```python\nfrom __future__ import annotations\n" + CHAT.removeprefix("```python\n"), 1),
        ("def inc(x):\n    return x + 1\n\nIsn't it short", 1),
        ("    return x + 1\n\n\ndef inc(x):\n    return 7\n", 1),
        ("    return x + 1\n\nIsn't it short", 1),
        ("    a = '''\nb\n'''\n    return x + len(a) - 2\nprint(inc('a'))", 1),
        ("return x + 1", 1),  # stripped
        ("    return x + 2\n", 0),
        ("    import sys\n    sys.exit(0)\n", 0),
        ("    hog = bytearray(1 << 31)\n    return x + 1", int(sys.platform != "linux")),
        ("I cannot do this.", 0),
        ("", 0),
    ],
)
def test_code_is_extracted_and_run(answer: str, score: int, tmp_path: Path) -> None:
    task = with_code_execution(HumanEval())
    assert task.score(first("humaneval", tmp_path), answer) == {"pass@1": float(score)}


def test_code_needs_permission(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"allow_code=True, or --allow-code"):
        TEXT_TASKS["humaneval"].score(first("humaneval", tmp_path), CHAT)


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX")
def test_endless_code_ends_with_its_children(tmp_path: Path) -> None:
    task = HumanEval(allow_code=True, seconds=2.0)
    note = tmp_path / "pid"
    answer = (
        "    import subprocess, sys\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"    open({str(note)!r}, 'w').write(str(child.pid))\n"
        "    while True:\n        pass\n"
    )
    start = time.monotonic()
    assert task.score(first("humaneval", tmp_path), answer) == {"pass@1": 0.0}
    assert time.monotonic() - start < 20
    child = note.read_text()
    for _ in range(100):  # a killed child stays in the table until it is collected
        state = subprocess.run(["ps", "-o", "stat=", "-p", child], capture_output=True, text=True)
        if not state.stdout.strip() or state.stdout.startswith("Z"):
            break
        time.sleep(0.1)
    else:
        os.kill(int(child), 9)
        pytest.fail("the child of a killed program lives on")
