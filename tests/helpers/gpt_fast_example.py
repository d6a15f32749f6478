"""The decoder of examples/gpt_fast_style.py, small, with its caches set up."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

_PATH = Path(__file__).resolve().parents[2] / "examples" / "gpt_fast_style.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpt_fast_style", _PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpt_fast_style"] = module  # dataclasses and pickle look it up
    spec.loader.exec_module(module)
    return module


gpt_fast_style = _load()


def gpt_fast_model(
    batch: int = 2, tokens: int = 256, dtype: torch.dtype = torch.float32, **config: Any
) -> nn.Module:
    """Two layers of 4 / 2 heads of width 32; `tokens=0` sets no caches up."""
    sizes = {"head_dim": 32, "vocab_size": 96, "ffn_dim": 96} | config
    model = gpt_fast_style.random_model(gpt_fast_style.Config(**sizes), dtype)
    if tokens:
        model.setup_caches(batch, tokens)
    return model
