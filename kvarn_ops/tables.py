"""What the tables of the package have in common: `value ± error`, and files of commented CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["with_error", "write_rows"]


def with_error(value: float, error: float, digits: int = 2, signed: bool = False) -> str:
    """`1.23 ± 0.04`; without the error if there is none (NaN)."""
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{digits}f}"


def write_rows(
    path: Path, rows: Sequence[Mapping[str, Any]], header: Mapping[str, str] | None = None
) -> None:
    """Write rows (at least one) after comment lines that describe the run."""
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        for key, value in (header or {}).items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)  # at once: a reader never sees half a file
