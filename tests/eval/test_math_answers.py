"""MATH-500 and AIME: the final answer is found, and equal answers are told from different ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark_records import first
from kvarn_ops.eval.tasks.catalogue import TEXT_TASKS
from kvarn_ops.eval.tasks.math_answers import final_answer, same_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{1}, so \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"$\boxed{\{1, 2\}}$", r"\{1, 2\}"),
        (r"\boxed{3}, and then \boxed{\frac{1}{2", "3"),
        ("I put it in \\boxed{}: the answer is 4.", "4"),
        ("**Answer:** 42 because of 7", "42"),
        ("The answer is $x=-1$. It has 2 parts.", "x=-1"),
        ("Answer: Evelyn. She is fast.", "Evelyn"),
        ("we get 5-1 = 4", "4"),
        ("so it must be -3", "-3"),
        ("it costs 1,250.50 dollars.", "1,250.50"),
        ("I do not know.", None),
        ("\\boxed{" + "\\sqrt{" * 2000 + "}" * 2001, None),
    ],
)
def test_the_final_answer_is_found(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("0.50", r"\frac12"),
        (r"\dfrac{-1}2", "-.5"),
        (r"1\frac{1}{2}", "3/2"),
        (r"\left( 3, \pi/2 \right)", r"(3,\tfrac{\pi}{2})"),
        ("(1, 0.5)", r"\left(1,\frac{1}{2}\right)"),
        ("[-2,7]", r"x \in [-2,7]"),
        (r"(-\infty,0.5) \cup (3,+\infty)", r"(-\infty,\frac12)\cup(3,\infty)"),
        (r"10,\!080", "10080"),
        (r"\$32{,}348", "32,348"),
        (r"90^{\circ}", "90°"),
        (r"18 \text{ cm}^2", "18"),
        (r"50\%", "50"),
        ("C", r"\text{(C)}"),
        ("evelyn", r"\text{Evelyn}"),
        (r"\{1, 2\}", r"1 \text{ and } 2"),
        ("y = 2x + 3", "2x+3"),
        ("2 + 3 = 5", "5"),
        ("x = 1 or x = -2", "1, -2"),
        (
            r"\begin{pmatrix} 16/49 \\ -4/7 \end{pmatrix}",
            r"\begin{pmatrix} \frac{16}{49} \\ -\frac47 \end{pmatrix}",
        ),
        (r"2 \cdot \sqrt 3", r"2\sqrt{3}"),
        ("4210_5", "4210_{5}"),
    ],
)
def test_equal_answers(given: str, wanted: str) -> None:
    assert same_answer(given, wanted)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("-1", "1"),
        ("(1,2)", "[1,2]"),
        ("(1,2)", "(2,1)"),
        ("1,2,3", "1,2"),
        ("0.33", r"\frac13"),
        ("12", r"\frac12"),
        ("5i", "5"),
        ("5m", "5"),
        ("1", "x^2=1"),
        (r"\sqrt{2}", "2"),
        (r"\frac10", r"\frac20"),
        ("4210", "4210_5"),
        ("", ""),
    ],
)
def test_different_answers(given: str, wanted: str) -> None:
    assert not same_answer(given, wanted)


def test_math_scores(tmp_path: Path) -> None:
    math, question = TEXT_TASKS["math500"], first("math500", tmp_path)
    assert "boxed" in question.prompt
    assert math.score(question, r"<think>\boxed{2}</think> It is \boxed{1.0}") == {"accuracy": 1.0}
    assert math.score(question, r"\boxed{-1}") == {"accuracy": 0.0}
    assert math.score(question, r"<think> it is surely \boxed{1}") == {"accuracy": 0.0}
    aime, question = TEXT_TASKS["aime24"], first("aime24", tmp_path)
    for answer in (r"\boxed{73}", r"\boxed{073}", "the answer is 73.", r"\boxed{m+n = 73}"):
        assert aime.score(question, answer) == {"accuracy": 1.0}, answer
    for answer in (r"\boxed{730}", r"\boxed{73.5}", r"\boxed{-73}", "", r"\boxed{x}"):
        assert aime.score(question, answer) == {"accuracy": 0.0}, answer
