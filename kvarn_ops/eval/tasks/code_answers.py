"""HumanEval: take the code out of an answer, and run the tests on it in a process of its own.

The tests run code that a model wrote. The process has limits of time, memory and file size, an
empty directory and almost no environment; it is no sandbox: it can read files and use the network
as the user can. So nothing runs unless the task was made with `allow_code=True`. Where Python has
no `resource` module (Windows), time is the only limit.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from .questions import Question, Row, load_questions, without_thoughts

__all__ = ["HumanEval", "extract_code", "passes", "with_code_execution"]

_REQUEST = "Complete this Python function. Answer with the whole function in a ```python block.\n\n"
_FENCED = re.compile(r"^[ \t]*```[ \t]*([\w+]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.M)
_PYTHON = ("", "py", "python", "python3", "Python")
_CONTINUATION = re.compile(r"(?:[ \t]*\n)*(?: {2,}|\t)(?!\s|```)")  # one space: a tokenizer's
_CODE_LINE = re.compile(r"(?:from|import|def|async def|class)\s|@\w")

_INSIDE = ("", " ", "\t", "#", ")")  # how lines in a function begin; ")" ends a long signature

_PASSED = 87  # an exit status that code which leaves early, with sys.exit(), does not have
_MEMORY = 1 << 30
_FILE_SIZE = 1 << 24

# Sets the limits inside the new process (a preexec_fn may deadlock beside the threads of torch),
# and runs the file as a module that is not __main__, so that demonstrations at its end stay silent.
_BOOTSTRAP = """
import os, sys, types
path, seconds, memory, size, passed = sys.argv[1], *map(int, sys.argv[2:])
try:
    import resource
except ImportError:
    pass
else:
    limits = {"CPU": seconds, "AS": memory, "FSIZE": size, "CORE": 0}
    for name, limit in limits.items():
        number = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(number)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        try:
            resource.setrlimit(number, (limit, limit))
        except (ValueError, OSError):  # macOS does not limit address space
            pass
with open(path, encoding="utf-8") as file:
    source = file.read()
module = types.ModuleType("answer")
sys.modules["answer"] = module
exec(compile(source, "answer.py", "exec"), module.__dict__)
os._exit(passed)
"""


@dataclass(frozen=True)
class HumanEval:
    """164 functions to write; `task_id`, `prompt`, `entry_point`, `test`, `canonical_solution`.

    `allow_code` permits `score` to run what the model wrote; see the module's text for the risk.
    """

    name: str = "humaneval"
    max_new_tokens: int = 1024
    allow_code: bool = False
    seconds: float = 10.0

    def load(self, path: Path | None, limit: int | None, seed: int) -> list[Question]:
        """Read the functions; see `load_questions`."""
        return load_questions(self.name, path, limit, seed, self._question)

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """`pass@1`: the tests pass.

        Raises
        ------
        InputError
            If the task may not run code.
        """
        if not self.allow_code:
            raise InputError(
                f"{self.name} scores an answer by running code that the model wrote, which is not "
                "allowed unless you ask for it: pass allow_code=True, or --allow-code."
            )
        reference = question.reference
        entry_point = reference["entry_point"]
        code = extract_code(without_thoughts(answer), reference["prompt"], entry_point)
        program = f"{code}\n\n{reference['test']}\n\ncheck({entry_point})\n"
        return {"pass@1": float(passes(program, self.seconds))}

    def _question(self, row: Row) -> Question:
        entry_point = row.text("entry_point")
        prompt = row.text("prompt")
        if _definition(entry_point).search(prompt) is None:
            raise InputError(
                f"{row.where}: the field 'prompt' does not define the entry point "
                f"{entry_point!r}: give the file as it was published."
            )
        row.text("canonical_solution")  # a file without it is another data set
        reference = {"prompt": prompt, "entry_point": entry_point, "test": row.text("test")}
        return Question(
            id=row.text("task_id"), prompt=_REQUEST + prompt.lstrip("\n"), reference=reference
        )


def with_code_execution(task: HumanEval) -> HumanEval:
    """The same task with the permission to run code."""
    return dataclasses.replace(task, allow_code=True)


def extract_code(answer: str, prompt: str, entry_point: str) -> str:
    """The code to test: an answer in a chat, or a continuation of the prompt.

    An answer whose first line is indented continues the prompt. Of the fenced blocks in another,
    the first that defines the entry point counts, behind what the prompt has in front of the
    function (imports, helpers); without one, the answer's own definition from the first line of
    code on. Text without fences ends before the first statement at the left margin that follows
    the function.
    """
    definition = _definition(entry_point)
    answer = answer.replace("\r\n", "\n")
    if not _CONTINUATION.match(answer):
        head = prompt[: found.start()] if (found := definition.search(prompt)) else ""
        blocks = [body for language, body in _FENCED.findall(answer) if language in _PYTHON]
        for block in map(textwrap.dedent, blocks):
            if definition.search(block):
                return _join(head, block)
        if definition.search(answer):
            lines = answer.split("\n")
            first = next(i for i, line in enumerate(lines) if _CODE_LINE.match(line))
            return _join(head, _cut("\n".join(lines[first:]), definition))
        answer = next((block for block in blocks if block[:1].isspace()), answer)
    body = re.sub(r"^(?:[ \t]*\n)+", "", answer)
    if not re.match(r" {4}|\t", body):  # where answers are stripped, the first line loses its own
        body = "    " + body.lstrip()
    return _cut(prompt.rstrip("\n") + "\n" + body, definition)


def passes(program: str, seconds: float) -> bool:
    """Run a program in a new process, and tell whether it came to its end in time.

    Its whole process group is killed afterwards. A program that calls `sys.exit` has not come to
    its end.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        file = Path(directory, "answer.py")
        file.write_text(program, encoding="utf-8", errors="replace")
        work = Path(directory, "work")
        work.mkdir()
        numbers = (int(seconds) + 2, _MEMORY, _FILE_SIZE, _PASSED)
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOTSTRAP, str(file), *map(str, numbers)],
            cwd=work,
            env=_environment(work),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(seconds) == _PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill_group(process)


def _definition(entry_point: str) -> re.Pattern[str]:
    return re.compile(rf"^(?:async )?def {re.escape(entry_point)}\s*\(", re.MULTILINE)


def _join(head: str, code: str) -> str:
    """Both, one behind the other, but imports from `__future__` in front."""
    lines = [*head.split("\n"), *code.split("\n")]
    return "\n".join(sorted(lines, key=lambda line: not line.startswith("from __future__ ")))


def _cut(code: str, definition: re.Pattern[str]) -> str:
    """Everything up to the end of the function."""
    found = definition.search(code)
    if found is None:
        return code
    lines = code.split("\n")
    start = code.count("\n", 0, found.start())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes such as "\d"
            nodes = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # prose behind the function
        ends = (i for i in range(start + 1, len(lines)) if lines[i][:1] not in _INSIDE)
    else:
        ends = (node.end_lineno for node in nodes if (node.end_lineno or 0) > start)
    return "\n".join(lines[: next(ends, len(lines))])


def _environment(work: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}  # Windows
    # One thread each: the stacks of a thread pool count as memory.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return kept | threads | {"HOME": str(work), "TMPDIR": str(work), "PATH": os.defpath}


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
