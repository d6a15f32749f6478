"""The command `kvarn-ops bench`: options become cases, rows become a table and a picture."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import DEFAULT_PRESET, KVarNConfig, parse_presets
from ..errors import InputError
from .decode_step import Shape
from .plots import plot_decode_attention
from .results import ResultFile
from .run import KEYS, Case, Difference, check_device, run_cases

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Options", "run_bench"]


@dataclass(frozen=True)
class Options:
    """What the command line was given; None means that the command chooses."""

    model: Path | None = None
    heads: str = "16/4"
    head_dim: int = 128
    contexts: str = "1024,4096,16384"
    batch: int = 1
    presets: str = "k4v2"
    refcheck: bool = False
    out: Path = Path("bench_output")
    rounds: int = 15
    threads: int | None = None
    device: str | None = None


def run_bench(
    options: Options, console: Console
) -> tuple[list[dict[str, str]], list[Difference], Path]:
    """Measure; returns the rows, what `refcheck` found, and the CSV file."""
    importlib.import_module("matplotlib")  # if it is missing: said now, not after minutes
    device = check_device(options.device)
    if options.threads is not None:
        if options.threads < 1:
            raise InputError(f"--threads {options.threads}: give at least 1.")
        torch.set_num_threads(options.threads)
    shape = _shape(options)
    cases = [
        Case(preset, shape, context)
        for preset in parse_presets(options.presets, "--presets")
        for context in _numbers(options.contexts)
    ]
    results = ResultFile(options.out / "decode_attention.csv", KEYS)
    differences = run_cases(
        cases,
        results,
        device=device,
        rounds=options.rounds,
        refcheck=options.refcheck,
        console=console,
    )
    if results.rows:
        plot_decode_attention(options.out / "decode_attention.png", results.rows)
    return results.rows, differences, results.path


def _shape(options: Options) -> Shape:
    if options.model is None:
        return Shape.parse(options.batch, options.heads, options.head_dim)
    from ..hf.footprint import layer_shapes
    from ..hf.inspection import inspect_model
    from ..hf.model_dir import open_model_dir

    model = open_model_dir(options.model).model
    reports = inspect_model(model, KVarNConfig.from_preset(DEFAULT_PRESET))
    packed = [report.index for report in reports if report.packed]
    if not packed:
        raise InputError(f"no layer of {str(options.model)!r} would be packed: nothing to measure.")
    q_heads = model.config.get_text_config(decoder=True).num_attention_heads
    layer = layer_shapes(model)[packed[0]]
    return Shape.parse(options.batch, f"{q_heads}/{layer.num_kv_heads}", layer.head_dim)


def _numbers(text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise InputError(f"--contexts {text}: give numbers of tokens, with commas.")
    return numbers
