"""`export_program`: a patched model as a `torch.export.ExportedProgram`."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from kvarn_ops.errors import InputError

from .artefact import check_place, written
from .stages import stage
from .step_model import StepModel

__all__ = ["export_program", "export_step", "save_program"]


def export_program(
    model: nn.Module, *, max_cache_len: int, batch_size: int = 1, dynamic: bool | int = True
) -> ExportedProgram:
    """Export prefill and decode of a patched model as one program with a packed cache.

    The program takes `input_ids` `[batch_size, S]` int64 and returns `logits`
    `[batch_size, S, vocabulary]`. The cache is its buffers, which start empty, are updated by every
    call and are not saved with the weights. It contains our ops: a process that loads it imports
    `kvarn_ops` first. docs/export.md says more.

    Parameters
    ----------
    model : nn.Module
        A patched Hugging Face model in eval mode. It is not changed.
    max_cache_len : int
        Most tokens of a sequence.
    batch_size : int
        Rows.
    dynamic : bool or int
        True: S is any number from 1 to `max_cache_len`; a number: from 1 to that. False: S is 1.

    Returns
    -------
    ExportedProgram

    Raises
    ------
    UnsupportedModelError
        If the model is not patched, or has layers that stay dense and have no sliding window.
    InputError
        If a size is out of range.

    Examples
    --------
    >>> kvarn_ops.patch(model)
    >>> program = kvarn_ops.export.export_program(model, max_cache_len=4096)
    >>> torch.export.save(program, "model.pt2")
    """
    most = max_cache_len if dynamic is True else int(dynamic) or 1
    return export_step(StepModel(model, max_cache_len, batch_size, windows=True), most)


def export_step(step: StepModel, most: int) -> ExportedProgram:
    """Export a step of 1 to `most` new tokens."""
    if not 1 <= most <= step.max_cache_len:
        raise InputError(
            f"{most} new tokens at once: give a number from 1 to max_cache_len "
            f"({step.max_cache_len})."
        )
    device = step.get_buffer("rotation").device
    tokens = torch.zeros(step.batch_size, min(2, most), dtype=torch.int64, device=device)
    shapes: Any = ({1: Dim("new_tokens", min=1, max=most)},) if most > 1 else None
    step.reset()
    with stage("Tracing the model"), torch.no_grad(), warnings.catch_warnings():
        # The layers' flags that one forward sets and clears.
        warnings.filterwarnings("ignore", message="While compiling, we found certain side effects")
        program = torch.export.export(step, (tokens,), dynamic_shapes=shapes, strict=True)
    step.reset()
    return program


def save_program(program: ExportedProgram, path: str | os.PathLike[str]) -> Path:
    """`torch.export.save` that leaves a whole file or none; returns its path.

    Raises
    ------
    InputError
        If the path does not end in `.pt2`, or its folder does not exist.
    """
    target = check_place(path, ".pt2")
    with stage("Saving"), written(target) as place:
        torch.export.save(program, place)
    return target
