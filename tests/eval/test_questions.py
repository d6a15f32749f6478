"""Text benchmarks are read from local copies in any format; damaged ones are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmark_records import RECORDS, write
from kvarn_ops.errors import InputError
from kvarn_ops.eval.tasks.catalogue import TEXT_TASKS


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
