"""Finished pieces of an evaluation on disk, so that a run that was killed continues.

A piece is what one method does to one batch of one task. Each is a safetensors file, written beside
its place and then moved there: a reader sees a whole piece or none. What decides the numbers
is stored in `run.json`; a folder that holds another run is refused, never mixed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError

__all__ = ["Store"]

_SETTINGS = "run.json"
_PIECES = "pieces"


class Store:
    """The folder of one run.

    Parameters
    ----------
    out : Path
        The folder; `open` makes it.
    settings : dict
        What decides the numbers, as JSON values.

    Raises
    ------
    InputError
        If the folder holds a run with other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.out = out
        self._settings = settings = json.loads(json.dumps(settings))
        path = out / _SETTINGS
        try:
            known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except (OSError, ValueError) as error:
            raise InputError(f"the folder {str(out)!r} cannot be used: {error}") from None
        if known is not None and known != settings:
            names = sorted(
                name for name in {*known, *settings} if known.get(name) != settings.get(name)
            )
            raise InputError(
                f"{str(out)!r} holds a run with another {', '.join(names)}: continue it with the "
                "options it was started with, or give another --out."
            )

    def open(self) -> None:
        """Make the folder and say in it what run it holds."""
        part = self.out / f"{_SETTINGS}.part"
        try:
            (self.out / _PIECES).mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self._settings, indent=2) + "\n", encoding="utf-8")
            part.replace(self.out / _SETTINGS)
        except OSError as error:
            raise InputError(f"the folder {str(self.out)!r} cannot be made: {error}") from None

    def get(self, key: str) -> dict[str, Tensor] | None:
        """A finished piece, or None. A damaged file counts as not finished."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError):
            path.unlink()
            return None

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Store a piece; it is there from now on, or not at all."""
        path = self._path(key)
        part = path.with_suffix(".part")
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, part)
        part.replace(path)

    def _path(self, key: str) -> Path:
        return self.out / _PIECES / f"{key}.safetensors"
