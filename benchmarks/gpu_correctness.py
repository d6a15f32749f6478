"""Stage `correctness`: kernels against the reference on the same device, a handful of shapes.

Two caches get the same random tokens, one by kernels and one by the reference. `codes_differ` is
the share of bytes of codes that differ, `scales` the largest difference of a scale over its size,
`step` and `chunk` the relative error of the output of `kvarn::step_` for one token and for several,
`attention` that of the cache alone. Long caches hold random codes: only attention is compared. The
tests of `tests/kernels` cover more; these are real sizes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from gpu_caches import fill_randomly
from gpu_stage import Stage
from torch import Tensor

from kvarn_ops import KVarNConfig
from kvarn_ops.benchmark.decode_step import Shape
from kvarn_ops.hadamard import hadamard
from kvarn_ops.layout import CODE_FIELDS, SCALE_FIELDS, TileCache, allocate

KEYS = ("preset", "q_heads", "kv_heads", "head_dim", "lengths")
COLUMNS = ("codes_differ", "scales", "step", "chunk", "attention", "within", "error")
# bfloat16 outputs round to 4e-3; equal up to ties and the last bit of fp16.
BOUNDS = {"codes_differ": 1e-3, "scales": 5e-3, "step": 1e-2, "chunk": 1e-2, "attention": 1e-2}
CHUNK = 17
K = 1024


class Case(NamedTuple):
    """One row of the table."""

    config: KVarNConfig
    shape: Shape
    lengths: list[int]
    encoded: bool


def cases(dry: bool) -> list[tuple[dict[str, Any], Case]]:
    """What is compared, with the columns that name it."""
    listed: list[tuple[str, str, int, list[int]]] = [
        ("k4v2", "32/8", 128, [767, 300]), ("k2v2", "32/8", 128, [767, 300]),
        ("k4v2", "32/8", 128, [16 * K, 5000, 1000]), ("k3v2", "16/2", 64, [767, 300]),
        ("k4v4", "16/2", 256, [767, 300]), ("k8v8", "32/8", 128, [767, 300]),
        ("k2v2", "16/2", 64, [32 * K]), ("k4v2", "16/1", 256, [9 * K, 2000]),
        ("k4v2", "32/8", 128, [128 * K]),
    ]  # fmt: skip
    fields: dict[str, Any] = {}
    if dry:
        listed = [("k4v2_g32", "4/2", 64, [95, 40]), ("k2v2_g32", "4/2", 64, [230])]
        fields = {"num_sink_tokens": 32}
    found = []
    for preset, heads, dim, lengths in listed:
        shape = Shape.parse(len(lengths), heads, dim)
        config = KVarNConfig.from_preset(preset, **fields)
        keys: dict[str, Any] = {"preset": preset, **vars(shape), "lengths": lengths}
        keys["lengths"] = " ".join(map(str, lengths))
        keys.pop("batch")
        found.append((keys, Case(config, shape, lengths, max(lengths) <= 767 and lengths != [230])))
    return found


def run(stage: Stage) -> str:
    worst = dict.fromkeys(BOUNDS, 0.0)
    for keys, case in stage.each(cases(stage.dry)):
        with stage.guarded(keys):
            torch.manual_seed(0)
            found = compare_encoded(case, stage) if case.encoded else compare_long(case, stage)
            wrong = [name for name, value in found.items() if not value <= BOUNDS[name]]
            text = {name: f"{value:.2e}" for name, value in found.items()}
            stage.add(keys, **text, within="no" if wrong else "yes")
            for name in wrong:
                stage.fail(f"{keys}: {name} {found[name]:.1e}, bound {BOUNDS[name]:g}")
            worst |= {name: max(worst[name], value) for name, value in found.items()}
    return "largest: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items())


def compare_encoded(case: Case, stage: Stage) -> dict[str, float]:
    """Both backends store the same tokens, then attend."""
    config, shape, lengths, _ = case
    count, head_dim, rows = max(lengths), shape.head_dim, len(lengths)
    rotation, line = hadamard(head_dim, device=stage.device), config.to_string()
    k, v = _randn(stage, 2, rows, shape.kv_heads, count, head_dim)
    valid = torch.arange(count) < torch.tensor(lengths)[:, None]
    valid = valid.to(stage.device)

    def append(cache: TileCache, backend: str) -> TileCache:
        torch.ops.kvarn.append_(k, v, valid, *cache, rotation, line, backend)
        return cache

    sizes = (rows, shape.kv_heads, head_dim, count + CHUNK, torch.bfloat16, stage.device)
    kernels = append(allocate(config, *sizes), "triton")
    empty = allocate(config, *sizes)
    # Equalizers may differ in their last bit, and then other codes are right.
    equalizers = {f"{side}_equalizer": getattr(kernels, f"{side}_equalizer").clone()
                  for side in "kv"}  # fmt: skip
    reference = append(empty._replace(**equalizers), "reference")
    differing = [(getattr(kernels, name) != getattr(reference, name)).double().mean()
                 for name in CODE_FIELDS]  # fmt: skip
    found = {
        "codes_differ": max(map(float, differing)),
        "scales": max(_scale_error(kernels, reference, name) for name in SCALE_FIELDS),
        "attention": attention_error(case, reference, rotation, stage),
    }
    for name, new in (("step", 1), ("chunk", CHUNK)):
        q = _randn(stage, rows, shape.q_heads, new, head_dim)
        more = _randn(stage, 2, rows, shape.kv_heads, new, head_dim)
        rest = (rotation, None, head_dim**-0.5, 0.0, True, line)
        outs = [torch.ops.kvarn.step(q, *more, None, *reference, *rest, backend)[0]
                for backend in ("triton", "reference")]  # fmt: skip
        found[name] = relative_error(*outs)
    return found


def compare_long(case: Case, stage: Stage) -> dict[str, float]:
    """Attention to random codes."""
    config, shape, lengths, _ = case
    sizes = (len(lengths), shape.kv_heads, shape.head_dim, max(lengths) + 1)
    cache = allocate(config, *sizes, torch.bfloat16, stage.device)
    fill_randomly(cache, max(lengths), config)
    cache.seq_lens.copy_(torch.tensor(lengths))
    rotation = hadamard(shape.head_dim, device=stage.device)
    return {"attention": attention_error(case, cache, rotation, stage)}


def attention_error(case: Case, cache: TileCache, rotation: Tensor, stage: Stage) -> float:
    """Of one query per row over what is stored."""
    shape, line = case.shape, case.config.to_string()
    q = _randn(stage, len(case.lengths), shape.q_heads, 1, shape.head_dim)
    outs = [
        torch.ops.kvarn.attention(
            q, *cache, rotation, None, shape.head_dim**-0.5, 0.0, True, line, backend
        )
        for backend in ("triton", "reference")
    ]
    return relative_error(*outs)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of `wanted`."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def _scale_error(found: TileCache, wanted: TileCache, name: str) -> float:
    a, b = getattr(found, name).float(), getattr(wanted, name).float()
    return ((a - b).abs() / (b.abs() + 1)).max().item()


def _randn(stage: Stage, *size: int) -> Tensor:
    return torch.randn(*size, device=stage.device).to(torch.bfloat16)
