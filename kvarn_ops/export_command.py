"""The command `kvarn-ops export`: a model directory becomes a file that runs without this package.

Imports nothing that is slow: the command line reads the options.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["export"]

_DEFAULT_LEN = 4096


class Target(str, Enum):
    """What is written."""

    aoti = "aoti"
    onnx = "onnx"
    pt2 = "pt2"
    tensorrt = "tensorrt"


_SUFFIXES = {Target.onnx: ".onnx", Target.tensorrt: ".ep"}


class Mode(str, Enum):
    """Where attention is, beside TensorRT's engines."""

    fallback = "fallback"
    plugin = "plugin"
    decompose = "decompose"


def export(
    directory: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR", help="In Hugging Face format, with weights.")
    ],
    to: Annotated[
        Target,
        typer.Option(
            help="aoti: a package for torch's runtime; onnx: for onnxruntime; pt2: a program of "
            "torch.export, which needs kvarn_ops; tensorrt: engines, on an NVIDIA GPU."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="File; default: MODEL_DIR's name, here, .onnx or .pt2.")
    ] = None,
    preset: Annotated[str, typer.Option(help="How the cache is quantized.")] = "k4v2",
    max_cache_len: Annotated[
        int | None,
        typer.Option(help="Most tokens of a sequence; default: 4096 or what the model knows."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    chunk: Annotated[
        int, typer.Option(help="Most new tokens of a call: prompts are given in such pieces.")
    ] = 256,
    attention_mask: Annotated[
        bool, typer.Option("--attention-mask", help="ONNX: an input that marks padding.")
    ] = False,
    opset: Annotated[int, typer.Option(help="ONNX: version of its operators.")] = 20,
    mode: Annotated[
        Mode, typer.Option(help="TensorRT: attention in PyTorch, a plugin, or arithmetic.")
    ] = Mode.fallback,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; default: the model's, but float32 instead of "
            "bfloat16 for ONNX, since onnxruntime has no such kernels for CPUs."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where it will run; default: cpu, and cuda for tensorrt.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Run it against the model afterwards.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Write a model with its packed cache as a program, and compare it with the model."""
    from dataclasses import asdict

    from kvarn_ops.export import compare
    from kvarn_ops.export.artefact import check_place

    from .config import KVarNConfig
    from .patching import patch

    config = KVarNConfig.from_preset(preset)
    if to is Target.tensorrt:
        from kvarn_ops.export.tensorrt_support import check_available

        check_available()  # before a model is loaded
    model = _loaded(directory, to, dtype, device)
    most = _cache_len(model, max_cache_len)
    sizes = {"max_cache_len": most, "batch_size": batch, "chunk": min(chunk, most)}
    suffix = _SUFFIXES.get(to, ".pt2")
    path = check_place(out or Path(directory.resolve().name + suffix), suffix)
    patch(model, config)
    if to is Target.tensorrt:
        exported = _export_engine(model, path, sizes, mode)
    else:
        exported = _export(to, model, path, sizes, attention_mask=attention_mask, opset=opset)
    report = compare(model, exported, **sizes) if check else None
    if as_json:
        values = {"to": to.value, "path": str(path), "preset": preset} | sizes
        typer.echo(json.dumps(values | (asdict(report) if report else {}), indent=2))
    else:
        _print_table(to, path, preset, sizes, report)


def _loaded(directory: Path, to: Target, dtype: str | None, device: str | None) -> Any:
    import torch

    from .eval.data import find_model, load_model

    device = device or ("cuda" if to is Target.tensorrt else "cpu")
    model = load_model(find_model(directory), device, dtype or "auto")
    if to is Target.onnx and dtype is None and model.dtype == torch.bfloat16:
        model = model.float()
    return model


def _cache_len(model: Any, given: int | None) -> int:
    if given is not None:
        return given
    config = model.config.get_text_config(decoder=True)
    return min(_DEFAULT_LEN, getattr(config, "max_position_embeddings", None) or _DEFAULT_LEN)


def _export(to: Target, model: Any, path: Path, sizes: dict[str, int], **of_onnx: Any) -> Any:
    """Write; returns what `compare` takes."""
    from kvarn_ops import export as exports

    if to is Target.onnx:
        return exports.to_onnx(model, path, **sizes, **of_onnx)
    if to is Target.aoti:
        return exports.aot_compile(model, path, **sizes)
    chunk = sizes["chunk"]
    program = exports.export_program(
        model, max_cache_len=sizes["max_cache_len"], batch_size=sizes["batch_size"], dynamic=chunk
    )
    return exports.save_program(program, path)


def _export_engine(model: Any, path: Path, sizes: dict[str, int], mode: Mode) -> Any:
    """Prompts run in PyTorch, so that chunks of them are not the engine's business."""
    from kvarn_ops.export import save_engine, to_tensorrt

    step = to_tensorrt(
        model, max_cache_len=sizes["max_cache_len"], batch_size=sizes["batch_size"], mode=mode.value
    )
    save_engine(step, path)
    return step


def _print_table(to: Target, path: Path, preset: str, sizes: dict[str, int], report: Any) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    what = f"{preset}, up to {sizes['max_cache_len']} tokens, {sizes['batch_size']} row(s)"
    rows = [("written to", str(path)), ("for", f"{to.value}: {what}, chunks of {sizes['chunk']}")]
    for name, text in rows + (report.rows() if report else []):
        table.add_row(name, Text(text))  # Text: values are data, brackets in them are no markup
    Console().print(table)
