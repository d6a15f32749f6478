"""`to_onnx`: a patched model as an ONNX step model that onnxruntime runs without this package."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnxscript
import torch
from onnxscript import ir
from torch import nn
from torch.export import Dim, ExportedProgram

from kvarn_ops.errors import InputError, KVarNError, reason
from kvarn_ops.layout import TileCache
from kvarn_ops.ops.portable import portable

from .about import about
from .artefact import check_place, written
from .functional_step import FunctionalStep
from .onnx_functions import translations
from .stages import stage
from .step_model import StepModel

__all__ = ["to_onnx"]

_OLDEST_OPSET = 18  # of the operators that torch's exporter writes, and of BitwiseAnd
_TRACES = 2  # how often torch traces the step of a layer, for the progress bar


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    max_cache_len: int,
    batch_size: int | None = None,
    chunk: int = 256,
    attention_mask: bool = False,
    opset: int = 20,
) -> Path:
    """Write a patched model as an ONNX model of one step: past cache in, present cache out.

    Inputs are `input_ids` `[B, S]` int64, with `attention_mask=True` then `attention_mask` `[B, S]`
    int64 (1 for a token, 0 for padding, which is not stored), and `past.<layer>.<field>`. Outputs
    are `logits` `[B, S, vocabulary]` in the model's dtype and `present.<layer>.<field>`, of the
    same shapes and dtypes as the past. Fields are those of `kvarn_ops.layout`; an all-zero past is
    the empty cache. A row with more tokens than fit gets NaN logits. docs/export.md says more.

    Parameters
    ----------
    model : nn.Module
        A patched Hugging Face model in eval mode, all of its layers packed. It is not changed.
    path : str or path
        Where to write. Models above 2 GB get their weights in a second file, `<path>.data`.
    max_cache_len : int
        Most tokens of a sequence.
    batch_size : int, optional
        Rows B; by default any number.
    chunk : int
        Most new tokens S of a call; prompts are given in pieces of at most this length.
    attention_mask : bool
        Whether the model takes a mask of padding.
    opset : int
        Version of ONNX's operators, 18 or newer.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    UnsupportedModelError
        If the model is not patched, not all of its layers are packed, or it takes no positions and
        a mask is asked for.
    InputError
        If a size or the opset is out of range, or the folder does not exist.
    ImportError
        If onnx or onnxscript is not installed; the extra `onnx` brings them.

    Examples
    --------
    >>> kvarn_ops.patch(model)
    >>> kvarn_ops.export.to_onnx(model, "model.onnx", max_cache_len=4096)
    """
    path = check_place(path)
    _check(chunk, opset)
    # Two rows where any number is meant: torch.export takes a size of 1 for a constant.
    shapes_of = StepModel(model, max_cache_len, 2 if batch_size is None else batch_size)
    chunk = min(chunk, max_cache_len)
    step = FunctionalStep(shapes_of, chunk, attention_mask).eval()
    made = _translated(_exported(step, batch_size is None), step, opset)
    config = shapes_of.kvarn_config
    made.metadata_props.update(
        about(shapes_of, chunk) | {"onnxscript.version": onnxscript.__version__}
    )
    made.doc_string = (
        f"One step of {type(model).__name__} with a KVarN cache ({config.preset}) for "
        f"{max_cache_len} tokens: at most {chunk} new tokens a call, all-zero past is empty."
    )
    with stage("Writing and checking"), written(path) as place:
        torch.onnx.ONNXProgram(made, None).save(place)
        onnx.checker.check_model(place, full_check=True)
    return path


def _check(chunk: int, opset: int) -> None:
    newest = onnx.defs.onnx_opset_version()
    if not _OLDEST_OPSET <= opset <= newest:
        raise InputError(
            f"opset={opset}: the model needs operators of opset {_OLDEST_OPSET}, and the installed "
            f"onnx knows up to {newest}; give a number in between."
        )
    if chunk < 1:
        raise InputError(f"chunk={chunk}: give the most new tokens of a call, at least 1.")


def _exported(step: FunctionalStep, any_batch: bool) -> ExportedProgram:
    """The program with our ops left whole."""
    past = step.empty()
    batch = len(past[0]["seq_lens"])
    tokens = torch.zeros(batch, 2, dtype=torch.int64, device=step.rotation.device)
    rows = {0: Dim("batch", min=1)} if any_batch else {}
    new = {1: Dim("new_tokens", min=1, max=_most(step))}
    of_past = [dict.fromkeys(layer, rows) for layer in past]
    mask = (torch.ones_like(tokens),) if step.masked else ()
    shapes: Any = (rows | new, of_past, *[rows | new] * len(mask))
    with stage("Tracing the model"), torch.no_grad():
        program = torch.export.export(
            step, (tokens, past, *mask), dynamic_shapes=shapes, strict=False
        )
    signature = program.graph_signature
    mutated = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    # torch.onnx.export drops them without a word, and the cache would never fill.
    assert not mutated, f"the step writes to {sorted(mutated.values())}"
    return program


def _most(step: FunctionalStep) -> int:
    """New tokens that the program is traced for. With the size 1 written into it, onnxscript's
    optimizer (0.7) gives `If` branches that refer to what they do not hold.
    """
    return max(2, step.chunk)


def _translated(program: ExportedProgram, step: FunctionalStep, opset: int) -> ir.Model:
    fields = [f"{layer}.{field}" for layer in range(step.num_layers) for field in TileCache._fields]
    masks = ["attention_mask"] if step.masked else []
    inputs = ["input_ids", *(f"past.{name}" for name in fields), *masks]
    outputs = ["logits", *(f"present.{name}" for name in fields)]
    # Our ops become plain arithmetic while the exporter decomposes the program.
    with (
        stage("Writing out the ops", _TRACES * step.num_layers) as advance,
        portable(_most(step), fast_decode=False, on_step=advance),
        torch.no_grad(),
        _quiet(),
    ):
        try:
            made = torch.onnx.export(
                program, dynamo=True, custom_translation_table=translations(),
                opset_version=opset, input_names=inputs, output_names=outputs,
                verbose=False, optimize=True,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            raise KVarNError(
                f"torch {torch.__version__} could not write this model as ONNX ({reason(error)}): "
                "report it with the model's name, or use aot_compile."
            ) from error
    assert made is not None
    found = made.model
    if found.opset_imports.get("") != opset:
        raise InputError(
            f"opset={opset}: onnxscript cannot convert this model from opset "
            f"{found.opset_imports.get('')}, give that instead."
        )
    _check_interface(found, inputs, outputs)
    _name_dimensions(found)
    _name_limit(found, step.chunk)
    for node in ir.traversal.RecursiveGraphIterator(found.graph):
        node.metadata_props.clear()  # stack traces: nine tenths of a small file
        node.doc_string = None
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what onnxscript and onnx_ir say about themselves."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_interface(model: ir.Model, inputs: list[str], outputs: list[str]) -> None:
    """Every field comes in and goes out as it came, in operators of the default domain."""
    assert [x.name for x in model.graph.inputs] == inputs
    assert [x.name for x in model.graph.outputs] == outputs
    kinds = {x.name: (x.dtype, str(x.shape)) for x in model.graph.inputs}
    for value in model.graph.outputs:
        past = (value.name or "").replace("present.", "past.")
        assert past == "logits" or kinds[past] == (value.dtype, str(value.shape)), value
    domains = {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    assert domains == {""}, domains
    assert not model.functions


def _name_dimensions(model: ir.Model) -> None:
    """Write `batch` and `new_tokens` for torch's symbols, everywhere."""
    dims = zip(("batch", "new_tokens"), model.graph.inputs[0].shape or (), strict=True)
    names = {str(dim): name for name, dim in dims if not isinstance(dim, int)}
    if not names:
        return
    symbol = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    values = [*model.graph.inputs]
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        values.extend(node.outputs)
    for value in values:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                assert value.shape is not None
                value.shape[axis] = symbol.sub(lambda found: names[found[0]], str(dim.value))


def _name_limit(model: ir.Model, chunk: int) -> None:
    """Let runtimes' errors about too many tokens say so: they give the name of the node."""
    # Other arithmetic may share the constant, where the chunk is as long as a tile.
    (lookup,) = (
        node
        for node in model.graph
        if node.op_type == "Gather" and node.inputs[0] and node.inputs[0].name == "ranks"
    )
    lookup.name = f"input_ids_may_have_at_most_{chunk}_new_tokens"
