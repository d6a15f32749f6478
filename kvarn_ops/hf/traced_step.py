"""What the graph of a decode step holds, for a model directory; no weight is read."""

from __future__ import annotations

from pathlib import Path

import torch

from ..explanation import Explanation
from ..patching import explain, passes_only, patched
from .cache import KVarNCache
from .model_dir import open_model_dir

__all__ = ["explain_step"]

_CAPACITY = 1024  # tokens; the graph is the same for any


def explain_step(directory: Path, preset: str) -> Explanation:
    """Patch the model of a directory, trace one decode step on the meta device, and explain it."""
    model = open_model_dir(directory).model
    with patched(model, preset, backend="aten"), torch.no_grad(), torch.device("meta"):
        cache = KVarNCache(model.config, _CAPACITY, preset)
        token = torch.zeros(1, 1, dtype=torch.int64)
        step = torch.compile(model, backend=passes_only, fullgraph=True)
        step(token, past_key_values=cache, use_cache=True)
        return explain(model)
