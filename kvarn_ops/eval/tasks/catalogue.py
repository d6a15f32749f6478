"""The text benchmarks by name."""

from __future__ import annotations

from .code_answers import HumanEval
from .instructions import IFEval
from .line_text import LineText
from .math_answers import AIME24, MATH500
from .questions import TextTask

__all__ = ["TEXT_TASKS"]

TEXT_TASKS: dict[str, TextTask] = {
    task.name: task for task in (MATH500(), AIME24(), HumanEval(), IFEval(), LineText())
}
