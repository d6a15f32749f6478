"""Versions that are tried together, the CSV of what came out, and the README's table of it.

`versions.py` tries them. Standard library only.
"""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "versions.csv"
README = ROOT / "README.md"
BEGIN, END = "<!-- versions: begin -->", "<!-- versions: end -->"


@dataclass(frozen=True)
class Combination:
    """Versions that are tried together."""

    python: str
    torch: str
    transformers: str

    @property
    def name(self) -> str:
        """What `--only` is compared with; also the name of the environment."""
        return f"py{self.python}-torch{self.torch}-transformers{self.transformers}"


COMBINATIONS = (
    Combination("3.10", "2.11.0", "5.17.0"),
    Combination("3.12", "2.11.0", "5.17.0"),
    Combination("3.12", "2.12.1", "5.20.2"),
    Combination("3.11", "2.13.0", "5.23.0"),
    Combination("3.13", "2.13.0", "5.23.0"),
    Combination("3.11", "2.13.0", "4.57.6"),
    Combination("3.11", "2.13.0", "5.0.0"),
    Combination("3.11", "2.13.0", "5.18.0"),
    Combination("3.11", "2.13.0", "5.22.2"),
)


@dataclass(frozen=True)
class Row:
    """One line of the CSV: the versions that were really installed, and what the tests said."""

    combination: str
    python: str
    torch: str
    transformers: str
    passed: int
    failed: int
    skipped: int
    minutes: float
    date: str
    commit: str
    platform: str


def read_rows(path: Path = RESULTS) -> list[Row]:
    """Rows of the CSV; an empty list if there is no CSV."""
    if not path.exists():
        return []
    kinds = {"passed": int, "failed": int, "skipped": int, "minutes": float}
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [
        Row(**{name: kinds.get(name, str)(value) for name, value in line.items()}) for line in lines
    ]


def in_order(rows: list[Row]) -> list[Row]:
    """Rows in the order of `COMBINATIONS`, without those of combinations that are gone."""
    place = {combination.name: number for number, combination in enumerate(COMBINATIONS)}
    known = [row for row in rows if row.combination in place]
    return sorted(known, key=lambda row: place[row.combination])


def as_csv(rows: list[Row]) -> str:
    """The CSV's text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def as_table(rows: list[Row]) -> str:
    """The README's table, markers included."""
    lines = [
        BEGIN,
        "| Python | torch | transformers | passed | failed | skipped | date |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        python = ".".join(row.python.split(".")[:2])
        cells = (python, row.torch, row.transformers)
        counts = (row.passed, row.failed, row.skipped, row.date)
        lines.append("| " + " | ".join(str(cell) for cell in (*cells, *counts)) + " |")
    return "\n".join([*lines, END])


def with_table(readme: str, rows: list[Row]) -> str:
    """The README with its table drawn again."""
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"README.md lacks the markers {BEGIN} and {END}.")
    return before + as_table(rows) + after
