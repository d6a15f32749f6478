"""`to_onnx`: a patched model as an ONNX step model that onnxruntime runs without this package."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import warnings
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
from .functional_step import FunctionalStep
from .onnx_functions import translations
from .step_model import StepModel

__all__ = ["to_onnx"]

_OLDEST_OPSET = 18  # of the operators that torch's exporter writes, and of BitwiseAnd
_logger = logging.getLogger("kvarn_ops")


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
    path = Path(path)
    _check(path, chunk, batch_size, opset)
    # Two rows where any number is meant: torch.export takes a size of 1 for a constant.
    shapes_of = StepModel(model, max_cache_len, batch_size or 2)
    chunk = min(chunk, max_cache_len)
    step = FunctionalStep(shapes_of, chunk, attention_mask).eval()
    written = _translated(_exported(step, batch_size is None), step, opset)
    config = shapes_of.kvarn_config
    written.metadata_props.update(
        about(shapes_of, chunk) | {"onnxscript.version": onnxscript.__version__}
    )
    written.doc_string = (
        f"One step of {type(model).__name__} with a KVarN cache ({config.preset}) for "
        f"{max_cache_len} tokens: at most {chunk} new tokens a call, all-zero past is empty."
    )
    return _saved(written, path)


def _check(path: Path, chunk: int, batch_size: int | None, opset: int) -> None:
    newest = onnx.defs.onnx_opset_version()
    if not _OLDEST_OPSET <= opset <= newest:
        raise InputError(
            f"opset={opset}: the model needs operators of opset {_OLDEST_OPSET}, and the installed "
            f"onnx knows up to {newest}; give a number in between."
        )
    if chunk < 1:
        raise InputError(f"chunk={chunk}: give the most new tokens of a call, at least 1.")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size={batch_size}: give an integer >= 1, or None for any number.")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: give a file name in a folder that exists.")


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
    with torch.no_grad():
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
    with torch.no_grad(), portable(_most(step), fast_decode=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of onnxscript about itself
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
    for node in model.graph:
        if node.inputs and node.inputs[0] is not None and node.inputs[0].name == "ranks":
            node.name = f"input_ids_may_have_at_most_{chunk}_new_tokens"


def _saved(model: ir.Model, path: Path) -> Path:
    """Write next to `path`, check, and move: no half-written model is ever at `path`."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        target = Path(folder) / path.name
        torch.onnx.ONNXProgram(model, None).save(target)
        onnx.checker.check_model(target, full_check=True)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == target):
            os.replace(file, path.parent / file.name)
    _logger.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)
    return path
