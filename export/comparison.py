"""`compare`: what was exported against the model it was made from, on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kvarn_ops.config import KVarNConfig
from kvarn_ops.errors import InputError

from .stages import stage
from .step_model import StepModel, stored

__all__ = ["Comparison", "compare"]

_DECODED = 32  # tokens given one by one
_NUMPY = {
    "tensor(int64)": "int64", "tensor(uint8)": "uint8", "tensor(float16)": "float16",
    "tensor(float)": "float32", "tensor(double)": "float64",
}  # fmt: skip

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Comparison:
    """An exported program beside the patched model in eager mode; `str` gives a table.

    Attributes
    ----------
    tokens : int
        How many random tokens both were given.
    quantized_tokens : int
        How many of them were in quantized tiles at the end.
    file_bytes : int or None
        Size of the file, with weights; None if there is none.
    cache_bytes, dense_bytes : int
        Of the packed cache, all layers, and of a dense one for as many tokens.
    step_ms, eager_step_ms : float
        Median time of one new token.
    max_difference, largest_logit : float
        Between the logits, and what to hold it against.
    same_tokens : float
        Share of positions at which the most probable token is the same.
    """

    tokens: int
    quantized_tokens: int
    file_bytes: int | None
    cache_bytes: int
    dense_bytes: int
    step_ms: float
    eager_step_ms: float
    max_difference: float
    largest_logit: float
    same_tokens: float

    def rows(self) -> list[tuple[str, str]]:
        """The table, line by line."""
        size = "-" if self.file_bytes is None else _size(self.file_bytes)
        ratio = self.dense_bytes / self.cache_bytes
        return [
            ("size", size),
            ("cache", f"{_size(self.cache_bytes)}, {ratio:.1f} times less than a dense one"),
            ("one new token", f"{self.step_ms:.2f} ms (eager mode: {self.eager_step_ms:.2f} ms)"),
            (
                "largest difference of logits",
                f"{self.max_difference:.2g} (largest logit: {self.largest_logit:.3g})",
            ),
            ("same most probable token", f"{100 * self.same_tokens:.1f} %"),
            ("compared", f"{self.tokens} random tokens, {self.quantized_tokens} of them quantized"),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def compare(
    model: nn.Module,
    exported: str | os.PathLike[str] | ExportedProgram | Step,
    *,
    max_cache_len: int,
    batch_size: int = 1,
    chunk: int = 256,
) -> Comparison:
    """Run what was exported and the model on the same random tokens.

    A prompt in chunks, then 32 tokens one by one; some tiles of tokens, if the cache holds as many.

    Parameters
    ----------
    model : nn.Module
        The patched model that was exported.
    exported : path, ExportedProgram or callable
        A file of `to_onnx` (`.onnx`), `aot_compile` or `torch.export.save` (`.pt2`); what
        `export_program` returned; or a function of `input_ids` that keeps its own cache, empty now.
    max_cache_len, batch_size, chunk : int
        As in the export.

    Raises
    ------
    InputError
        If the file does not exist or is none of these.
    ImportError
        If onnxruntime is missing, for ONNX.

    Examples
    --------
    >>> kvarn_ops.export.to_onnx(model, "model.onnx", max_cache_len=4096)
    >>> print(kvarn_ops.export.compare(model, "model.onnx", max_cache_len=4096))
    """
    eager = StepModel(model, max_cache_len, batch_size, windows=True)
    config: KVarNConfig = eager.kvarn_config
    ids = _random_ids(model, batch_size, _length(config, max_cache_len))
    step, file_bytes = _opened(exported, batch_size)
    chunk = min(chunk, max_cache_len)
    total = 2 * (ids.shape[1] - _prefill(ids) + -(-_prefill(ids) // chunk))
    with stage("Comparing with eager mode", total) as advance, torch.no_grad():
        got, step_ms = _run(step, ids, chunk, advance)
        wanted, eager_ms = _run(eager, ids, chunk, advance)
    difference = (got - wanted).abs().max()
    return Comparison(
        tokens=ids.shape[1],
        quantized_tokens=config.num_tiles(ids.shape[1]) * config.group_size,
        file_bytes=file_bytes,
        cache_bytes=eager.cache.memory()["total"],
        dense_bytes=_dense_bytes(eager),
        step_ms=step_ms,
        eager_step_ms=eager_ms,
        max_difference=float(difference),
        largest_logit=float(wanted.abs().max()),
        same_tokens=float((got.argmax(-1) == wanted.argmax(-1)).double().mean()),
    )


def _length(config: KVarNConfig, max_cache_len: int) -> int:
    """Tokens that fill sinks, tail and two tiles and some more, as far as they fit."""
    wanted = config.num_sink_tokens + config.tail_tokens + 2 * config.group_size + _DECODED
    return min(wanted, max_cache_len)


def _prefill(ids: Tensor) -> int:
    return max(ids.shape[1] - _DECODED, 1)


def _random_ids(model: Any, rows: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (rows, count), generator=generator)
    return ids.to(next(model.parameters()).device)


def _run(step: Step, ids: Tensor, chunk: int, advance: Callable[[], None]) -> tuple[Tensor, float]:
    """Logits `[B, n, vocabulary]` in fp64 on the CPU, and milliseconds of a token."""
    start = _prefill(ids)
    parts = [ids[:, i : min(i + chunk, start)] for i in range(0, start, chunk)]
    parts += [ids[:, i : i + 1] for i in range(start, ids.shape[1])]
    logits, times = [], []
    for part in parts:
        before = time.perf_counter()
        out = step(part.contiguous())
        logits.append(out.double().cpu())  # waits for a GPU, too
        times.append(time.perf_counter() - before)
        advance()
    return torch.cat(logits, 1), 1000 * median(times[-_DECODED:])


def _dense_bytes(step: StepModel) -> int:
    held = [stored(layer) for layer in step.cache.layers]
    keys = [x["k_tail"] if "k_tail" in x else x["keys"] for x in held]  # [B, H, n, D]
    one = sum(2 * x[0, :, 0].numel() * x.element_size() for x in keys)
    return one * step.batch_size * step.max_cache_len


def _opened(exported: Any, batch_size: int) -> tuple[Step, int | None]:
    """As a function of `input_ids`, and the size of its files."""
    if isinstance(exported, ExportedProgram):
        return exported.module(), None
    if callable(exported):
        return exported, None
    path = Path(exported)
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a file that an export has written.")
    size = path.stat().st_size
    if path.suffix == ".onnx":
        weights = path.with_name(path.name + ".data")
        size += weights.stat().st_size if weights.is_file() else 0
        return _onnx_step(path, batch_size), size
    if path.suffix != ".pt2":
        raise InputError(f"{path} is neither .onnx nor .pt2: give what an export has written.")
    if _is_package(path):
        return torch._inductor.aoti_load_package(str(path)), size
    return torch.export.load(str(path)).module(), size


def _is_package(path: Path) -> bool:
    """Whether it is AOTInductor's: both kinds are archives with the same ending."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        return any("aotinductor" in name for name in archive.namelist())


def _onnx_step(path: Path, batch_size: int) -> Step:
    """Onnxruntime with the cache between calls."""
    import numpy
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    names = [value.name for value in session.get_outputs()]
    masked = any(value.name == "attention_mask" for value in session.get_inputs())
    past: dict[str, Any] = {
        value.name: numpy.zeros((batch_size, *value.shape[1:]), _NUMPY[value.type])
        for value in session.get_inputs()
        if value.name.startswith("past.")
    }

    def step(ids: Tensor) -> Tensor:
        given = {"input_ids": ids.cpu().numpy(), **past}
        if masked:
            given["attention_mask"] = numpy.ones_like(given["input_ids"])
        results = dict(zip(names, session.run(None, given), strict=True))
        for name in past:
            past[name] = results["present." + name.removeprefix("past.")]
        return torch.from_numpy(results["logits"])

    return step


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
