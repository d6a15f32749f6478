"""Benchmarks in words on a tiny model with a tokenizer: prompts, batches, answers, scores."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")

from kvarn_ops.errors import InputError
from kvarn_ops.eval import options, run
from kvarn_ops.eval.codec import TokenizerCodec, load_codec
from kvarn_ops.eval.tasks.catalogue import TEXT_TASKS
from tiny_models import tiny_model
from tiny_tokenizers import word_tokenizer

TEMPLATE = "{% for m in messages %}w1 w2 {{ m['content'] }} w3{% endfor %}"
CHOSEN = {
    "methods": "none,plus", "presets": "k2v2_g32", "sinks": 8, "max_new_tokens": 50, "batch": 2,
    "tasks": "math500",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its tokenizer, and four questions of different lengths."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", max_position_embeddings=4096).save_pretrained(path)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    data = path / "data"
    data.mkdir()
    lines = [
        {"problem": " ".join(f"w{i + j}" for j in range(10 + 9 * i)), "answer": str(i),
         "unique_id": f"q{i}"}
        for i in range(4)
    ]  # fmt: skip
    (data / "math500.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def evaluate(out, folder, **changes):
    given = CHOSEN | {"model": folder, "data": folder / "data"} | changes
    return run.run_eval(options.make_options(out, False, given), Console(file=io.StringIO()))


def test_answers_do_not_depend_on_the_batch(folder, tmp_path):
    answers = [
        {(row["method"], row["cache"], row["id"]): row["answer"] for row in result.answers}
        for result in (evaluate(tmp_path / str(n), folder, batch=n) for n in (1, 4))
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 4 * 3, "none, plus simulated, plus packed"
    dense = {key[2]: value for key, value in answers[0].items() if key[0] == "none"}
    # The same as `generate` gives for the prompt in the chat template.
    model, codec = tiny_model("llama"), load_codec(folder, 96)
    question = TEXT_TASKS["math500"].load(folder / "data" / "math500.jsonl", None, 0)[0]
    ids = codec.prompt(question.prompt)[None]
    out = model.generate(ids, max_new_tokens=50, do_sample=False)[0, ids.shape[1] :]
    assert dense["q0"] == codec.decode(out.tolist())


def test_scores_and_answers_are_written(folder, tmp_path):
    results = evaluate(tmp_path / "out", folder)
    lines = (tmp_path / "out" / "answers.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if line[:1] != "#"))
    assert rows == results.answers
    found = [row for row in results.summary if row["method"] == "plus"]
    assert {(row["task"], row["metric"], row["n"]) for row in found} == {
        ("math500", "accuracy", "4")
    }


def test_a_prompt_without_a_template_is_encoded_as_the_tokenizer_does(folder):
    tokenizer = word_tokenizer()
    assert TokenizerCodec(tokenizer).prompt("w5 w6").tolist() == tokenizer("w5 w6").input_ids
    tokenizer.chat_template = TEMPLATE
    assert torch.equal(
        TokenizerCodec(tokenizer).prompt("w5 w6"),
        TokenizerCodec(tokenizer).encode(b"w1 w2 w5 w6 w3"),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": None}, "math500 needs a local copy of its questions"),
        ({"tasks": "aime24"}, "holds no files or folders named aime24"),
        ({"tasks": "humaneval"}, "add --allow-code"),
    ],
)
def test_missing_questions_are_named(folder, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        evaluate(tmp_path / "out", folder, **changes)


def test_a_cache_of_transformers_can_be_measured_beside(folder, tmp_path):
    results = evaluate(tmp_path / "out", folder, tasks="line_text", limit=2, peers="fp8",
                       max_new_tokens=4)  # fmt: skip
    caches = {(row["method"], row["cache"]) for row in results.summary}
    assert ("fp8", "QuantizedCache") in caches
    with pytest.raises(InputError, match="there is no such cache"):
        evaluate(tmp_path / "other", folder, peers="quanto3")
