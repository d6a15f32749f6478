"""Line retrieval in words: one line of many is asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kvarn_ops.errors import InputError
from kvarn_ops.eval.tasks.line_text import LineText


def test_line_retrieval_asks_for_one_line_of_many(tmp_path: Path) -> None:
    task = LineText(lines=50)
    questions = task.load(None, 4, 1)
    assert questions == task.load(None, 9, 1)[:4] != task.load(None, 4, 2)
    assert len({question.reference["number"] for question in questions}) > 1
    for question in questions:
        lines = [line for line in question.prompt.split("\n") if line.startswith("line ")]
        assert len({line.split(":")[0] for line in lines}) == 50
        number, asked = question.reference["number"], lines[question.reference["line"]]
        assert asked.endswith(f"REGISTER_CONTENT is <{number}>")
        assert f"of {asked.split(':')[0]}?" in question.prompt
        wrong = lines[question.reference["line"] - 1]
        for answer, score in (
            (asked, 1.0), (f"<{number}>\n{wrong}", 1.0), (f"{number[:2]},{number[2:]}", 1.0),
            (wrong, 0.0), (number[:4], 0.0), (number + "0", 0.0), ("", 0.0),
            (f"<think>{asked}", 0.0), (f"{wrong}</think>{asked}", 1.0),
        ):  # fmt: skip
            assert task.score(question, answer) == {"accuracy": score}, answer
    with pytest.raises(InputError, match="leave"):
        task.load(tmp_path, None, 0)
    with pytest.raises(InputError, match="lines must be from 1 to"):
        dataclasses.replace(task, lines=0)
