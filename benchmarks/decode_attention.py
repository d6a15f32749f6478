"""Compiled decode attention on CPU against dense attention, as ratios in one run.

    python benchmarks/decode_attention.py --out benchmarks/results/decode_attention_cpu.csv

One decode step of one layer: KVarN attends to its cache and stores the new token; dense attends to
a cache of the same length and stores nothing (its append is one small copy). Wall time, the three
contenders in alternation, median over rounds. Dense bfloat16 with `enable_gqa` is the yardstick;
`packed_gqa` is the form that transformers uses eagerly for one token.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

import kvarn_ops
import kvarn_ops.lowering
from kvarn_ops import KVarNConfig
from kvarn_ops.ops.samples import filled_cache

SHAPES = [
    # batch, query heads, KV heads, head_dim
    (1, 16, 4, 128),
    (1, 16, 4, 64),
    (1, 8, 8, 128),
    (1, 8, 1, 128),
    (4, 16, 4, 128),
]
CONTEXTS = (1024, 4096, 16384)


def main() -> None:
    """Run the table and write it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("decode_attention_cpu.csv"))
    parser.add_argument("--presets", default="k4v2,k2v2,k4v4")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    conditions = {
        "threads": args.threads,
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "kvarn_ops": kvarn_ops.__version__,
        "date": date.today().isoformat(),
    }
    rows = []
    for preset in args.presets.split(","):
        for shape in SHAPES if preset == "k4v2" else SHAPES[:1]:
            torch._dynamo.reset()
            for context in CONTEXTS:
                row = measure(preset, shape, context, args.rounds) | conditions
                rows.append(row)
                print({k: v for k, v in row.items() if k not in conditions}, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


@torch.no_grad()
def measure(preset: str, shape: tuple[int, int, int, int], context: int, rounds: int) -> dict:
    """One row of the table: milliseconds and ratios to dense bfloat16."""
    batch, q_heads, kv_heads, dim = shape
    config = KVarNConfig.from_preset(preset)
    cache, rotation = filled_cache(
        config, [context] * batch, "cpu", num_kv_heads=kv_heads, head_dim=dim,
        max_cache_len=context + 256, dtype=torch.bfloat16,
    )  # fmt: skip
    q = torch.randn(batch, q_heads, 1, dim, dtype=torch.bfloat16)
    k, v = torch.randn(2, batch, kv_heads, 1, dim, dtype=torch.bfloat16)
    k_dense, v_dense = torch.randn(2, batch, kv_heads, context, dim, dtype=torch.bfloat16)
    q_grouped = q.view(batch, kv_heads, q_heads // kv_heads, dim)
    tail = (rotation, None, dim**-0.5, 0.0, True, config.to_string())

    def step(backend: str, *tensors: torch.Tensor) -> torch.Tensor:
        return torch.ops.kvarn.step_(q, k, v, None, *tensors, *tail, backend)

    compiled = torch.compile(step, fullgraph=True, options=kvarn_ops.lowering.inductor_options())

    def run(function: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
        def once() -> torch.Tensor:
            cache.seq_lens.fill_(context)
            return function("aten", *cache)

        return once

    contenders = {
        "kvarn_compiled": run(compiled),
        "kvarn_eager": run(step),
        "dense_bf16": lambda: F.scaled_dot_product_attention(q, k_dense, v_dense, enable_gqa=True),
        "dense_bf16_packed_gqa": lambda: F.scaled_dot_product_attention(
            q_grouped, k_dense, v_dense
        ),
    }
    times = {name: [] for name in contenders}
    for function in contenders.values():
        function()
        function()
    for _ in range(rounds):
        for name, function in contenders.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    return {
        "preset": preset,
        "batch": batch,
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "head_dim": dim,
        "context": context,
        **{f"{name}_ms": round(value, 3) for name, value in medians.items()},
        "speedup_over_dense_bf16": round(medians["dense_bf16"] / medians["kvarn_compiled"], 2),
    }


if __name__ == "__main__":
    main()
