"""What an exported step says about itself, for programs that run it without this package."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.export import ExportedProgram

from kvarn_ops import __version__

from .step_model import StepModel

__all__ = ["about", "mutated", "state"]


def about(step: StepModel, chunk: int) -> dict[str, str]:
    """Metadata of a file made from `step` for at most `chunk` new tokens a call."""
    config = step.kvarn_config
    found = {
        "version": __version__,
        "preset": config.preset,
        "config": config.to_string(),
        "group_size": config.group_size,
        "num_sink_tokens": config.num_sink_tokens,
        "max_cache_len": step.max_cache_len,
        "chunk": chunk,
        "num_layers": len(step.cache.layers),
    }
    named = {f"kvarn_ops.{name}": str(value) for name, value in found.items()}
    return named | {"torch.version": str(torch.__version__)}


def mutated(program: ExportedProgram) -> dict[str, Tensor]:
    """Buffers that a program without ops of ours changes, by name."""
    changed = set(program.graph_signature.buffers_to_mutate.values())
    return {name: x for name, x in program.named_buffers() if name in changed}


def state(buffers: Mapping[str, Tensor]) -> str:
    """Dtype and shape of each buffer that the steps change, by name, as JSON."""
    return json.dumps(
        {name: (str(x.dtype).removeprefix("torch."), list(x.shape)) for name, x in buffers.items()}
    )
