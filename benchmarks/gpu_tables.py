"""What `gpu_check.py` prints at its end: the rows worth a look, then a line per stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvarn_ops.benchmark.results import measured

SHOWN = {
    "attention": ("preset", "q_heads", "kv_heads", "head_dim", "batch", "context", "kvarn_us",
                  "gb_per_s", "share_of_copy", "dense", "dense_us", "ratio", "error"),
    "encode": ("preset", "encoder", "head_dim", "batch", "context", "width", "append_us",
               "finish_us", "attention_us", "share", "step_us", "step_finish_us", "step_share",
               "error"),
    "correctness": ("preset", "head_dim", "lengths", "codes_differ", "scales", "step", "chunk",
                    "attention", "within", "error"),
    "model": ("measure", "cache", "form", "batch", "context", "layers", "tokens_per_s", "ratio",
              "ratio_to_dense", "value", "confirmed", "error"),
    "smallest": ("batch", "context", "settings", "splits", "us", "rule_us", "ratio", "error"),
}  # fmt: skip
MOST_ROWS = 16
MOST_WIDE = 60


def print_rows(out: Path, stages: Sequence[str]) -> None:
    """The first rows of each stage's file; of the sweep, the fastest ones."""
    for stage in stages:
        rows = measured(out / f"gpu_{stage}.csv") if stage in SHOWN else []
        if stage == "smallest":
            rows = sorted(rows, key=lambda row: -float(row["ratio"] or 0))[:8]
        if rows:
            print(
                f"\n{stage}" + f", the first {MOST_ROWS} of {len(rows)}" * (len(rows) > MOST_ROWS)
            )
            heads = [name for name in SHOWN[stage] if any(row[name] for row in rows)]
            print_table(heads, [[row[name] for name in heads] for row in rows[:MOST_ROWS]])


def print_summary(outcomes: Sequence[Any], dry: bool, out: Path) -> None:
    """A line per stage, what was left out, and what failed."""
    print("\nDRY RUN on a CPU: no number here says anything about a GPU." if dry else "")
    lines = [[o.stage, o.outcome, str(o.rows), f"{o.seconds:.0f}", str(len(o.left_out)),
              o.headline] for o in outcomes]  # fmt: skip
    print_table(["stage", "outcome", "rows", "seconds", "left out", "result"], lines, 200)
    for outcome in outcomes:
        if outcome.left_out:
            shown = "; ".join(outcome.left_out[:3])
            print(f"left out of {outcome.stage}: {len(outcome.left_out)} cases, first {shown}")
        for error in outcome.errors[:8]:
            print(f"! {outcome.stage}: {error}")
        if len(outcome.errors) > 8:
            print(f"! {outcome.stage}: and {len(outcome.errors) - 8} more")
    print(f"in {out.name}/: gpu_<stage>.csv, gpu_check.csv, gpu_check.log")


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], wide: int = MOST_WIDE) -> None:
    """Columns side by side, each as wide as it must be."""
    cut = [[text[:wide] for text in row] for row in (heads, *rows)]
    widths = [max(len(row[index]) for row in cut) for index in range(len(heads))]
    for row in cut:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
