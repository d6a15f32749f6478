"""Options of an evaluation, as the command line gives them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import kvarn_ops

from ..config import KVarNConfig
from ..errors import InputError
from .methods import DEFAULT_METHODS

__all__ = ["Options", "chosen", "make_options"]

_PSEUDO_BLOCK = 16
_CONTEXT, _QUICK_CONTEXT = 4096, 2048


@dataclass(frozen=True)
class Options:
    """What the command line was given; None means that the evaluation chooses."""

    out: Path
    model: Path | None = None
    text: Path | None = None
    tasks: str | None = None
    methods: str = DEFAULT_METHODS
    presets: str = "k2v2,k3v2,k3v3,k4v2,k4v4"
    protocols: str | None = None  # all of them
    context: int | None = None
    windows: int = 8
    batch: int = 8
    samples: int = 64
    placements: int = 5
    block: int = _PSEUDO_BLOCK
    sinks: int | None = None
    tail: int = 0
    seed: int = 0
    data: Path | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    allow_code: bool = False
    peers: str = ""
    quick: bool = False
    device: str | None = None
    dtype: str | None = None

    def settings(self) -> dict[str, Any]:
        """What decides the numbers; stored with the results."""
        values = {name: value for name, value in vars(self).items() if name != "out"}
        return {
            # By name: the same folder is the same data wherever it lies (`checks.fingerprint`).
            name: value.resolve().name if isinstance(value, Path) else value
            for name, value in values.items()
        } | {"kvarn_ops": kvarn_ops.__version__}

    def adjusted(self, presets: dict[str, KVarNConfig]) -> dict[str, KVarNConfig]:
        """Presets with the sinks and the tail that were asked for."""
        changes: dict[str, int] = {"tail_tokens": self.tail}
        if self.sinks is not None:
            changes["num_sink_tokens"] = self.sinks
        return {name: replace(config, **changes) for name, config in presets.items()}

    def context_for(self, longest: int | None) -> int:
        """Tokens per window for a model that knows `longest` positions (None: any number)."""
        default = _QUICK_CONTEXT if self.quick else _CONTEXT
        return self.context or min(default, longest or default)

    def placed(self) -> tuple[str, str]:
        """Device and dtype."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        # 16-bit rounding would hide what 4 bits do; large models may only fit in their own dtype.
        return device, self.dtype or ("float32" if device == "cpu" else "auto")

    def data_of(self, task: str) -> Path:
        """The file or folder of a benchmark in `data`: `<task>`, `<task>.jsonl`, ...

        Raises
        ------
        InputError
            If there is not exactly one.
        """
        if self.data is None:
            raise InputError(
                f"{task} needs a local copy of its questions: give a folder with {task}.jsonl in "
                "it with --data DIR."
            )
        found = [path for path in self.data.glob(f"{task}*") if path.name.split(".")[0] == task]
        if len(found) != 1:
            raise InputError(
                f"--data {str(self.data)!r} holds {len(found) or 'no'} files or folders named "
                f"{task}: put one {task}.jsonl there."
            )
        return found[0]


_QUICK: dict[str, Any] = {
    "quick": True,
    "presets": "k2v2,k4v2",
    "protocols": "pseudo,prefill",
    "windows": 4,
    "block": 64,
    "placements": 1,
}


def make_options(out: Path, quick: bool, given: dict[str, Any]) -> Options:
    """Options from what was given on the command line; None is not given.

    `quick` replaces defaults, not what was given. With a model of one's own, outlier variants are
    made only if they are asked for.
    """
    defaults = _QUICK if quick else {}
    if given.get("model") is not None:
        defaults = defaults | {"placements": 0, "protocols": "decode,pseudo"}
    chosen = {name: value for name, value in given.items() if value is not None}
    return Options(out=out, **(defaults | chosen))


def chosen(text: str, known: tuple[str, ...], option: str) -> list[str]:
    """Names with commas, all of them known, at least one."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise InputError(f"{option} {name}: choose of {', '.join(known)}.")
    if not names:
        raise InputError(f"{option} is empty: choose of {', '.join(known)}.")
    return names
