"""`kvarn-ops tune`: measure launch settings on this GPU and keep the best.

Nothing else tunes: without a file a rule chooses (`kernels/heuristics.py`). One setting is varied
at a time, from the rule's value; a case is written as soon as it is measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from . import dispatch, kernel_tools
from .benchmark.decode_step import DecodeStep, Shape
from .benchmark.timing import Contender, Timing, alternate
from .config import KVarNConfig, parse_presets
from .errors import BackendError, InputError

__all__ = ["CANDIDATES", "tune", "tune_named"]

CANDIDATES: dict[str, tuple[int, ...]] = {
    "warps": (1, 2, 4, 8),
    "stages": (1, 2, 3),
    "programs_per_sm": (1, 2, 3, 4, 6, 8, 12),
    "block_tokens": (16, 32, 64),
}
_BETTER = 0.98  # of the time before: less is noise


def tune(
    configs: Sequence[KVarNConfig],
    head_dims: Sequence[int],
    heads: str,
    problems: Sequence[tuple[int, int]],
    device: torch.device,
    rounds: int = 20,
    out: Path | None = None,
    on_trial: Callable[[str], None] = lambda name: None,
) -> Path:
    """Measure decode attention under other settings.

    Parameters
    ----------
    configs, head_dims
        A case is a config with a head_dim; other configs keep the rule.
    heads : str
        Query heads / KV heads, for example `32/8`.
    problems : sequence of (batch, context)
        The best setting has the least product of times over these.
    out : Path, optional
        Folder of the file; default: where the kernels look for it.
    on_trial : callable
        Called with a description before each measurement.

    Returns
    -------
    Path
        The file, which other cases of an earlier run stay in.

    Raises
    ------
    BackendError
        If kernels cannot run on this device.
    """
    if dispatch.resolve("triton", device) != "triton":
        raise BackendError("there is nothing to tune without Triton kernels.")
    path = kernel_tools.tuning_path(device, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {}
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
    for config in configs:
        for head_dim in head_dims:
            steps = [
                DecodeStep(config, Shape.parse(batch, heads, head_dim), context, device, _eager)
                for batch, context in problems
            ]
            ratio = steps[0].shape.q_heads // steps[0].shape.kv_heads
            name = kernel_tools.attend_key(config, head_dim, ratio)
            settings[name] = _best(name, steps, rounds, device, on_trial)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            part.replace(path)
    kernel_tools.forget_tuning()
    return path


def tune_named(
    presets: str,
    head_dims: str,
    heads: str,
    batches: str,
    contexts: str,
    rounds: int,
    out: Path | None,
    device: str,
) -> Path:
    """`tune` with lists as a command line gives them, with commas; shows a progress bar.

    Raises
    ------
    InputError, ConfigError
        If a list cannot be read.
    """
    from tqdm import tqdm

    configs = list(parse_presets(presets, "--presets").values())
    dims = _integers(head_dims, "--head-dims")
    problems = list(product(_integers(batches, "--batches"), _integers(contexts, "--contexts")))
    trials = 1 + sum(len(values) for values in CANDIDATES.values())
    with tqdm(total=len(configs) * len(dims) * trials, unit="setting") as bar:

        def advance(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        return tune(configs, dims, heads, problems, torch.device(device), rounds, out, advance)


def _integers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text!r}: give integers with commas.") from None


def _eager(*arguments: Any) -> torch.Tensor:
    return torch.ops.kvarn.step_(*arguments)


def _best(
    name: str,
    steps: list[DecodeStep],
    rounds: int,
    device: torch.device,
    on_trial: Callable[[str], None],
) -> dict[str, int]:
    """One setting after the other, each from the best so far."""

    def score(candidate: dict[str, int]) -> float:
        on_trial(f"{name} {candidate}")
        with kernel_tools.trying(candidate):
            times = [_time(step, rounds, device) for step in steps]
        return math.prod(times) ** (1 / len(times))

    chosen: dict[str, int] = {}
    least = score(chosen)
    for key, values in CANDIDATES.items():
        for value in values:
            candidate = chosen | {key: value}
            try:
                found = score(candidate)
            except Exception as error:  # a setting that does not fit the device is no candidate
                if isinstance(error, KeyboardInterrupt):
                    raise
                continue
            if found < _BETTER * least:
                chosen, least = candidate, found
    return chosen


def _time(step: DecodeStep, rounds: int, device: torch.device) -> float:
    def back() -> None:
        step.cache.seq_lens.fill_(step.context)

    contender = Contender(lambda: step.step("triton"), back)
    seconds = alternate({"step": contender}, rounds, device)["step"]
    return Timing.of(seconds).median
