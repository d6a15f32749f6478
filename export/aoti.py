"""`aot_compile`: a patched model as an AOTInductor package that needs no Python of ours."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kvarn_ops.errors import BackendError, InputError, UnsupportedModelError
from kvarn_ops.lowering.graph import count_ops
from kvarn_ops.ops.portable import portable
from kvarn_ops.versions import release

from .about import about, mutated, state
from .artefact import check_place, written
from .program import export_step
from .stages import stage
from .step_model import StepModel

__all__ = ["aot_compile"]

# With 2.11, decoding differs by more than rounding once tiles are quantized; 2.12 was not tried.
_OLDEST_TORCH = (2, 13)
# The empty cache is all zeros, which Inductor 2.13 would fold although every call changes it.
_SETTINGS = {"joint_graph_constant_folding": False}
_TRACES = 2  # how often torch traces the step of a layer, for the progress bar


def aot_compile(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    *,
    max_cache_len: int | None = None,
    batch_size: int = 1,
    chunk: int | None = None,
) -> Path:
    """Compile a patched model, or a program with a packed cache, into one `.pt2` package.

    A process loads it with `torch._inductor.aoti_load_package(path)`, or from C++ with
    `torch::inductor::AOTIModelPackageLoader`, without this package: it holds no custom op. It is
    called with `input_ids` `[batch_size, S]` int64, S from 1 to `chunk`, and returns `logits`
    `[batch_size, S, vocabulary]`. The cache is kept between calls and is empty when the package is
    loaded; docs/export.md shows how a loaded package starts over. `get_metadata()` of a loaded
    package gives its sizes.

    Parameters
    ----------
    model : nn.Module or ExportedProgram
        A patched Hugging Face model in eval mode; or a program on a CPU that `rewrite_kv_cache` or
        `export_program` returned, which keeps its inputs and outputs.
    path : path
        Where to write, ending in `.pt2`. Nothing is left there if the compilation fails.
    max_cache_len : int, optional
        Most tokens of a sequence, for a model; a call beyond gives NaN. This and the following
        sizes are part of a program already.
    batch_size : int
        Rows.
    chunk : int, optional
        Most new tokens of a call; `min(512, max_cache_len)` if absent. 1 for a model on a GPU.

    Returns
    -------
    Path
        The package.

    Raises
    ------
    UnsupportedModelError
        If the model is not patched, has layers that stay dense and have no sliding window, or a
        program has no packed cache.
    InputError
        If a size is missing or out of range, the path does not end in `.pt2`, or its folder does
        not exist.
    BackendError
        If there is no such package for the model's device, or, on a CPU, torch is older than 2.13.
    """
    limit = None
    if isinstance(model, ExportedProgram):
        _check_no_sizes(max_cache_len, batch_size, chunk)
        device = _tensor_of(model).device
    elif max_cache_len is None:
        raise InputError("max_cache_len is missing: give the most tokens of a sequence.")
    else:
        limit = min(512, max_cache_len) if chunk is None else chunk
        device = next(model.parameters()).device
    _check_platform(device, limit)
    target = check_place(path, ".pt2")
    if isinstance(model, ExportedProgram):
        program, says = _written_out(model, None), {}
        changed = mutated(program)
    else:
        step = StepModel(model, max_cache_len, batch_size, windows=True)
        program = export_step(step, limit)
        says = about(step, limit) | {"kvarn_ops.batch_size": str(batch_size)}
        changed = step.state()
        if device.type == "cpu":  # on a GPU Inductor takes the kernels into the package
            program = _written_out(program, limit)
    # A new dict each time: Inductor adds what the machine has to it.
    settings = _SETTINGS | {"aot_inductor.metadata": says | {"kvarn_ops.state": state(changed)}}
    if device.type == "cuda":
        settings["aot_inductor.embed_kernel_binary"] = True
    with stage("Compiling"), written(target) as place:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(place), inductor_configs=settings
        )
    return target


def _written_out(program: ExportedProgram, limit: int | None) -> ExportedProgram:
    """The program without ops of ours, for at most `limit` new tokens a call."""
    with (
        stage("Writing out the ops", _TRACES * _attentions(program)) as advance,
        portable(limit, fast_decode=True, on_step=advance),
        torch.no_grad(),
    ):
        return program.run_decompositions({})


def _check_no_sizes(*sizes: int | None) -> None:
    if sizes != (None, 1, None):
        raise InputError(
            "an exported program has its sizes already: leave out max_cache_len, batch_size and "
            "chunk, or give them where the program is exported."
        )


def _attentions(program: ExportedProgram) -> int:
    """Layers with a packed cache."""
    found = count_ops(program.graph)
    number = found["kvarn::step_"] + found["kvarn::attention"]
    if not number:
        raise UnsupportedModelError(
            "this program has no packed cache: give a patched model, or what rewrite_kv_cache or "
            "export_program returned."
        )
    return number


def _tensor_of(program: ExportedProgram) -> Tensor:
    return next(
        x
        for x in [*program.state_dict.values(), *program.constants.values()]
        if isinstance(x, Tensor)
    )


def _check_platform(device: torch.device, limit: int | None) -> None:
    """What is known to give wrong programs, and what is not there."""
    if device.type == "cuda":
        if limit != 1:
            raise BackendError(
                "packages for GPUs take one new token a call so far: give a model and chunk=1, and "
                "prompts token by token, or use export_program."
            )
        return
    if device.type != "cpu":
        raise BackendError(
            f"the model is on {device}, and packages are made for CPUs and CUDA: move it with "
            "model.cpu(), or use export_program."
        )
    if release(torch.__version__) < _OLDEST_TORCH:
        raise BackendError(
            f"AOTInductor of torch {torch.__version__} compiles this program wrongly: use torch "
            "2.13 or newer, or export_program, which works with older releases."
        )
