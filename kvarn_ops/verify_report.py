"""What `kvarn-ops verify` says: its checks, the bounds they are held to, a table and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["CODE_BOUND", "OUTPUT_BOUND", "SCALE_BOUND", "Check", "Report", "as_dict", "summary"]

OUTPUT_BOUND = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # of the largest output
CODE_BOUND = 1e-4  # share of codes: rounding ties
SCALE_BOUND = 2e-3  # of the field's largest value; two units in the last place of fp16


@dataclass(frozen=True)
class Check:
    """One comparison. Errors are NaN if the backend raised, and `problem` says why it failed."""

    preset: str
    encoder: str
    head_dim: int
    case: str
    output_error: float
    code_mismatch: float
    passed: bool
    problem: str = ""


@dataclass(frozen=True)
class Report:
    """All checks of one run."""

    backend: str
    device: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed for check in self.checks)


def summary(report: Report) -> RenderableType:
    """Preset by case, the worst output error over head_dims in each cell, failures below."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(check.case for check in report.checks))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("largest error", style="bold")
    for name in names:
        table.add_column(name.replace(" ", "\n"), justify="right")
    kinds = list(dict.fromkeys((check.preset, check.encoder) for check in report.checks))
    for preset, encoder in kinds:
        cells = []
        for name in names:
            group = [
                check
                for check in report.checks
                if (check.preset, check.encoder, check.case) == (preset, encoder, name)
            ]
            if not group:
                cells.append(Text("-", style="dim"))
            elif all(check.passed for check in group):
                worst = max(check.output_error for check in group)
                cells.append(Text(f"{worst:.0e}", style="green"))
            else:
                cells.append(Text("FAIL", style="bold red"))
        table.add_row(f"{preset} {encoder}", *cells)
    failed = [check for check in report.checks if not check.passed]
    verdict = Text(
        f"\nbackend {report.backend} on {report.device}, against the reference on cpu: "
        f"{len(report.checks) - len(failed)} of {len(report.checks)} checks passed. "
        f"Bounds: outputs {OUTPUT_BOUND[torch.float32]:g} (bf16 "
        f"{OUTPUT_BOUND[torch.bfloat16]:g}), differing codes {CODE_BOUND:g}; largest share of "
        f"differing codes: {max((c.code_mismatch for c in report.checks), default=0.0):.1e}."
    )
    lines = [
        Text(
            f"FAIL {check.preset} {check.encoder}, head_dim {check.head_dim}, {check.case}: "
            f"{check.problem}",
            style="red",
        )
        for check in failed
    ]
    return Group(table, verdict, *lines)


def as_dict(report: Report) -> dict[str, Any]:
    """The report for JSON, where NaN is null."""
    checks = [
        {key: None if value != value else value for key, value in asdict(check).items()}
        for check in report.checks
    ]
    return {
        "backend": report.backend,
        "device": report.device,
        "passed": report.passed,
        "checks": checks,
    }
