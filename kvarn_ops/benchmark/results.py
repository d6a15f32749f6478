"""CSV files of measurements: a row per measurement, each with the conditions it was made under."""

from __future__ import annotations

import csv
import os
import shlex
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..tables import write_rows

__all__ = ["CONDITIONS", "ResultFile", "conditions", "measured", "read_rows"]

# What rows of one comparison must share; a resumed run skips only rows that were made like it.
CONDITIONS = ("device", "threads", "torch", "transformers", "kvarn_ops")


def conditions(device: torch.device, threads: int) -> dict[str, str]:
    """Where and how a measurement was made, as columns."""
    from ..env import environment

    values = environment()
    kind = "devices" if device.type == "cuda" else "cpu"
    program = Path(sys.argv[0]).name
    return {
        "device": values[kind],
        "threads": str(threads),
        "torch": values["torch"],
        "transformers": values["transformers"],
        "kvarn_ops": values["kvarn_ops"],
        "load": f"{_load():.2f}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "command": shlex.join([program, *(_without_folder(word) for word in sys.argv[1:])]),
    }


def _without_folder(word: str) -> str:
    """Where a file was written on this machine is nobody's business."""
    return Path(word).name if Path(word).is_absolute() else word


def _load() -> float:
    """Processes that wanted to run in the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


class ResultFile:
    """A CSV file that grows by a row at a time, so that a run that is stopped loses nothing.

    Parameters
    ----------
    path : Path
        Its folder is made.
    keys : iterable of str
        Columns that name a measurement.
    resume : bool
        Keep the rows that are there; False starts an empty file.
    """

    def __init__(self, path: Path, keys: Iterable[str], resume: bool = False) -> None:
        self.path = path
        self._keys = tuple(keys)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the folder {str(path.parent)!r} cannot be made: {error}") from None
        self.rows: list[dict[str, str]] = []
        if resume and path.is_file():
            self.rows = read_rows(path)
        else:
            path.unlink(missing_ok=True)

    def has(self, row: dict[str, Any]) -> bool:
        """Whether a row with these keys, made under these conditions, is there."""
        names = [name for name in (*self._keys, *CONDITIONS) if name in row]
        wanted = [str(row[name]) for name in names]
        return any([known.get(name) for name in names] == wanted for known in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row now; one with the same keys and conditions is replaced."""
        text = {name: str(value) for name, value in row.items()}
        if self.rows and list(self.rows[0]) != list(text):
            raise InputError(
                f"{str(self.path)!r} has other columns than this version writes: start a new file "
                "(without --resume)."
            )
        names = [name for name in (*self._keys, *CONDITIONS) if name in text]
        same = [text[name] for name in names]
        kept = [known for known in self.rows if [known[name] for name in names] != same]
        self.rows = [*kept, text]
        write_rows(self.path, self.rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; lines that begin with # are comments."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    return list(csv.DictReader(lines))


def measured(path: Path) -> list[dict[str, str]]:
    """Rows of a result file; none if there is no file, or one that an older version wrote."""
    if not path.is_file():
        return []
    rows = read_rows(path)
    described = "#" in path.read_text(encoding="utf-8")[:1]  # conditions stand above the rows
    if not rows or not (described or set(CONDITIONS) <= set(rows[0])):
        return []
    return rows
