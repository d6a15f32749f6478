"""`kvarn-ops demo` on tiny random models: its numbers, its files, and its refusals."""

from __future__ import annotations

import csv
import io
import json
import random
import sysconfig
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvarn_ops
from kvarn_ops import cli, tables
from kvarn_ops.demo import decode, report, run
from kvarn_ops.errors import CacheError, InputError, KVarNError
from kvarn_ops.eval import data
from kvarn_ops.eval.codec import ByteCodec

LAYERS, KV_HEADS, HEAD_DIM = 2, 1, 32
CONTEXT, BATCH, PREFIX = 208, 3, 144  # 128 sinks and half a tile of 32


def save_model(folder, **changes):
    torch.manual_seed(0)
    shape = dict(
        vocab_size=258, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        max_position_embeddings=512, initializer_range=0.3, bos_token_id=256, eos_token_id=257,
        pad_token_id=257,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(shape | changes)))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = random.Random(0).choices(["yes", "no", "perhaps", "äöü", "\n"], k=400)
    path.write_text(" ".join(words), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(model_dir, text_file, tmp_path_factory):
    """One run of the whole command: its output and its folder."""
    out = tmp_path_factory.mktemp("runs") / "new" / "folder"
    result = CliRunner().invoke(
        cli.app,
        ["demo", "--model", str(model_dir), "--text", str(text_file), "--out", str(out),
         "--presets", "k4v2_g32, k8v8_g32", "--context", str(CONTEXT), "--batch", str(BATCH),
         "--tokens", "24", "--no-compile", "--device", "cpu"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return result.output, out


def rows_of(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def test_table_has_measured_sizes_and_plausible_scores(finished):
    rows = {row["method"]: row for row in rows_of(finished[1] / "table.csv")}
    assert list(rows) == ["dense", "k4v2_g32", "k8v8_g32"]
    token_bytes = 2 * 2 * LAYERS * BATCH * KV_HEADS * HEAD_DIM  # K and V, two bytes each
    dense = int(rows["dense"]["cache_bytes"])
    assert 0 <= dense - CONTEXT * token_bytes <= LAYERS * 8  # and a length per layer
    for name, row in list(rows.items())[1:]:
        config = kvarn_ops.KVarNConfig.from_preset(name)
        packed = LAYERS * BATCH * KV_HEADS * config.allocated_tiles(CONTEXT) * config.tile_bytes(32)
        exact = (config.num_sink_tokens + config.ring_len) * token_bytes
        assert 0 <= int(row["cache_bytes"]) - packed - exact <= 10_000  # lengths, rotation
        assert float(row["tile_bits"]) == config.effective_bits(HEAD_DIM)
        assert float(row["compression"]) == pytest.approx(dense / int(row["cache_bytes"]))
        assert float(row["tokens_per_second"]) > 0
    assert float(rows["dense"]["kl"]) == 0
    assert 0 < float(rows["k8v8_g32"]["kl"]) < float(rows["k4v2_g32"]["kl"])


def test_positions_show_where_quantization_begins(finished):
    rows = [row for row in rows_of(finished[1] / "positions.csv") if row["method"] == "k4v2_g32"]
    assert [int(row["cached_tokens"]) for row in rows] == list(range(PREFIX, CONTEXT))
    kl = [float(row["kl_nats"]) for row in rows]
    first_tile = 128 + 32 - PREFIX
    assert max(kl[:first_tile]) < 0.1 * sum(kl[first_tile:]) / len(kl[first_tile:])


def test_output_is_complete(finished):
    output, out = finished
    for words in (
        "dense",
        "k4v2_g32",
        "tokens",
        "next-byte",
        "KL to dense",
        "standard error",
        "prompt, the end of",
        "3 windows of text: words.txt",
        "not compiled",
    ):
        assert words in output
    assert {path.name for path in out.iterdir()} == {
        "table.csv", "positions.csv", "continuations.txt", "quality_vs_bits.png",
        "kl_vs_position.png",
    }  # fmt: skip
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    assert "=== k8v8_g32: " in (out / "continuations.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_compiled_demo_reads_tiles_and_reports_all_dense_forms(text_file, tmp_path, fresh_dynamo):
    folder = save_model(tmp_path / "model", num_hidden_layers=1)
    options = run.Options(
        folder, text_file, tmp_path / "out", "k4v2_g32", context=CONTEXT, tokens=8, batch=2,
        device="cpu",
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    rows = run.run_demo(options, console)
    assert rows[1].kl > 0
    text = console.file.getvalue()
    assert "StaticCache, compiled" in text
    assert "DynamicCache, eager" in text


def test_default_text_is_what_the_model_says_was_held_out(model_dir, tmp_path):
    with pytest.raises(InputError, match="--text"):
        data.read_documents(model_dir, None)
    listing = {"modules": {"statistics.py": 1, "not_a_module.py": 1}}
    (tmp_path / "heldout.json").write_text(json.dumps(listing))
    documents, missing = data.read_documents(tmp_path, None)
    source = Path(sysconfig.get_path("stdlib")) / "statistics.py"
    assert documents == {"statistics.py": source.read_bytes()}
    assert missing == ["not_a_module.py"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "nowhere"}, "'nowhere' does not exist"),
        ({"model": "."}, "cannot be loaded as a causal language model"),
        ({"text": "nowhere.txt"}, "'nowhere.txt' does not exist"),
        ({"text": None}, "give a text with --text FILE"),
        ({"context": 400}, "too short"),
        ({"context": 1024}, "exceeds the 512 positions"),
        ({"context": 170}, "need --context 176 or more"),
        ({"tokens": 100}, "use --tokens 48 or less"),
        ({"batch": 0}, "--batch 0"),
        ({"presets": "k5v5"}, "is not a preset name"),
        ({"presets": ","}, "--presets is empty"),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
    ],
)
def test_bad_input_is_one_sentence(
    changes, words, model_dir, text_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = text_file
    if changes.get("context") == 400:
        text = tmp_path / "short.txt"
        text.write_text("too short")
    options = dict(model=model_dir, text=text, out=tmp_path / "out", presets="k4v2_g32",
                   context=CONTEXT, tokens=8, batch=2, device="cpu") | changes  # fmt: skip
    arguments = [part for name, value in options.items() if value is not None
                 for part in (f"--{name}", str(value))]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["kvarn-ops", "demo", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_an_output_path_that_is_a_file_is_refused(model_dir, text_file):
    with pytest.raises(InputError, match="cannot be made"):
        run.run_demo(run.Options(model_dir, text_file, text_file), Console(file=io.StringIO()))


def test_an_installation_without_a_model_asks_for_one(tmp_path, monkeypatch):
    monkeypatch.setattr(kvarn_ops, "__file__", str(tmp_path / "lib" / "kvarn_ops" / "__init__.py"))
    with pytest.raises(InputError, match="--model DIR"):
        data.find_model(None)


def test_a_cache_that_is_not_quantized_is_not_reported(model_dir):
    model = LlamaForCausalLM.from_pretrained(model_dir).eval()
    ids = torch.randint(0, 256, (1, 200))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(CacheError, match="without a KVarN cache"):
            decode.check_tiles_are_quantized(cache, 200)
        kvarn_ops.patch(model, "k4v2_g32")
        packed = kvarn_ops.KVarNCache(model.config, 256, "k4v2_g32")
        with pytest.raises(CacheError, match="nothing was quantized"):
            decode.check_tiles_are_quantized(packed, 200)
        model(ids, past_key_values=packed)
    assert decode.check_tiles_are_quantized(packed, 200) == (200 - 128) // 32
    with pytest.raises(CacheError, match="nothing was quantized"):
        decode.check_tiles_are_quantized(packed, 201)
    packed.layers[1].tiles.k_token_scale[0, 0, 1] = 0
    with pytest.raises(CacheError, match="never written"):
        decode.check_tiles_are_quantized(packed, 200)


def test_a_failing_compiler_is_one_sentence(monkeypatch):
    def fails(**kwargs):
        raise RuntimeError("InvalidCxxCompiler: none\nmore\nlines")

    monkeypatch.setattr(torch, "compile", lambda model, fullgraph: fails)
    with pytest.raises(KVarNError, match=r"torch\.compile failed: InvalidCxxCompiler") as info:
        decode.compiled(object())(x=1)
    assert "--no-compile" in str(info.value)


def test_errors_are_over_windows_and_paired():
    hits = torch.tensor([[1, 0], [1, 0], [1, 1], [1, 1]], dtype=torch.bool)
    dense = report.Scores(None, hits)
    kl = torch.tensor([[9.0, 9.0], [9.0, 9.0], [1.0, 3.0], [1.0, 3.0]])
    summary = report.Scores(kl, hits).summary(dense, first=2)
    assert (summary["kl"], summary["kl_se"]) == (2.0, pytest.approx(1.0))
    assert (summary["accuracy"], summary["delta"], summary["delta_se"]) == (1.0, 0.0, 0.0)
    one = report.Scores(kl[:, :1], hits[:, :1]).summary(report.Scores(None, hits[:, :1]), first=2)
    assert tables.with_error(one["kl"], one["kl_se"]) == "1.00"


@pytest.mark.parametrize(
    ("other", "same", "mark"), [([1, 2, 3], 3, False), ([1, 5, 3], 1, True), ([1, 2], 2, True)]
)
def test_the_first_difference_is_marked(other, same, mark):
    texts = {"dense": [97, 98, 99], "k2v2": [96 + i for i in other]}
    assert report.agreeing(texts["dense"], texts["k2v2"]) == same
    console = Console(file=io.StringIO(), width=100)
    console.print(report.continuation_panels([100], texts, ByteCodec(), console))
    text = console.file.getvalue()
    assert ("◆" in text or "<#>" in text) == mark
    assert ("the same as dense" in text) != mark
