"""The shipped model: greedy text is the same in eager and compiled mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig

import kvarn_ops

PROMPT = '"""Utilities for reading configuration files."""\n\nimport os\nimport sys\n\n\ndef '
NEW_TOKENS = 200


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_greedy_text_does_not_depend_on_compilation(repo_root: Path) -> None:
    folder = repo_root / "examples" / "byte_model"
    if not (folder / "model.safetensors").exists():
        pytest.skip("examples/byte_model has no weights")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Tiles of 32 after 32 sinks, so that most of the context is packed.
    kvarn_ops.patch(model, "k4v2_g32", num_sink_tokens=32)
    ids = torch.tensor([list(PROMPT.encode())])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}

    def text(tokens: Tensor) -> str:
        return bytes(int(token) % 256 for token in tokens[0]).decode("latin-1")

    eager = model.generate(ids, **options)
    config = CompileConfig(fullgraph=True, mode=None)
    config._compile_all_devices = True
    compiled = model.generate(ids, **options, compile_config=config)
    assert eager.shape[1] == ids.shape[1] + NEW_TOKENS
    assert text(compiled) == text(eager)
    assert kvarn_ops.explain(model).graph_ops, "generate did not compile"
