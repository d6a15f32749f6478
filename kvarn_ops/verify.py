"""`kvarn-ops verify`: whether the backend that runs here computes what the reference computes.

Every check fills a cache with the reference encoder, copies it to the device, runs one fused step
(several when compiled) by the backend and by the reference on the CPU, and compares outputs and
everything that is stored afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import dispatch
from .config import KVarNConfig
from .errors import BackendError, reason
from .layout import CODE_FIELDS, SCALE_FIELDS, TileCache, unpack_codes
from .ops.samples import filled_cache
from .verify_report import (
    CODE_BOUND,
    OUTPUT_BOUND,
    SCALE_BOUND,
    Check,
    Report,
    as_dict,
    summary,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Check", "Report", "as_dict", "run_checks", "summary"]

_CONFIGS = (
    KVarNConfig(num_sink_tokens=32),
    KVarNConfig.from_preset("k2v2_g64", num_sink_tokens=32, tail_tokens=64),
    KVarNConfig.from_preset("k4v4_g32", num_sink_tokens=0),
    KVarNConfig.from_preset("k3v8_g32", num_sink_tokens=16),
    KVarNConfig.from_preset("k8v3_g64", num_sink_tokens=32, encoder="paper"),
)
_HEAD_DIMS = (64, 80, 128)
_COMPILED_STEPS = 3
_ROWS, _KV_HEADS, _Q_HEADS = 3, 2, 4


@dataclass(frozen=True)
class _Case:
    """Which step is taken; lengths and tokens in terms of sinks `s` and tile size `g`."""

    name: str
    lengths: Callable[[int, int], list[int]]
    tokens: Callable[[int], int]
    padded: bool = False
    softcap: float = 0.0
    sink_logits: bool = False
    dtype: torch.dtype = torch.float32


def _filled(s: int, g: int) -> list[int]:
    """Rows that the next token completes a tile of."""
    return [s + 3 * g - 1] * _ROWS


def _different(s: int, g: int) -> list[int]:
    return [s + 3 * g - 1, s + g + 7, 5]


_CASES = (
    _Case("decode", _filled, lambda g: 1),
    _Case("bf16 decode", _filled, lambda g: 1, dtype=torch.bfloat16),
    _Case("first prefill", lambda s, g: [0] * _ROWS, lambda g: 2 * g + 9),
    _Case("chunked prefill", lambda s, g: [s + g + 5] * _ROWS, lambda g: g + g // 2),
    _Case("ragged", _different, lambda g: g + 3, padded=True),
    _Case("softcap", _different, lambda g: 1, softcap=15.0),
    _Case("sink logits", _different, lambda g: 3, sink_logits=True),
)
_COMPILED = (
    (_CONFIGS[0], 64, _Case("compiled decode", _different, lambda g: 1)),
    (
        _CONFIGS[3],
        128,
        _Case("compiled decode", _filled, lambda g: 1, softcap=15.0, sink_logits=True),
    ),
)


def run_checks(backend: str, device: str | None, compile_too: bool, console: Console) -> Report:
    """Run all checks with a progress bar on `console`.

    Parameters
    ----------
    backend : str
        A name of `kvarn_ops.dispatch.BACKENDS`.
    device : str or None
        None: cuda if there is one, else cpu.
    compile_too : bool
        Also compile decode steps, which takes a compiler and most of the time.

    Raises
    ------
    BackendError
        If the backend or the device cannot be used here.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BackendError(f"device {device!r} cannot be used: {reason(error)}") from None
    resolved = dispatch.resolve(backend, device)
    plan = [(config, dim, case, False) for config, dim, case in
            itertools.product(_CONFIGS, _HEAD_DIMS, _CASES)]  # fmt: skip
    if compile_too:
        plan += [(*combination, True) for combination in _COMPILED]
    checks = []
    columns = TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console) as progress, torch.no_grad():
        bar = progress.add_task("verify", total=len(plan))
        for config, head_dim, case, compiled in plan:
            progress.update(bar, description=case.name)
            checks.append(_check(config, head_dim, case, compiled, resolved, device))
            progress.advance(bar)
        progress.update(bar, description="verify")
    return Report(resolved, device, tuple(checks))


def _check(
    config: KVarNConfig, head_dim: int, case: _Case, compiled: bool, backend: str, device: str
) -> Check:
    try:
        output, codes, problem = _compare(config, head_dim, case, compiled, backend, device)
    except Exception as error:  # whatever a backend raises is a finding, and the others go on
        output = codes = float("nan")
        problem = f"{type(error).__name__}: {reason(error, lines=3)}"
    return Check(
        config.preset, config.encoder, head_dim, case.name, output, codes, not problem, problem
    )


def _compare(
    config: KVarNConfig, head_dim: int, case: _Case, compiled: bool, backend: str, device: str
) -> tuple[float, float, str]:
    """Worst output error, share of differing codes, and what is wrong with them."""
    sinks, group = config.num_sink_tokens, config.group_size
    lengths, tokens = case.lengths(sinks, group), case.tokens(group)
    expected_cache, rotation = filled_cache(
        config,
        lengths,
        "cpu",
        num_kv_heads=_KV_HEADS,
        head_dim=head_dim,
        max_cache_len=max(lengths) + _COMPILED_STEPS * tokens,
        dtype=case.dtype,
    )
    cache = TileCache(*(tensor.to(device, copy=True) for tensor in expected_cache))
    step = _compiled_step() if compiled else torch.ops.kvarn.step_
    generator = torch.Generator().manual_seed(head_dim)
    output_error = 0.0
    for _ in range(_COMPILED_STEPS if compiled else 1):
        inputs = _inputs(case, head_dim, tokens, generator)
        sink_logits = torch.randn(_Q_HEADS, generator=generator) if case.sink_logits else None
        scalars = (head_dim**-0.5, case.softcap, True, config.to_string())
        expected = torch.ops.kvarn.step_(
            *inputs, *expected_cache, rotation, sink_logits, *scalars, "reference"
        )
        moved = [None if x is None else x.to(device) for x in (*inputs, rotation, sink_logits)]
        output = step(*moved[:4], *cache, *moved[4:], *scalars, backend)
        output_error = _worse(output_error, _relative_error(output, expected))
    problems = []
    if not output_error <= OUTPUT_BOUND[case.dtype]:
        problems.append(f"outputs differ by {output_error:.1e} of the largest")
    mismatch = 0.0
    for name, share in _stored_differences(cache, expected_cache, config, head_dim):
        bound = CODE_BOUND if name in CODE_FIELDS else SCALE_BOUND if name in SCALE_FIELDS else 0
        mismatch = _worse(mismatch, share) if name in CODE_FIELDS else mismatch
        if not share <= bound:
            problems.append(f"{name} differs by {share:.1e}")
    return output_error, mismatch, ", ".join(problems)


def _inputs(
    case: _Case, head_dim: int, tokens: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """New queries, keys, values `[B, H, S, D]` and, for padded cases, their validity `[B, S]`."""
    q, k, v = (
        torch.randn(_ROWS, heads, tokens, head_dim, generator=generator).to(case.dtype)
        for heads in (_Q_HEADS, _KV_HEADS, _KV_HEADS)
    )
    if not case.padded:
        return q, k, v, None
    padding = torch.tensor([0, tokens // 3, tokens])  # the last row gets nothing
    return q, k, v, torch.arange(tokens) >= padding[:, None]


def _stored_differences(
    cache: TileCache, expected: TileCache, config: KVarNConfig, head_dim: int
) -> Iterator[tuple[str, float]]:
    """By field: the share of codes that differ, or the largest relative error."""
    sizes = {
        "k_codes": (config.key_bits, head_dim),
        "v_codes": (config.value_bits, config.group_size),
    }
    for name, found, wanted in zip(TileCache._fields, cache, expected, strict=True):
        if name in sizes:
            a, b = (unpack_codes(packed.cpu(), *sizes[name]) for packed in (found, wanted))
            yield name, (a != b).double().mean().item()
        else:
            yield name, _relative_error(found, wanted)


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value; NaN if anything is not a number."""
    found, wanted = found.cpu().double(), wanted.double()
    if not wanted.numel():
        return 0.0
    scale = wanted.abs().amax().clamp_min(1e-30)
    return ((found - wanted).abs().amax() / scale).item()


def _worse(a: float, b: float) -> float:
    """The larger one; NaN, which is the worst, wins."""
    return b if not b <= a else a


def _compiled_step() -> Any:
    from .lowering.hooks import inductor_options

    # The pass makes Inductor's cache on disk depend on our sources: an old body would verify well.
    torch.compiler.reset()
    return torch.compile(
        lambda *args: torch.ops.kvarn.step_(*args), fullgraph=True, options=inductor_options()
    )
