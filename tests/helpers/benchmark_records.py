"""Small local copies of the text benchmarks, as `kvarn-ops eval --data` reads them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from kvarn_ops.eval.tasks.catalogue import TEXT_TASKS
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
