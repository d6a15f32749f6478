"""`kvarn-ops bench` and the tools of `benchmarks/`: what is checked, written and refused."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from typer.testing import CliRunner

import kvarn_ops
from kvarn_ops import KVarNConfig, cli
from kvarn_ops.benchmark import decode_step, results, run, timing

pytest.importorskip("matplotlib")

CPU = torch.device("cpu")
SHAPE = decode_step.Shape(2, 4, 2, 64)
CONFIG = KVarNConfig.from_preset("k4v2_g32")


def uncompiled(*arguments):
    return torch.ops.kvarn.step_(*arguments)


@pytest.fixture
def no_compiler(monkeypatch):
    """The command without Inductor, which takes most of its time."""
    monkeypatch.setattr(run, "compiled_step", lambda: uncompiled)


def bench(*arguments):
    result = CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])
    if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_random_cache_is_one_that_was_filled():
    cache, _ = decode_step.random_cache(CONFIG, SHAPE, 517, CPU)
    assert cache.seq_lens.tolist() == [517, 517]
    tiles = CONFIG.num_tiles(517)
    assert tiles == 12
    assert all(bool(tensor[:, :, :tiles].flatten(3).any(-1).all()) for tensor in cache.packed)
    assert all(tensor.isfinite().all() for tensor in cache if tensor.is_floating_point())
    for index, tile in ((4, 0), (11, 3)):
        assert torch.equal(cache.k_codes[:, :, index], cache.k_codes[:, :, tile])


@pytest.mark.parametrize("context", [1, 100, 161, 640])
def test_every_contender_agrees_with_its_reference(context):
    step = decode_step.DecodeStep(CONFIG, SHAPE, context, CPU, uncompiled)
    errors = step.errors(step.expected())
    assert list(errors) == list(decode_step.CONTENDERS)
    assert max(errors.values()) < decode_step.OUTPUT_BOUND


@pytest.mark.parametrize("field", ["k_codes", "v_codes", "k_sink", "v_tail", "v_channel_scale"])
def test_refcheck_sees_a_damaged_cache(field):
    step = decode_step.DecodeStep(CONFIG, SHAPE, 600, CPU, uncompiled)
    expected = step.expected()
    tensor = getattr(step.cache, field)
    tensor.copy_(tensor.flip(0))  # the rows of the batch change places
    errors = step.errors(expected)
    assert errors[decode_step.KVARN_EAGER] > decode_step.OUTPUT_BOUND
    assert errors[decode_step.DENSE] < decode_step.OUTPUT_BOUND


def test_a_difference_is_exit_code_1_and_no_row(monkeypatch, tmp_path):
    def wrong(*arguments):
        return uncompiled(*arguments) * 1.05

    monkeypatch.setattr(run, "compiled_step", lambda: wrong)
    options = ("--contexts", "200", "--heads", "2/1", "--head-dim", "32", "--rounds", "1",
               "--out", tmp_path, "--device", "cpu")  # fmt: skip
    refused = bench(*options, "--refcheck")
    assert refused.exit_code == 1
    assert "DIFFERENT: k4v2, 1 × 2/1 × 32, 200 tokens: kvarn_compiled differs" in refused.output
    assert not (tmp_path / "decode_attention.csv").exists()
    assert bench(*options).exit_code == 0  # timed only, when nobody asks for the check


def test_rows_have_every_number_and_all_conditions(no_compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "new" / "folder"
    result = bench("--contexts", "400,150", "--heads", "4/2", "--head-dim", "32", "--batch", "2",
                   "--presets", "k4v2,k2v2_g32", "--rounds", "4", "--refcheck", "--out", out,
                   "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0
    assert "ratio" in result.output
    with (out / "decode_attention.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["preset"], row["context"]) for row in rows] == [
        ("k4v2", "150"), ("k4v2", "400"), ("k2v2_g32", "150"), ("k2v2_g32", "400"),
    ]  # fmt: skip
    for row in rows:
        assert all(row.values()), "a column is empty"
        assert row["torch"] == torch.__version__
        assert row["kvarn_ops"] == kvarn_ops.__version__
        assert row["threads"] == str(torch.get_num_threads())
        for name in decode_step.CONTENDERS:
            assert 0 < float(row[f"{name}_min_ms"]) <= float(row[f"{name}_ms"])
        ratio = float(row["dense_bf16_ms"]) / float(row["kvarn_compiled_ms"])
        assert float(row["speedup"]) == pytest.approx(ratio, rel=0.02)
        assert int(row["dense_bytes"]) == 2 * 2 * int(row["context"]) * 2 * 32 * 2
        assert float(row["largest_error"]) < decode_step.OUTPUT_BOUND
    assert (out / "decode_attention.png").read_bytes().startswith(b"\x89PNG")


def test_shape_comes_from_a_model_and_json_is_json(no_compiler, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=96, intermediate_size=64, num_hidden_layers=1, head_dim=48,
        num_attention_heads=6, num_key_value_heads=2,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    result = CliRunner().invoke(
        cli.app, ["bench", "--model", str(tmp_path), "--contexts", "140", "--rounds", "1",
                  "--out", str(tmp_path / "out"), "--json", "--device", "cpu"],
    )  # fmt: skip
    (row,) = json.loads(result.stdout)
    assert [row[name] for name in ("q_heads", "kv_heads", "head_dim")] == ["6", "2", "48"]


@pytest.mark.slow
def test_the_compiled_step_is_what_is_timed(tmp_path, fresh_dynamo):
    result = bench("--contexts", "300,700", "--heads", "2/1", "--head-dim", "32", "--rounds", "1",
                   "--presets", "k4v2_g32", "--refcheck", "--out", tmp_path,
                   "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(results.read_rows(tmp_path / "decode_attention.csv")) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--heads", "16"], "--heads 16"),
        (["--heads", "6/4"], "--heads 6/4"),
        (["--head-dim", "24"], "head_dim=24"),
        (["--contexts", "many"], "--contexts many"),
        (["--contexts", "0"], "--contexts 0"),
        (["--batch", "0"], "--batch 0"),
        (["--presets", "k5v5"], "is not a preset name"),
        (["--presets", ","], "--presets is empty"),
        (["--rounds", "0"], "--rounds 0"),
        (["--threads", "0"], "--threads 0"),
        (["--device", "toaster"], "device 'toaster' cannot be used"),
        (["--model", "nowhere"], "has no config.json"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["kvarn-ops", "bench", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert words in error[-1]
    assert error[-1].startswith("kvarn-ops: ")


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "rows.csv"
    around = {"device": "x", "threads": "2"}
    first = results.ResultFile(path, ["context"])
    first.add({"context": 1, "ms": 5} | around)
    again = results.ResultFile(path, ["context"], resume=True)
    assert again.has({"context": 1} | around)
    assert not again.has({"context": 2} | around)
    assert not again.has({"context": 1} | around | {"threads": "1"}), "made with other threads"
    again.add({"context": 2, "ms": 6} | around)
    again.add({"context": 1, "ms": 7} | around)
    assert [(row["context"], row["ms"]) for row in results.read_rows(path)] == [
        ("2", "6"),
        ("1", "7"),
    ]
    with pytest.raises(kvarn_ops.InputError, match="has other columns"):
        again.add({"context": 3, "other": 1})
    assert results.ResultFile(path, ["context"]).rows == []


def test_contenders_take_turns_and_preparation_is_off_the_clock():
    calls = []
    contenders = {
        "a": timing.Contender(lambda: calls.append("a"), lambda: calls.append("prepare")),
        "b": timing.Contender(lambda: calls.append("b")),
    }
    seconds = timing.alternate(contenders, 3, CPU, warmup=1)
    assert calls == ["prepare", "a", "b"] * 4
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_a_noisy_machine_is_said():
    quiet, busy = timing.Timing.of([1.0, 1.01, 0.99, 1.0]), timing.Timing.of([1.0, 2.0, 1.0, 3.0])
    assert (quiet.median, quiet.minimum) == (1000.0, 990.0)
    assert timing.noise({"quiet": quiet.spread}) is None
    assert "noisy: the middle half of the rounds of busy" in timing.noise(
        {"quiet": quiet.spread, "busy": busy.spread}
    )
