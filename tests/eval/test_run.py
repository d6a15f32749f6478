"""`kvarn-ops eval` on a tiny model: files, resuming, refusals."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from transformers import LlamaConfig, LlamaForCausalLM

from kvarn_ops import cli
from kvarn_ops.errors import InputError, KVarNError
from kvarn_ops.eval import options, plan, run
from kvarn_ops.eval.methods import DEFAULT_METHODS

SMALL = {
    "context": 400, "windows": 3, "batch": 2, "block": 32, "presets": "k2v2_g32",
    "methods": "none,rtn,plus", "protocols": "pseudo,prefill", "placements": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def model_and_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shape = dict(
        vocab_size=258, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=512,
        initializer_range=0.3, bos_token_id=256, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    text = folder / "some.txt"
    text.write_bytes(bytes(torch.randint(32, 127, (1500,)).tolist()))
    return {"model": folder, "text": text}


def evaluate(out, given):
    return run.run_eval(options.make_options(out, False, given), Console(file=io.StringIO()))


def rows_of(path):
    lines = [line for line in path.read_text().splitlines() if line[:1] != "#"]
    return list(csv.DictReader(lines))


def test_files_of_a_run(model_and_text, tmp_path):
    results = evaluate(tmp_path / "out", SMALL | model_and_text)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"summary.csv", "positions.csv", "layers.csv", "quality_vs_bits.png",
            "error_vs_position.png", "error_by_layer.png", "static_vs_accumulated.png",
            "run.json"} <= names  # fmt: skip
    summary = rows_of(tmp_path / "out" / "summary.csv")
    assert summary == results.summary
    kl = {
        (row["method"], row["cache"], row["protocol"], row["model"]): float(row["value"])
        for row in summary
        if row["metric"] == "kl"
    }
    assert kl["rtn", "simulated", "pseudo", "plain"] > kl["plus", "simulated", "pseudo", "plain"]
    assert kl["plus", "packed", "pseudo", "plain"] == pytest.approx(
        kl["plus", "simulated", "pseudo", "plain"], rel=0.05
    )
    assert kl["none", "simulated", "pseudo", "plain"] < 1e-6
    assert max(value for key, value in kl.items() if key[2] == "prefill") < 1e-5
    assert ("rtn", "simulated", "pseudo", "outliers_mean") in kl
    assert {row["n"] for row in summary if row["model"] == "plain"} == {"3"}, "two batches, one row"
    header = (tmp_path / "out" / "summary.csv").read_text()
    assert "# command:" in header
    assert "# seed: 0" in header
    assert str(tmp_path) not in header, "paths of this machine"


class Killed(BaseException):
    pass


def test_a_killed_run_continues_and_gives_the_same_numbers(model_and_text, tmp_path, monkeypatch):
    given = SMALL | model_and_text
    whole = evaluate(tmp_path / "whole", given)
    counts = []

    def jobs_that_die(after):
        def jobs(chosen):
            found = list(plan.jobs(chosen))

            def counted(index, work):
                def call(tick):
                    if index == after:
                        raise Killed
                    counts.append(index)
                    return work(tick)

                return call

            for index, job in enumerate(found):
                piece = job.piece
                object.__setattr__(piece, "run", counted(index, piece.run))
            return found

        return jobs

    monkeypatch.setattr(run, "jobs", jobs_that_die(7))
    with pytest.raises(Killed):
        evaluate(tmp_path / "cut", given)
    assert counts == list(range(7))
    damaged = sorted((tmp_path / "cut" / "pieces").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:50])
    counts.clear()
    monkeypatch.setattr(run, "jobs", jobs_that_die(None))
    rest = evaluate(tmp_path / "cut", given)
    assert len(counts) == len(list(plan.jobs(options.make_options(tmp_path, False, given)))) - 6
    assert rest == whole


def test_a_folder_holds_one_run(model_and_text, tmp_path):
    given = SMALL | model_and_text | {"tasks": "text", "protocols": "prefill"}
    evaluate(tmp_path / "out", given)
    with pytest.raises(InputError, match=r"another seed, windows: continue it with the options"):
        evaluate(tmp_path / "out", given | {"windows": 2, "seed": 1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": "plus,kvarn"}, "kvarn is no method"),
        ({"presets": "k5v2"}, "is not a preset name"),
        ({"protocols": "decode,encode"}, "--protocols encode: choose of decode, pseudo, prefill"),
        ({"tasks": "math"}, "--tasks math: choose of text"),
        ({"windows": 0}, "--windows 0: give at least 1"),
        ({"placements": -1}, "--placements -1: give 0 or more"),
        ({"context": 5000}, "--context 5000 needs 5000 positions and the model knows 512"),
        ({"context": 0}, "--context 0: give at least 1"),
        ({"max_new_tokens": -3}, "--max-new-tokens -3: give at least 1"),
        ({"tasks": "chase"}, "runs on a model of its own"),
        ({"tasks": "line_text", "max_new_tokens": 64}, "line_text with 64 new tokens needs"),
        ({"context": 150}, "leaves hardly a quantized tile"),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
        ({"dtype": "float17"}, "--dtype float17"),
    ],
)
def test_bad_options_are_refused_before_any_work(model_and_text, tmp_path, change, words):
    with pytest.raises(KVarNError, match=words):
        evaluate(tmp_path / "out", SMALL | model_and_text | change)
    assert not (tmp_path / "out").exists()


def test_the_command_line(model_and_text, tmp_path):
    arguments = [
        f"--{name}={value}"
        for name, value in (SMALL | model_and_text | {"tasks": "text", "placements": 0}).items()
        if name != "methods"
    ]
    result = CliRunner().invoke(
        cli.app, ["eval", "--quick", f"--out={tmp_path / 'out'}", *arguments]
    )
    assert result.exit_code == 0, result.output
    methods = {row["method"] for row in rows_of(tmp_path / "out" / "summary.csv")}
    assert methods == set(DEFAULT_METHODS.split(","))
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    assert settings["presets"] == "k2v2_g32", "what is given goes before --quick"
    assert "KL, 10⁻³ nats" in result.output
