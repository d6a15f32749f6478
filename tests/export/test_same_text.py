"""The byte model writes the same greedy text in every form, most of them in fresh processes.

Prompts come in chunks; prompt and new text finish several tiles each.
"""

from __future__ import annotations

import ast
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import kvarn_ops
from byte_text import CHUNK, COUNT, PRESET, PROMPT, ROOM, greedy, text_of
from extras import need_onnx
from fresh_process import BLOCKER, last_line, start_python

pytestmark = [pytest.mark.export, pytest.mark.slow]

PROGRAM = """
import torch, kvarn_ops
from byte_text import greedy
step = torch.export.load("model.pt2").module()
made = greedy(step)
for name, x in step.named_buffers():
    name.startswith("past_") and x.zero_()
assert greedy(step) == made, "zeros are no new sequence"
print(made)
"""
PACKAGE = """
import torch
from byte_text import greedy
print(greedy(torch._inductor.aoti_load_package({path!r})))
"""


@pytest.fixture(scope="module")
def cache(byte_model: Any) -> Any:
    return kvarn_ops.KVarNCache(byte_model.config, ROOM, PRESET)


@pytest.fixture(scope="module")
def text(byte_model: Any, cache: Any) -> str:
    """What the model writes in eager mode."""
    tiles = kvarn_ops.KVarNConfig.from_preset(PRESET).num_tiles
    assert tiles(len(PROMPT)) > 3
    assert tiles(len(PROMPT) + COUNT) - tiles(len(PROMPT)) > 3
    made = greedy(lambda ids: byte_model(ids, past_key_values=cache).logits)
    assert len(set(made)) > 10, "a text that says nothing hides what is wrong"
    return text_of(made)


def printed_ids(code: str, cwd: Path, *path: Path) -> list[int]:
    return ast.literal_eval(last_line(start_python("-c", code, cwd=cwd, path=path)))


def test_compiled(byte_model: Any, cache: Any, text: str, fresh_dynamo: None) -> None:
    cache.reset()
    compiled = torch.compile(byte_model, fullgraph=True)

    def step(ids: torch.Tensor) -> torch.Tensor:  # prompts eagerly, as generate does
        model = compiled if ids.shape[1] == 1 else byte_model
        return model(ids, past_key_values=cache).logits

    assert text_of(greedy(step)) == text


def test_exported_program(byte_model: Any, text: str, tmp_path: Path, repo_root: Path) -> None:
    program = kvarn_ops.export.export_program(byte_model, max_cache_len=ROOM, dynamic=CHUNK)
    torch.export.save(program, tmp_path / "model.pt2")
    made = printed_ids(PROGRAM, tmp_path, repo_root, repo_root / "tests" / "helpers")
    assert text_of(made) == text


def test_package(byte_package: Path, text: str, tmp_path: Path, repo_root: Path) -> None:
    code = BLOCKER.format(blocked={"kvarn_ops", "transformers"})
    code += PACKAGE.format(path=str(byte_package))
    made = printed_ids(code, tmp_path, repo_root / "tests" / "helpers")
    assert text_of(made) == text


def test_onnx_without_torch(byte_model: Any, text: str, tmp_path: Path, repo_root: Path) -> None:
    """`examples/onnx_generate.py`, which also writes the file."""
    need_onnx()
    example = repo_root / "examples" / "onnx_generate.py"
    target = tmp_path / "byte.onnx"
    runpy.run_path(str(example))["export"](str(target), ROOM, PRESET, CHUNK)
    words = [str(example), str(target), "--prompt", PROMPT, "--tokens", str(COUNT)]
    code = BLOCKER.format(blocked={"torch", "transformers", "kvarn_ops", "onnx"}) + (
        f"import runpy\nsys.argv = {words!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = start_python("-c", code, cwd=tmp_path)
    assert f"[{COUNT} tokens" in last_line(done)
    assert done.stdout.rpartition("\n[")[0] == text


def finished(command: list[Any]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """`examples/aot_cpp`, built."""
    for tools in (["cmake"], ["make", "ninja"], ["c++", "g++", "clang++"]):
        if not any(map(shutil.which, tools)):
            pytest.skip(f"no {' or '.join(tools)}, which the C++ example is built with")
    folder = tmp_path_factory.mktemp("aot_cpp")
    torch_here = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (
        ["cmake", "-S", repo_root / "examples" / "aot_cpp", "-B", folder, torch_here],
        ["cmake", "--build", folder],
    ):
        done = finished(command)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "generate"


def test_package_without_python(program: Path, byte_package: Path, text: str) -> None:
    """Each prompt starts a new sequence, and the size of its pieces is a choice."""
    other = "class A:\n"
    words = [program, byte_package, str(COUNT), PROMPT, other, PROMPT]
    done = finished(words)
    assert done.returncode == 0, done.stderr
    texts = re.findall(rf"(.*?)\n\[{COUNT} tokens, .*?\]\n", done.stdout, re.DOTALL)
    assert texts[0] == texts[2] == text
    assert texts[1] != text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["3"], "usage"),
        (["many", "a"], "whole number"),
        (["0", "a"], "whole number"),
        (["511", "a"], "holds 512 tokens"),
        (["3", "a", "--chunk", "65"], "at most 64"),
    ],
)
def test_errors_of_the_program(
    words: list[str], says: str, program: Path, byte_package: Path
) -> None:
    done = finished([program, byte_package, *words])
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_program_names_a_package_that_is_not_there(program: Path, tmp_path: Path) -> None:
    words = [program, tmp_path / "no.pt2", "3", "a"]
    done = finished(words)
    assert done.returncode == 1
    assert done.stderr == f"generate: {tmp_path / 'no.pt2'} is no file.\n"
