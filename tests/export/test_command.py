"""`kvarn-ops export` and `compare`: a model directory becomes a file, which is then measured."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import kvarn_ops
from extras import need_onnx
from kvarn_ops import cli
from kvarn_ops.export import compare, export_program, save_program
from kvarn_ops.export.artefact import written
from tiny_models import patched, tiny_model

pytestmark = pytest.mark.export

PRESET, LENGTH = "k4v2_g32", 300


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(num_hidden_layers=1).save_pretrained(folder)
    return folder


def command(*arguments: Any) -> Any:
    result = CliRunner().invoke(cli.app, ["export", *map(str, arguments)])
    if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("to", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_file_is_written_and_compared(to: str, directory: Path, tmp_path: Path) -> None:
    if to == "onnx":
        need_onnx()
    target = tmp_path / f"made.{to}"
    sizes = ["--max-cache-len", LENGTH, "--chunk", 50, "--preset", PRESET]
    result = command(directory, "--to", to, "--out", target, *sizes, "--json")
    said = json.loads(result.stdout)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert said["path"] == str(target)
    assert said["file_bytes"] == target.stat().st_size
    assert said["tokens"] == 128 + 2 * 32 + 32  # sinks, two tiles, and those given one by one
    assert said["quantized_tokens"] == 96
    dense = 2 * 2 * LENGTH * 32 * 4  # K and V, heads, tokens, channels, bytes of fp32
    assert said["dense_bytes"] == dense > said["cache_bytes"] > 0
    assert said["max_difference"] <= 1e-2 * said["largest_logit"]
    assert said["same_tokens"] > 0.98
    assert min(said["step_ms"], said["eager_step_ms"]) > 0


def test_table_says_what_was_written(directory: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    shown = command(directory, "--to", "pt2", "--preset", PRESET, "--max-cache-len", LENGTH).stdout
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.pt2"]
    for text in ("tiny.pt2", f"{PRESET}, up to {LENGTH} tokens", "eager mode", "largest logit"):
        assert text in shown, shown


def test_another_model_is_seen_to_differ() -> None:
    one, other = (patched(preset=PRESET, seed=seed, num_sink_tokens=0) for seed in (0, 1))
    program = export_program(other, max_cache_len=LENGTH)
    found = compare(one, program, max_cache_len=LENGTH)
    assert found.max_difference > 0.1 * found.largest_logit
    assert found.same_tokens < 0.5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "pt2", "--out", "no/m.pt2"], "folder that exists"),
        (["--to", "aoti", "--out", "m.so"], r"\.pt2"),
        (["--to", "pt2", "--preset", "k5v2"], "k5v2"),
        (["--to", "pt2", "--batch", "0"], "batch_size"),
        (["--to", "onnx", "--opset", "17"], "opset 18"),
        (["--to", "pt2", "--dtype", "int3"], "int3"),
    ],
)
def test_impossible_exports_write_nothing(
    arguments: list[str], says: str, directory: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    if "onnx" in arguments:
        pytest.importorskip("onnx", reason="extra 'onnx'")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kvarn_ops.errors.KVarNError, match=says):
        command(directory, *arguments, "--max-cache-len", 64)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_engines_are_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kvarn_ops.BackendError, match="to_tensorrt cannot run here"):
        command(tmp_path / "nowhere", "--to", "tensorrt")
    assert not list(tmp_path.iterdir())


def test_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(kvarn_ops.InputError, match="nowhere"):
        command(tmp_path / "nowhere", "--to", "pt2")


@pytest.mark.parametrize("name", ["nothing.pt2", "model.bin"])
def test_file_that_is_no_export_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(kvarn_ops.InputError, match=name):
        compare(patched(), tmp_path / name, max_cache_len=64)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.pt2"
    target.write_text("old")

    def fail() -> None:
        with written(target) as place:
            place.write_text("half")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk is full"):
        fail()
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
    with written(target) as place:
        place.write_text("new")
        place.with_name("model.pt2.data").write_text("weights")
    assert sorted(file.read_text() for file in tmp_path.iterdir()) == ["new", "weights"]


def test_stages_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kvarn_ops"):
        save_program(export_program(patched(), max_cache_len=64), tmp_path / "m.pt2")
    stages = [text.partition(":")[0] for text in caplog.messages if text.endswith(" s")]
    assert stages == ["Tracing the model", "Saving"]
    program = torch.export.load(tmp_path / "m.pt2")
    assert program.module()(torch.zeros(1, 1, dtype=torch.int64)).shape == (1, 1, 96)
