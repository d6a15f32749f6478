"""What several files use: the byte model and its exports, each made once per test run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import byte_text
import kvarn_ops
from extras import PACKAGES
from kvarn_ops.export import aot_compile

Made = Callable[[str, Callable[[Path], Path]], Path]


@pytest.fixture(scope="session")
def made_once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A file in a folder of its own, written by the first process of pytest-xdist that asks."""
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        shared = shared.parent

    def made(name: str, make: Callable[[Path], Path]) -> Path:
        path = shared / name / "model.pt2"
        with FileLock(shared / f"{name}.lock"):
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                assert make(path) == path
        return path

    return made


@pytest.fixture(scope="session")
def byte_model(repo_root: Path) -> Any:
    """The model in examples/byte_model, patched."""
    from transformers import AutoModelForCausalLM

    folder = repo_root / "examples" / "byte_model"
    if not (folder / "model.safetensors").exists():
        pytest.skip("examples/byte_model has no weights")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return kvarn_ops.patch(model, byte_text.PRESET)


@pytest.fixture(scope="session")
def byte_package(byte_model: Any, made_once: Made) -> Path:
    """The byte model as an AOTInductor package."""
    if not PACKAGES:
        pytest.skip("packages need torch 2.13")
    with torch.no_grad():
        byte_model(torch.zeros(1, 200, dtype=torch.int64))  # used before: no matter
    options = {"max_cache_len": byte_text.ROOM, "chunk": byte_text.CHUNK}
    return made_once("byte_model", lambda path: aot_compile(byte_model, path, **options))
