"""Files that exports write: whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvarn_ops.errors import InputError

__all__ = ["check_place", "written"]


def check_place(path: str | os.PathLike[str], suffix: str | None = None) -> Path:
    """The path as a file that can be written; said before minutes of work and not after them.

    Raises
    ------
    InputError
        If it is a folder, its folder does not exist, or the suffix is another.
    """
    target = Path(path)
    if suffix is not None and target.suffix != suffix:
        raise InputError(f"{target} does not end in {suffix}: give the file that name.")
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f"{target} cannot be written: give a file name in a folder that exists.")
    return target


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """A path of the same name in a hidden folder; all files of that folder are then moved.

    If the block fails, what was at `target` stays.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        yield Path(folder) / target.name
        # The file itself last: with it, the others are there.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name):
            os.replace(file, target.parent / file.name)
