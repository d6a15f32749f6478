"""`kvarn-ops env`, the version, and how errors of the package end a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import kvarn_ops
from kvarn_ops import cli
from kvarn_ops.env import environment, missing_package_message

KEYS = {
    "kvarn_ops", "source", "location", "python", "os", "torch", "triton", "transformers", "onnx",
    "onnxruntime", "torch_tensorrt", "cpu", "cpu_features", "threads", "cuda", "rocm", "devices",
    "cxx", "backend",
}  # fmt: skip


def test_environment_is_text_with_stable_keys():
    values = environment()
    assert set(values) == KEYS
    assert all(isinstance(value, str) and value for value in values.values())
    assert values["torch"] == torch.__version__
    assert values["kvarn_ops"] == kvarn_ops.__version__
    assert values["source"] in {"checkout", "editable"}
    assert Path(values["location"]) == Path(kvarn_ops.__file__).parent


def test_environment_imports_nothing_heavy(repo_root):
    code = (
        "import sys; from kvarn_ops.env import environment; environment();"
        "heavy = {'transformers', 'onnx', 'onnxruntime', 'torch_tensorrt', 'matplotlib'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_compiler_that_is_missing_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert environment()["cxx"].startswith("no-such-compiler: not found")


def test_env_prints_every_value_as_a_table_and_as_json(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    runner = CliRunner()
    table = runner.invoke(cli.app, ["env"])
    assert table.exit_code == 0
    as_json = runner.invoke(cli.app, ["env", "--json"])
    assert as_json.exit_code == 0
    values = json.loads(as_json.output)
    assert set(values) == KEYS
    assert all(key in table.output for key in KEYS)
    assert values["torch"] in table.output


def test_version():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"kvarn-ops {kvarn_ops.__version__}\n")


def test_python_dash_m_is_the_command(repo_root):
    done = subprocess.run(
        [sys.executable, "-m", "kvarn_ops", "--version"],
        cwd=repo_root,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""},
        check=True,
    )
    assert done.stdout.startswith("kvarn-ops ")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            kvarn_ops.ConfigError("bits is 5;\n use 2, 3, 4 or 8."),
            "kvarn-ops: bits is 5; use 2, 3, 4 or 8.\n",
        ),
        (
            ModuleNotFoundError("No module named 'torch_tensorrt'", name="torch_tensorrt"),
            "kvarn-ops: this command needs torch_tensorrt, which is not installed: "
            "pip install 'kvarn-ops[tensorrt]' (or torch_tensorrt alone).\n",
        ),
    ],
)
def test_errors_become_one_sentence_and_exit_code_2(monkeypatch, capsys, error, expected):
    if isinstance(error, ImportError) and missing_package_message(error.name, needed_by="") is None:
        pytest.skip(f"{error.name} is installed here")
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["kvarn-ops"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", expected)


def test_other_errors_keep_their_traceback(monkeypatch):
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["kvarn-ops"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_missing_package_message_is_only_for_missing_optional_packages():
    assert missing_package_message("torch", needed_by="x") is None
    assert missing_package_message(None, needed_by="x") is None
    assert missing_package_message("kvarn_ops.nothing", needed_by="x") is None
