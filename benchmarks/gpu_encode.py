"""Stage `encode`: what quantizing costs a decode step, and how much of 128 steps' attention it is.

`append_us` is `kvarn::append_` of a token that finishes no tile, `finish_us` that of the token that
finishes one in every row, `step_us` and `step_finish_us` the same of `kvarn::step_`, which attends
too: all captured in a graph, the kernel that puts the lengths back taken off. `attention_us` is
`kvarn::attention` with a cold cache. `share = (127 append + finish) / (128 attention)`, and
`step_share` what finishing adds to 128 steps.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from gpu_attention import kvarn_calls
from gpu_caches import random_caches, stored_bytes
from gpu_stage import Stage
from gpu_timing import Calls

from kvarn_ops import KVarNConfig, kernel_tools
from kvarn_ops.benchmark.decode_step import Shape
from kvarn_ops.hadamard import hadamard
from kvarn_ops.layout import TileCache

KEYS = ("preset", "encoder", "batch", "q_heads", "kv_heads", "head_dim", "context", "width")
TIMES = ("append", "finish", "step", "step_finish", "attention")
COLUMNS = (*(f"{name}_us" for name in TIMES), "reset_us", "share", "step_share", "spread", "error")
K = 1024
KINDS = (("k4v2", "plus", "32/8", 128), ("k2v2", "plus", "32/8", 128), ("k4v2", "plus", "32/8", 64),
         ("k4v2", "plus", "16/2", 256), ("k4v2", "paper", "32/8", 128))  # fmt: skip
POINTS = ((1, 4 * K), (8, 4 * K), (32, 4 * K), (8, 16 * K))
# Channels per chunk of the encoder: the rule's 64 against more registers and against fewer.
WIDTHS = (32, 128)
WIDTH_KIND, WIDTH_POINTS = KINDS[0], ((8, 4 * K), (32, 4 * K))
MOST_COPIES = 16


class Case(NamedTuple):
    """One row of the table."""

    config: KVarNConfig
    shape: Shape
    context: int
    settings: dict[str, int]  # of the encoder's launch, in place of the rule's


def cases(dry: bool) -> list[tuple[dict[str, Any], Case]]:
    """What is measured, with the columns that name it."""
    listed = [(*kind, *point, 0) for kind in KINDS for point in POINTS]
    listed += [(*WIDTH_KIND, *point, width) for point in WIDTH_POINTS for width in WIDTHS]
    fields: dict[str, Any] = {}
    if dry:
        listed = [("k4v2_g32", "plus", "4/2", 64, 1, 100, width) for width in (0, 32)]
        fields = {"num_sink_tokens": 32}
    found = []
    for preset, encoder, heads, dim, batch, context, width in listed:
        shape = Shape.parse(batch, heads, dim)
        config = KVarNConfig.from_preset(preset, encoder=encoder, **fields)
        keys = {"preset": preset, "encoder": encoder, **vars(shape), "context": context}
        keys["width"] = width or "rule"
        settings = {"encode_width": width} if width else {}
        found.append((keys, Case(config, shape, context, settings)))
    return found


def run(stage: Stage) -> str:
    for keys, case in stage.each(cases(stage.dry)):
        with stage.guarded(keys):
            measure(stage, keys, case)
    shares = [f"batch {row['batch']}: {row['finish_us']} us, {float(row['share']):.1%}"
              for row in stage.rows[:3] if row["share"]]  # fmt: skip
    return "finished tiles and share of 128 steps, " + "; ".join(shares)


def measure(stage: Stage, keys: dict[str, Any], case: Case) -> None:
    config, shape, context, settings = case
    # One token before a tile is finished, at about this context, and half a tile before.
    last = config.num_sink_tokens + config.num_tiles(context) * config.group_size - 1
    middle = last - config.group_size // 2
    assert config.num_tiles(last + 1) == config.num_tiles(last) + 1
    copies = min(MOST_COPIES, stage.clock.copies(stored_bytes(config, shape, context)))
    caches = random_caches(config, shape, context, stage.device, copies)
    place: dict[str, Any] = {"dtype": torch.bfloat16, "device": stage.device}
    q = torch.randn(shape.batch, shape.q_heads, 1, shape.head_dim, **place)
    k, v = torch.randn(2, shape.batch, shape.kv_heads, 1, shape.head_dim, **place)
    rotation, line = hadamard(shape.head_dim, device=stage.device), config.to_string()
    rest = (rotation, None, shape.head_dim**-0.5, 0.0, True, line, "triton")

    def append(cache: TileCache) -> None:
        torch.ops.kvarn.append_(k, v, None, *cache, rotation, line, "triton")

    def step(cache: TileCache) -> None:
        torch.ops.kvarn.step_(q, k, v, None, *cache, *rest)

    def launched(cache: TileCache, op: Any) -> None:
        with kernel_tools.trying(settings) if settings else nullcontext():
            op(cache)

    def at(length: int, op: Any) -> Calls:
        return [
            lambda cache=cache: (cache.seq_lens.fill_(length), launched(cache, op))
            for cache in caches
        ]

    works = {
        "reset": at(middle, lambda cache: None),
        "append": at(middle, append), "finish": at(last, append),
        "step": at(middle, step), "step_finish": at(last, step),
        "attention": kvarn_calls(q, caches, config),
    }  # fmt: skip
    timings = stage.clock.measure(works)
    if not timings:
        return
    reset = timings["reset"].median
    ms = {name: timings[name].median - (name != "attention") * reset for name in TIMES}
    group = config.group_size
    stage.add(
        keys,
        **{f"{name}_us": f"{1e3 * value:.4g}" for name, value in ms.items()},
        reset_us=f"{1e3 * reset:.4g}",
        share=f"{((group - 1) * ms['append'] + ms['finish']) / (group * ms['attention']):.4f}",
        step_share=f"{(ms['step_finish'] - ms['step']) / (group * ms['step']):.4f}",
        spread=f"{max(timing.spread for timing in timings.values()):.3f}",
    )
