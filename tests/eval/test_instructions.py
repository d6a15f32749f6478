"""IFEval: every instruction tells texts that follow it from texts that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmark_records import RECORDS, first, write
from kvarn_ops.errors import InputError
from kvarn_ops.eval.tasks.catalogue import TEXT_TASKS
from kvarn_ops.eval.tasks.instruction_checks import INSTRUCTIONS, count_sentences
from kvarn_ops.eval.tasks.questions import Question

# Instruction, arguments, texts that follow it, texts that do not.
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["sun", "Sea"]}, ["SUN and sea"], ["sunny day"]),
    (
        "keywords:frequency",
        {"relation": "at least", "keyword": "war", "frequency": 2},
        ["War and war"],
        ["war and peace"],
    ),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["rock"]},
        ["rocks roll"],
        ["a Rock, here"],
    ),
    (
        "keywords:letter_frequency",
        {"let_relation": "less than", "letter": "t", "let_frequency": 2},
        ["a Tea"],
        ["The cat"],
    ),
    (
        "language:response_language",
        {"language": "hi"},
        ["यह एक अच्छा दिन है और मैं खुश हूँ"],
        ["हा एक चांगला दिवस आहे आणि मी आनंदी आहे", "This is a good day"],
    ),
    (
        "language:response_language",
        {"language": "es"},
        ["Los perros son más grandes que los gatos en la casa"],
        ["Os cães são mais grandes que os gatos na casa e não gostam"],
    ),
    (
        "length_constraints:number_sentences",
        {"relation": "less than", "num_sentences": 3},
        ["Mr. Doe paid 3.5 dollars. Fine!"],
        ["One. Two? Three!"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb\n***"],
        ["a\n\nb", "a\n******\nb"],
    ),
    (
        "length_constraints:number_words",
        {"relation": "at least", "num_words": 3},
        ["one two-three"],
        ["one two."],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        ['a\n\n"Weekend, at last'],
        ["a\n\nWeekends are", "a\n\nb\n\nweekend", "Weekend\n\na"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name] and [address]"],
        ["[name"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["Bye\nP. P.S. more"],
        ["Bye\nP.S. more"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n- b", "* a\n  * b\n**c**"],
        ["* a", "* a\n* b\n* c"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is maybe."],
        ["my answer is perhaps."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and **b**"],
        ["**a** and b", "* a\n* b"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb"],
        ["Section 1\na\nSection B"],
    ),
    ("detectable_format:json_format", {}, ['```json\n{"a": 1}\n```', "[1]"], ["{'a': 1}", "{"]),
    (
        "detectable_format:title",
        {},
        ["<<A title>>\ntext"],
        ["<< >> text", "<a>", ">>a<<", "<<a\nb>>"],
    ),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a\n******\na", "a", "a******b******c"]),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a poem."},
        [" write a poem. Roses"],
        ["Sure. Write a poem."],
    ),
    ("startend:end_checker", {"end_phrase": "Bye?"}, ['"So, bye?"'], ["Bye? Yes"]),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 2},
        ["BIG NEWS today"],
        ["BIG News"],
    ),
    ("change_case:english_capital", {}, ["IT IS THE END"], ["IT IS the END", "DAS IST DAS ENDE"]),
    ("change_case:english_lowercase", {}, ["it is the end"], ["It is the end", "c'est la vie"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
    ("startend:quotation", {}, [' "a" '], ['"a', '"']),
]


def ifeval(names: list[str], arguments: list[dict[str, Any]]) -> Question:
    return Question("1", "p", {"instruction_id_list": names, "kwargs": arguments})


@pytest.mark.parametrize(("name", "arguments", "right", "wrong"), CASES)
def test_an_instruction_tells_right_from_wrong(
    name: str, arguments: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    for score, texts in ((1.0, right), (0.0, [*wrong, "", " \n"])):
        for text in texts:
            scores = TEXT_TASKS["ifeval"].score(ifeval([name], [arguments]), text)
            assert scores["prompt_strict"] == scores["instruction_strict"] == score, text


def test_all_25_instructions_have_a_case() -> None:
    assert len(INSTRUCTIONS) == 25
    assert {name for name, *_ in CASES} == set(INSTRUCTIONS)
    assert count_sentences("1. Mix it.\n2. Bake it.\nDr. J. Doe (U.S.) said: wait! Why?") == 4


def test_strict_and_loose_accuracy(tmp_path: Path) -> None:
    task, question = TEXT_TASKS["ifeval"], first("ifeval", tmp_path)
    assert next(iter(task.score(question, "x"))) == "prompt_strict"
    answer = "Sure, here it is:\nSection 1\na\nSection 2\nb"
    assert task.score(question, answer) == {
        "prompt_strict": 0.0, "instruction_strict": 0.5,
        "prompt_loose": 1.0, "instruction_loose": 1.0,
    }  # fmt: skip
    assert set(task.score(question, "Section 1 a\nSection 2 b").values()) == {1.0}
    quoted = ifeval(["startend:quotation"], [{}])
    for answer in ('Sure:\n"a"', '"a"\nBye', 'Sure:\n"a"\nBye', '*"a"*'):
        scores = task.score(quoted, answer)
        assert (scores["prompt_strict"], scores["prompt_loose"]) == (0.0, 1.0), answer


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("keywords:rhyme", {}, r"no instruction 'keywords:rhyme'.*keywords:existence"),
        ("keywords:existence", {"keywords": "sun"}, r"'keywords' \(list\)"),
        ("length_constraints:number_words", {"num_words": 3}, "'relation'"),
        ("language:response_language", {"language": "xx"}, "'xx'"),
        (
            "length_constraints:number_words",
            {"relation": "at most", "num_words": 3},
            "at least or less than.*'at most'",
        ),
    ],
)
def test_an_unknown_instruction_is_refused(
    name: str, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    record = RECORDS["ifeval"][0] | {"instruction_id_list": [name], "kwargs": [arguments]}
    with pytest.raises(InputError, match=rf"a\.jsonl:1.*{message}"):
        TEXT_TASKS["ifeval"].load(write(tmp_path / "a.jsonl", [record]), None, 0)
    with pytest.raises(InputError, match=message):
        TEXT_TASKS["ifeval"].score(ifeval([name], [arguments]), "sun")
