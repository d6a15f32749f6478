"""Stage `smallest`: a sweep of `attend_kernel`'s settings: is the rule for them near the best?

Settings reach the kernels as in `kvarn-ops tune`, whose file is not read. Each row is one
setting, timed in turn with the rule; `ratio = rule / this`, above 1 this one is faster. First every
number alone is moved away from the rule, then the grid around it is filled.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from gpu_attention import kvarn_calls
from gpu_caches import random_caches, stored_bytes
from gpu_stage import Stage
from gpu_timing import micros, rate

from kvarn_ops import KVarNConfig
from kvarn_ops.benchmark.decode_step import Shape
from kvarn_ops.kernels import heuristics  # pyright: ignore[reportMissingImports]

KEYS = ("preset", "batch", "q_heads", "kv_heads", "head_dim", "context", "settings")
COLUMNS = (
    "warps", "stages", "programs_per_sm", "block_tokens", "splits", "dense_slots", "us", "rule_us",
    "gb_per_s", "ratio", "spread", "error",
)  # fmt: skip
K = 1024
POINTS = ((1, 16 * K), (8, 16 * K))
RULE: dict[str, int] = {}
ALONE: dict[str, tuple[int, ...]] = {
    "programs_per_sm": (2, 3, 4, 5, 8, 12), "stages": (1, 3, 4), "warps": (1, 4, 8),
    "block_tokens": (16, 64, 128),
}  # fmt: skip
GRID = ({"warps": (2, 4), "stages": (1, 2, 3), "programs_per_sm": (2, 3, 4, 6, 8)},)


def settings(dry: bool) -> list[dict[str, int]]:
    """The rule, then everything else in order."""
    if dry:
        return [RULE, {"programs_per_sm": 2}]
    found = [RULE, *({name: value} for name, values in ALONE.items() for value in values)]
    for grid in GRID:
        for values in product(*grid.values()):
            one = dict(zip(grid, values, strict=True))
            if one not in found:
                found.append(one)
    return found


def run(stage: Stage) -> str:
    preset, heads, dim, points, fields = "k4v2", "32/8", 128, POINTS, {}
    if stage.dry:
        preset, heads, dim, points = "k4v2_g32", "4/2", 64, ((1, 100),)
        fields = {"num_sink_tokens": 32}
    config = KVarNConfig.from_preset(preset, **fields)
    listed = []
    for one, (batch, context) in product(settings(stage.dry), points):
        shape = Shape.parse(batch, heads, dim)
        text = " ".join(f"{name}={value}" for name, value in one.items()) or "rule"
        keys = {"preset": preset, **vars(shape), "context": context, "settings": text}
        listed.append((keys, (shape, context, one)))
    prepared: dict[Shape, tuple[torch.Tensor, Any]] = {}
    for keys, (shape, context, one) in stage.each(listed):
        if shape not in prepared:
            copies = stage.clock.copies(stored_bytes(config, shape, context))
            caches = random_caches(config, shape, context, stage.device, copies)
            place: dict[str, Any] = {"dtype": torch.bfloat16, "device": stage.device}
            q = torch.randn(shape.batch, shape.q_heads, 1, shape.head_dim, **place)
            prepared[shape] = q, caches
        with stage.guarded(keys):
            measure(stage, keys, config, shape, context, one, *prepared[shape])
    return headline(stage)


def measure(
    stage: Stage, keys: dict[str, Any], config: KVarNConfig, shape: Shape, context: int,
    one: dict[str, int], q: torch.Tensor, caches: Any,
) -> None:  # fmt: skip
    """One setting in turn with the rule."""
    calls = kvarn_calls(q, caches, config)

    def with_settings(values: dict[str, int]) -> list[Any]:
        """Calls that are launched so: when they run, or when a graph is captured."""

        def run(call: Any) -> torch.Tensor:
            with heuristics.trying(values):
                return call()

        return [lambda call=call: run(call) for call in calls]

    works = {"rule": with_settings(RULE), "this": with_settings(one)}
    wanted, found = works["rule"][0](), works["this"][0]()
    error = ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()
    assert error < 1e-2, f"the output differs from the rule's by {error:.1e}"
    tiles, ring = caches[0].k_codes.shape[2], caches[0].k_tail.shape[2]
    with heuristics.trying(one):
        launched = heuristics.attend_shape(
            stage.device, shape.batch * shape.kv_heads, shape.q_heads // shape.kv_heads, tiles,
            config.num_sink_tokens + ring, shape.head_dim, config.group_size, config.key_bits,
            config.value_bits,
        )  # fmt: skip
    timings = stage.clock.measure(works)
    if not timings:
        return
    rule, this = timings["rule"], timings["this"]
    stage.add(
        keys,
        warps=launched.warps, stages=launched.stages, block_tokens=launched.block_tokens,
        programs_per_sm=one.get("programs_per_sm", 12 // launched.warps), splits=launched.splits,
        dense_slots=launched.dense_slots, us=micros(this), rule_us=micros(rule),
        gb_per_s=f"{rate(stored_bytes(config, shape, context), this.median):.4g}",
        ratio=f"{rule.median / this.median:.3f}", spread=f"{max(rule.spread, this.spread):.3f}",
    )  # fmt: skip


def headline(stage: Stage) -> str:
    """The best setting per point."""
    best: dict[str, dict[str, str]] = {}
    for row in stage.rows:
        point = f"{row['batch']}x{row['context']}"
        if row["ratio"] and float(row["ratio"]) > float(best.get(point, row)["ratio"]):
            best[point] = row
        elif row["ratio"]:
            best.setdefault(point, row)
    return "; ".join(f"{point}: best {row['settings']}, {row['ratio']}x the rule"
                     for point, row in best.items())  # fmt: skip
