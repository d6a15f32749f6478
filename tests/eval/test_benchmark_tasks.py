"""Text benchmarks: reading local copies, and scoring right, wrong and nearly right answers."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvarn_ops.errors import InputError
from kvarn_ops.eval.tasks.catalogue import TEXT_TASKS
from kvarn_ops.eval.tasks.code_answers import HumanEval, with_code_execution
from kvarn_ops.eval.tasks.instruction_checks import INSTRUCTIONS, count_sentences
from kvarn_ops.eval.tasks.line_text import LineText
from kvarn_ops.eval.tasks.math_answers import final_answer, same_answer
from kvarn_ops.eval.tasks.questions import Question

FUNCTION = (
    "from typing import List\n\n\ndef helper(x):\n    return x + 1\n\n\n"
    'def inc(x: int) -> int:\n    """ Add one.\n    >>> inc(1)\n    2\n    """\n'
)
RECORDS: dict[str, list[dict[str, Any]]] = {
    "math500": [
        {"problem": f"What is {n} + 1?", "answer": str(n + 1), "unique_id": f"test/{n}.json"}
        for n in range(20)
    ],
    "aime24": [
        {"id": 60, "problem": "Find it.", "answer": "073"},
        {"ID": "2024-I-2", "Problem": "Find that.", "Answer": 204},
    ],
    "humaneval": [
        {
            "task_id": "HumanEval/0",
            "prompt": FUNCTION,
            "entry_point": "inc",
            "test": "def check(candidate):\n    assert candidate(1) == 2\n",
            "canonical_solution": "    return x + 1\n",
        }
    ],
    "ifeval": [
        {
            "key": 1000,
            "prompt": "Write it in two sections, without commas.",
            "instruction_id_list": ["punctuation:no_comma", "detectable_format:multiple_sections"],
            "kwargs": [
                {"section_spliter": None},
                {"section_spliter": "Section", "num_sections": 2, "num_words": None},
            ],
        }
    ],
}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    text = "\n".join(map(json.dumps, records)) if ".jsonl" in path.name else json.dumps(records)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def first(task: str, tmp_path: Path) -> Question:
    return TEXT_TASKS[task].load(write(tmp_path / "data.jsonl", RECORDS[task]), None, 0)[0]


@pytest.mark.parametrize("task", RECORDS)
def test_every_format_gives_the_same_questions(task: str, tmp_path: Path) -> None:
    names = ("a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz")
    read = [TEXT_TASKS[task].load(write(tmp_path / n, RECORDS[task]), None, 0) for n in names]
    assert read[1:] == read[:1] * 3
    assert len(read[0]) == len(RECORDS[task])
    assert json.loads(json.dumps(read[0][0].reference)) == read[0][0].reference

    alone = tmp_path / "alone"
    alone.mkdir()
    write(alone / "test.jsonl", RECORDS[task])
    (alone / "README.md").write_text("text")
    assert TEXT_TASKS[task].load(alone, None, 0) == read[0]
    with pytest.raises(InputError, match=r"exactly one.*a\.json, a\.json\.gz"):
        TEXT_TASKS[task].load(tmp_path, None, 0)


def test_a_limit_draws_by_seed_and_keeps_the_order(tmp_path: Path) -> None:
    path, task = write(tmp_path / "a.jsonl", RECORDS["math500"]), TEXT_TASKS["math500"]
    everything = task.load(path, None, 0)
    drawn = [task.load(path, 5, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == [question for question in everything if question in drawn[0]]
    assert len(drawn[0]) == 5
    assert task.load(path, 100, 3) == everything
    with pytest.raises(InputError, match="at least 1"):
        task.load(path, 0, 0)


GOOD = json.dumps(RECORDS["math500"][0])


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("math500", "a.jsonl", GOOD + "\n\n{'problem': 1}", r"a\.jsonl:3.*not JSON"),
        ("math500", "a.json", f"[{GOOD},\n{GOOD}\n", r"a\.json:3.*not JSON"),
        ("math500", "a.json", f"{GOOD}\n{GOOD}", r"a\.json:2.*\.jsonl"),
        ("math500", "a.json", GOOD, "list of objects"),
        ("math500", "a.jsonl", "[1]", r"a\.jsonl:1.*list"),
        ("math500", "a.jsonl", "\n \n", "no records"),
        ("math500", "a.jsonl", f"{GOOD}\n{GOOD}", r"jsonl:2.*test/0.json.*jsonl:1"),
        ("math500", "a.jsonl.gz", GOOD, "cannot be read"),
        ("math500", "a.jsonl", b"\xff\xfe", "cannot be read"),
        ("math500", "a.txt", GOOD, "must end with"),
        ("math500", "a.jsonl", '{"question": "x"}', r"jsonl:1.*'unique_id' is missing.*'question'"),
        ("math500", "a.jsonl", GOOD.replace('"1"', "1"), "'answer' must be text"),
        ("aime24", "a.jsonl", '{"id": 1, "problem": "p", "answer": "1000"}', "0 to 999.*'1000'"),
        ("humaneval", "a.jsonl", GOOD, r"a\.jsonl:1.*'entry_point' is missing"),
        ("ifeval", "a.jsonl", GOOD, r"a\.jsonl:1.*'instruction_id_list' is missing"),
    ],
)
def test_a_damaged_file_is_refused_with_its_place(
    task: str, name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        TEXT_TASKS[task].load(tmp_path / name, None, 0)


def test_a_missing_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in RECORDS:
        with pytest.raises(InputError, match=f"{task} needs a local copy"):
            TEXT_TASKS[task].load(None, None, 0)
        with pytest.raises(InputError, match="does not exist"):
            TEXT_TASKS[task].load(tmp_path / "a.jsonl", None, 0)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        TEXT_TASKS["math500"].load(tmp_path / "a.parquet", None, 0)


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
