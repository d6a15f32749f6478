"""`kvarn-ops bench` from options to files: check everything, measure row by row, report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import KVarNConfig
from ..errors import BackendError, InputError, KVarNError, reason
from ..hadamard import check_head_dim
from .decode_step import (
    CONTENDERS,
    DENSE,
    DENSE_PACKED,
    KVARN,
    OUTPUT_BOUND,
    DecodeStep,
    Shape,
    compiled_step,
)
from .results import ResultFile, conditions
from .timing import Timing, alternate, noise

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["KEYS", "Case", "Difference", "check_device", "measure", "run_cases", "table"]

KEYS = ("preset", "batch", "q_heads", "kv_heads", "head_dim", "context")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    preset: str
    shape: Shape
    context: int

    @property
    def keys(self) -> dict[str, Any]:
        """Its columns in the CSV."""
        return {"preset": self.preset, **vars(self.shape), "context": self.context}


@dataclass(frozen=True)
class Difference:
    """A contender whose output is not what the reference says."""

    case: Case
    contender: str
    error: float

    def __str__(self) -> str:
        return (
            f"{self.case.preset}, {self.case.shape}, {self.case.context} tokens: {self.contender} "
            f"differs by {self.error:.1e} of the largest output (bound {OUTPUT_BOUND:g})"
        )


def check_device(name: str | None) -> torch.device:
    """The device of that name; None is cuda if there is one, else the CPU."""
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used: {reason(error)}") from None
    return torch.device(device)


def run_cases(
    cases: list[Case],
    results: ResultFile,
    *,
    device: torch.device,
    rounds: int,
    refcheck: bool,
    console: Console,
) -> list[Difference]:
    """Measure every case that the file does not have yet; a row is written as soon as it is known.

    Returns
    -------
    list of Difference
        What `refcheck` found. Cases with a difference are not timed.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if rounds < 1:
        raise InputError(f"--rounds {rounds}: give at least 1.")
    for case in cases:
        KVarNConfig.from_preset(case.preset)
        check_head_dim(case.shape.head_dim)
        if case.context < 1:
            raise InputError(f"--contexts {case.context}: give numbers of tokens.")
    around = conditions(device, torch.get_num_threads())
    differences: list[Difference] = []
    columns = TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn()
    compiled: Callable[..., Tensor] | None = None
    last: tuple[str, Shape] | None = None
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress, torch.no_grad():
        bar = progress.add_task("bench", total=len(cases))
        for case in cases:
            progress.update(bar, description=f"{case.preset}, {case.shape}, {case.context}")
            if not results.has(case.keys | around):
                if compiled is None or last != (case.preset, case.shape):
                    torch.compiler.reset()  # code for other sizes would count as recompilation
                    compiled, last = compiled_step(), (case.preset, case.shape)
                row, found = measure(case, compiled, rounds, device, refcheck)
                differences += found
                if not found:
                    results.add(case.keys | row | around)
                    if not console.is_terminal:  # where no bar moves, a line per row
                        console.print(_line(case, row), markup=False, highlight=False)
            progress.advance(bar)
    return differences


def measure(
    case: Case,
    compiled: Callable[..., Tensor],
    rounds: int,
    device: torch.device,
    refcheck: bool,
) -> tuple[dict[str, Any], list[Difference]]:
    """The columns of one row, and what `refcheck` found."""
    config = KVarNConfig.from_preset(case.preset)
    step = DecodeStep(config, case.shape, case.context, device, compiled)
    try:
        worst: float | str = ""
        if refcheck:
            errors = step.errors(step.expected())
            found = [Difference(case, name, error) for name, error in errors.items()
                     if not error <= OUTPUT_BOUND]  # fmt: skip
            if found:
                return {}, found
            worst = f"{max(errors.values()):.1e}"
        seconds = alternate(step.contenders(), rounds, device)
    except KVarNError:
        raise
    except RuntimeError as error:  # Dynamo's and Inductor's errors are subclasses
        raise BackendError(
            f"the step of {case.preset}, {case.shape} does not run: {reason(error, lines=2)} "
            "On a CPU torch.compile needs a C++ compiler, which `kvarn-ops env` shows."
        ) from error
    timings = {name: Timing.of(values) for name, values in seconds.items()}
    row: dict[str, Any] = {}
    for name, timing in timings.items():
        row[f"{name}_ms"] = f"{timing.median:.4g}"
        row[f"{name}_min_ms"] = f"{timing.minimum:.4g}"
    kvarn = timings[KVARN].median
    row["speedup"] = f"{timings[DENSE].median / kvarn:.4g}"
    row["speedup_over_packed_gqa"] = f"{timings[DENSE_PACKED].median / kvarn:.4g}"
    row["spread"] = f"{max(timing.spread for timing in timings.values()):.3f}"
    row["rounds"] = str(rounds)
    dense_bytes, kvarn_bytes = step.bytes()
    row["dense_bytes"], row["kvarn_bytes"] = str(dense_bytes), str(kvarn_bytes)
    row["largest_error"] = worst
    return row, []


def _line(case: Case, row: dict[str, Any]) -> str:
    return (
        f"{case.preset}, {case.shape}, {case.context} tokens: {row['kvarn_compiled_ms']} ms, "
        f"dense {row['dense_bf16_ms']} ms"
    )


def table(rows: list[dict[str, str]]) -> RenderableType:
    """Milliseconds and ratios; above 1 KVarN is faster."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    sheet = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    sheet.add_column("preset")
    sheet.add_column("batch × heads × head_dim")
    for head in (
        "tokens", "KVarN ms", "eager ms", "dense ms", "packed GQA ms", "ratio", "to packed",
        "cache",
    ):  # fmt: skip
        sheet.add_column(head, justify="right")
    for row in rows:
        shape = Shape(*(int(row[name]) for name in KEYS[1:5]))
        ratio = float(row["speedup"])
        sheet.add_row(
            row["preset"],
            str(shape),
            row["context"],
            *(f"{float(row[f'{name}_ms']):.3f}" for name in CONTENDERS),
            Text(f"{ratio:.2f}", style="green" if ratio >= 1 else "red"),
            f"{float(row['speedup_over_packed_gqa']):.2f}",
            f"{int(row['dense_bytes']) / int(row['kvarn_bytes']):.2f}×",
        )
    parts: list[Any] = [
        sheet,
        Text(
            "ms: median of one decode step of one layer. ratio: dense over KVarN, above 1 KVarN is "
            "faster. cache: dense bytes over KVarN bytes.",
            style="dim",
        ),
    ]
    if rows:
        parts.append(Text(f"load when it began: {rows[-1]['load']}", style="dim"))
        spreads = {f"{row['context']} tokens": float(row["spread"]) for row in rows}
        if warning := noise(spreads):
            parts.append(Text(f"! {warning}", style="yellow"))
    return Group(*parts)
