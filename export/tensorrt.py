"""`to_tensorrt`: decode steps of a patched model in TensorRT engines, by Torch-TensorRT."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kvarn_ops.errors import BackendError, InputError, reason

from .artefact import check_place, written
from .engine_program import MODES, example_inputs, export_engine_program
from .engine_step import EngineStep
from .stages import stage
from .step_model import StepModel
from .tensorrt_support import check_available

__all__ = ["Partition", "load_engine", "partition_of", "save_engine", "to_tensorrt"]


def to_tensorrt(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    max_cache_len: int,
    batch_size: int | None = None,
    chunk: int | None = None,
    mode: str = "fallback",
    settings: Mapping[str, Any] | None = None,
) -> EngineStep:
    """Compile decode steps of a patched model for NVIDIA GPUs with Torch-TensorRT.

    The result is called with `input_ids` `[batch_size, S]` int64 and returns `logits`
    `[batch_size, S, vocabulary]`. It holds the packed cache, which is read by the engine and
    written in PyTorch; `reset()` empties it. Up to `chunk` new tokens go through the engine, and
    more at once, such as a prompt, through `model` in PyTorch. docs/export.md says more, also
    about what was never tried.

    Parameters
    ----------
    model : nn.Module
        A patched Hugging Face model in eval mode on an NVIDIA GPU. It is not changed, and stays in
        memory beside the engine.
    inputs : Tensor or sequence of one Tensor, optional
        Example of `input_ids` `[batch_size, chunk]`, in place of the two sizes.
    max_cache_len : int
        Most tokens of a sequence.
    batch_size : int, optional
        Rows; 1 by default.
    chunk : int, optional
        Most new tokens of a call of the engine; 1 by default.
    mode : {"fallback", "plugin", "decompose"}
        Where attention is: in PyTorch between two engines per layer; in the engine as a plugin
        whose kernel is that of PyTorch; in the engine as arithmetic, which unpacks the whole cache
        at every step.
    settings : mapping, optional
        More arguments of `torch_tensorrt.dynamo.compile`.

    Returns
    -------
    EngineStep
        `program` of it is what Torch-TensorRT made.

    Raises
    ------
    InputError
        If the mode, a size or the example is not valid.
    UnsupportedModelError
        If the model is not patched, not all of its layers are packed, or a call of it would change
        something that the engine does not store.
    BackendError
        If Torch-TensorRT cannot run here, the model is not on a GPU, the engine cannot be built, or
        parts of it ended up elsewhere than the mode says.

    Examples
    --------
    >>> kvarn_ops.patch(model)
    >>> step = kvarn_ops.export.to_tensorrt(model, max_cache_len=4096, mode="plugin")
    >>> logits = step(prompt_ids)
    """
    if mode not in MODES:
        raise InputError(f"mode={mode!r}: choose one of {', '.join(MODES)}.")
    batch_size, chunk = _sizes(inputs, batch_size, chunk)
    check_available()
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise BackendError(f"the model is on {device}, and engines run on GPUs: use model.cuda().")
    step = StepModel(model, max_cache_len, batch_size)
    with stage("Tracing the model"):
        program = export_engine_program(step, chunk, mode)
    with stage("Building the engine"), torch.cuda.device(device):
        compiled = _compiled(program, step, chunk, mode, settings or {})
    _check_partition(partition_of(compiled), mode, len(step.cache.layers))
    return EngineStep(step, compiled, chunk)


def save_engine(step: EngineStep, path: str | os.PathLike[str]) -> Path:
    """Write the engine of a step, with `torch_tensorrt.save`; the cache is not written.

    Raises
    ------
    InputError
        If the path does not end in `.ep`, or its folder does not exist.
    """
    target = check_place(path, ".ep")
    import torch_tensorrt  # pyright: ignore[reportMissingImports]

    inputs = list(example_inputs(step.model, 1))
    with stage("Saving"), written(target) as place:
        torch_tensorrt.save(step.program, str(place), arg_inputs=inputs)
    return target


def load_engine(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    max_cache_len: int,
    batch_size: int = 1,
    chunk: int = 1,
) -> EngineStep:
    """The step of an engine that `save_engine` wrote, with an empty cache.

    Parameters
    ----------
    model : nn.Module
        The model that the engine was made from, patched, on its GPU; it runs prompts.
    path : path
        The file.
    max_cache_len, batch_size, chunk : int
        As in `to_tensorrt`.

    Raises
    ------
    BackendError
        If Torch-TensorRT cannot run here.
    InputError
        If there is no such file.
    """
    check_available()
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist: give a file that save_engine has written.")
    import torch_tensorrt  # pyright: ignore[reportMissingImports]

    program = torch_tensorrt.load(str(path)).module()
    return EngineStep(StepModel(model, max_cache_len, batch_size), program, chunk)


def _sizes(
    inputs: Tensor | Sequence[Tensor] | None, batch_size: int | None, chunk: int | None
) -> tuple[int, int]:
    """Rows and most new tokens, from the example or as given."""
    if inputs is None:
        return (1 if batch_size is None else batch_size), (1 if chunk is None else chunk)
    example = inputs
    if not isinstance(example, Tensor) and len(example) == 1:
        example = example[0]
    if not isinstance(example, Tensor) or example.ndim != 2 or example.dtype != torch.int64:
        raise InputError("inputs: give one example of input_ids, [batch_size, chunk] int64.")
    for name, given, found in zip(
        ("batch_size", "chunk"), (batch_size, chunk), example.shape, strict=True
    ):
        if given not in (None, found):
            raise InputError(f"{name}={given}, and the example has {found}: give one of them.")
    return example.shape[0], example.shape[1]


def _compiled(
    program: ExportedProgram, step: StepModel, chunk: int, mode: str, settings: Mapping[str, Any]
) -> Any:
    import torch_tensorrt  # pyright: ignore[reportMissingImports]

    if mode == "plugin":
        from .tensorrt_plugin import register

        register()
    tokens, *rest = example_inputs(step, 1)
    if chunk > 1:
        rows = step.batch_size
        tokens = torch_tensorrt.Input(
            min_shape=(rows, 1), opt_shape=(rows, 1), max_shape=(rows, chunk), dtype=torch.int64
        )
    options: dict[str, Any] = {"disable_tf32": True}  # rotations need more than 10 bits
    if mode == "fallback":
        options["torch_executed_ops"] = {torch.ops.kvarn.step_attention.default}
    else:
        options["min_block_size"] = 1
    try:
        return torch_tensorrt.dynamo.compile(
            program, arg_inputs=[tokens, *rest], **(options | dict(settings))
        )
    except Exception as error:  # whatever TensorRT and its converters raise
        raise BackendError(
            f"Torch-TensorRT could not build an engine in mode={mode!r} ({reason(error)}): try "
            'mode="fallback", which leaves attention to PyTorch.'
        ) from error


class Partition(NamedTuple):
    """What became of a program: engines, and operators on tensors outside of them."""

    engines: list[str]
    outside: list[str]


def partition_of(compiled: Any) -> Partition:
    """Read a module that Torch-TensorRT made."""
    engines, outside = [], []
    graphs = [compiled]
    for name, child in compiled.named_children():
        if name.startswith("_run_on_acc"):
            engines.append(name)
        elif isinstance(child, torch.fx.GraphModule):
            graphs.append(child)
    for graph in graphs:
        outside += [
            str(node.target)
            for node in graph.graph.nodes
            if node.op == "call_function" and not _is_of_sizes(node.target)
        ]
    return Partition(engines, outside)


def _is_of_sizes(target: Any) -> bool:
    """Whether a call picks one of several results, or computes a size, as Python may do."""
    return target is torch.ops.aten.sym_size.int or getattr(target, "__module__", "") == "_operator"


def _check_partition(partition: Partition, mode: str, layers: int) -> None:
    """Refuse a result that is not what the mode promises."""
    count = partition.outside.count("kvarn.step_attention.default")
    if mode == "fallback" and count != layers:
        raise BackendError(
            f"{count} of {layers} layers have their attention in PyTorch: Torch-TensorRT did not "
            "keep torch_executed_ops."
        )
    if mode != "fallback" and partition.outside:
        names = ", ".join(sorted(set(partition.outside)))
        raise BackendError(
            f"Torch-TensorRT left {names} outside of the engine in mode={mode!r}: use "
            'mode="fallback".'
        )
