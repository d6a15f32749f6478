"""Questions in words: what a text benchmark is, and how a local copy of its data is read.

Nothing is downloaded. A copy is a file in JSON lines, a JSON list, either of them with gzip, or
Parquet if pyarrow is installed.
"""

from __future__ import annotations

import gzip
import importlib
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...env import is_installed
from ...errors import InputError, reason

__all__ = [
    "Question",
    "Row",
    "TextTask",
    "check_limit",
    "load_questions",
    "read_rows",
    "without_thoughts",
]

_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


@dataclass(frozen=True)
class Question:
    """One question, and what its scorer needs, all of it JSON."""

    id: str
    prompt: str  # the user's message; a chat template, if there is one, is the runner's business
    reference: dict[str, Any]


class TextTask(Protocol):
    """A benchmark whose answers are free text."""

    @property
    def name(self) -> str:
        """Its key in `TEXT_TASKS`."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """How long an answer may be, unless the user says otherwise."""
        ...

    def load(self, path: Path | None, limit: int | None, seed: int) -> list[Question]:
        """Read the questions, or `limit` of them, which the seed draws; the order stays."""
        ...

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """Metrics from 0 to 1, the headline first."""
        ...


class Row(NamedTuple):
    """One record of a file, and `where` it stands: `file:line`, or `file, entry n`."""

    where: str
    fields: dict[str, Any]

    def get(self, *names: str) -> Any:
        """The first of these fields that is there and not null.

        Raises
        ------
        InputError
            If none is.
        """
        for name in names:
            if self.fields.get(name) is not None:
                return self.fields[name]
        raise InputError(
            f"{self.where}: the field {names[0]!r} is missing (found: "
            f"{', '.join(map(repr, self.fields)) or 'none'}): give the file as it was published, "
            "or rename its fields."
        )

    def text(self, *names: str) -> str:
        """`get`, for text that is not blank.

        Raises
        ------
        InputError
            If it is something else.
        """
        value = self.get(*names)
        if not isinstance(value, str) or not value.strip():
            raise InputError(
                f"{self.where}: the field {names[0]!r} must be text that is not blank, it is "
                f"{value!r}: repair this record, or remove it."
            )
        return value


def load_questions(
    task: str, path: Path | None, limit: int | None, seed: int, make: Callable[[Row], Question]
) -> list[Question]:
    """Read a file, make a question of each record, and draw `limit` of them.

    Raises
    ------
    InputError
        If there is no such file, or a record of it cannot be used, drawn or not.
    """
    check_limit(limit)
    if path is None:
        raise InputError(f"{task} needs a local copy of its data: give the path of the file.")
    questions: list[Question] = []
    seen: dict[str, str] = {}
    for row in read_rows(path):
        question = make(row)
        if question.id in seen:
            raise InputError(
                f"{row.where}: the id {question.id!r} is already that of {seen[question.id]}: "
                "remove one of the two records."
            )
        seen[question.id] = row.where
        questions.append(question)
    if limit is None or limit >= len(questions):
        return questions
    return [questions[i] for i in sorted(random.Random(seed).sample(range(len(questions)), limit))]


def check_limit(limit: int | None) -> None:
    """Refuse a limit below 1 with an `InputError`."""
    if limit is not None and limit < 1:
        raise InputError(f"the limit must be at least 1 question, or None for all, not {limit}.")


def read_rows(path: Path) -> list[Row]:
    """Read every record of a file, or of the only suitable file in a directory.

    Raises
    ------
    InputError
        If there is no such file, it is empty or damaged, or its records are not JSON objects.
    """
    file = _find_file(path)
    try:
        if file.name.endswith(".parquet"):
            rows = _read_parquet(file)
        else:
            content = file.read_bytes()
            if file.name.endswith(".gz"):
                content = gzip.decompress(content)
            text = content.decode("utf-8-sig")
            is_lines = file.name.endswith((".jsonl", ".jsonl.gz"))
            rows = _split_lines(file, text) if is_lines else _split_list(file, text)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(
            f"{file} cannot be read: {reason(error)}. Get the file again, or correct its ending."
        ) from None
    if not rows:
        raise InputError(f"{file} has no records: get the file again.")
    return rows


def without_thoughts(answer: str) -> str:
    """What follows the last `</think>`; nothing if a thought was begun and never ended."""
    _, end, after = answer.rpartition("</think>")
    if end:
        return after.strip()
    return "" if answer.lstrip().startswith("<think>") else answer


def _find_file(path: Path) -> Path:
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if entry.name.endswith(_ENDINGS))
        if len(found) != 1:
            names = ", ".join(entry.name for entry in found[:5]) or "none"
            raise InputError(
                f"the directory {str(path)!r} must hold exactly one file that ends with "
                f"{', '.join(_ENDINGS)} (found: {names}): give the path of the file."
            )
        return found[0]
    if not path.is_file():
        raise InputError(f"the data file {str(path)!r} does not exist: give the path of a copy.")
    if not path.name.endswith(_ENDINGS):
        raise InputError(
            f"the data file {path.name!r} must end with one of {', '.join(_ENDINGS)}: convert it."
        )
    return path


def _split_lines(file: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() also splits at U+2028
        if line.strip():
            where = f"{file}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{where}: this line is not JSON ({reason(error)}): get the file again; one "
                    "that is a single list must end with .json."
                ) from None
            rows.append(_row(where, record))
    return rows


def _split_list(file: Path, text: str) -> list[Row]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise InputError(
            f"{file}:{line}: this is not JSON ({reason(error)}): get the file again; one with an "
            "object in every line must end with .jsonl."
        ) from None
    if not isinstance(records, list):
        raise InputError(
            f"{file}:1: a list of objects is needed, this is one {type(records).__name__}: give "
            "the file of questions, not one that describes them."
        )
    return [_row(f"{file}, entry {number}", record) for number, record in enumerate(records, 1)]


def _read_parquet(file: Path) -> list[Row]:
    if not is_installed("pyarrow"):
        raise InputError(
            f"{file} is Parquet, which needs pyarrow: pip install pyarrow, or convert it to .jsonl."
        )
    try:
        records = importlib.import_module("pyarrow.parquet").read_table(file).to_pylist()
    except ValueError as error:  # ArrowInvalid
        raise InputError(
            f"{file} is not readable Parquet ({reason(error)}): get the file again."
        ) from None
    return [_row(f"{file}, entry {number}", record) for number, record in enumerate(records, 1)]


def _row(where: str, record: Any) -> Row:
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: an object with named fields is needed, not {type(record).__name__}: give "
            "the file as it was published."
        )
    return Row(where, record)
