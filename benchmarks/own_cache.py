"""A model with a KV cache module of its own: dense and patched, eager and compiled.

    python benchmarks/own_cache.py --out benchmarks/results/own_cache_cpu.csv

The model is `examples/gpt_fast_style.py` with 4 layers of hidden size 2048, 16/4 heads of 128,
bf16, random weights. Its caches are filled with random keys and values, then it takes one token per
step. Contenders take turns; medians of wall-clock time, steps that quantize a tile included.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import kvarn_ops
from kvarn_ops.benchmark.results import ResultFile, conditions
from kvarn_ops.benchmark.timing import Contender, Timing, alternate, noise

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from gpt_fast_style import Config, Transformer, held_bytes, random_model

KEYS = ("context", "cache", "form", "gqa")
SIZES: dict[str, Any] = {
    "num_layers": 4, "num_q_heads": 16, "num_kv_heads": 4, "head_dim": 128, "ffn_dim": 5504,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("own_cache_cpu.csv"))
    parser.add_argument("--contexts", default="8192")
    parser.add_argument("--preset", default="k4v2_g128")
    parser.add_argument("--rounds", type=int, default=129, help="steps that count")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = ResultFile(args.out, KEYS)
    around = conditions(torch.device("cpu"), args.threads)
    console = Console(stderr=True)
    for context in map(int, args.contexts.split(",")):
        for native in (True, False):
            rows, spreads = measure(context, args.preset, args.rounds, native)
            for row in rows:
                results.add(row | around)
                console.print({key: row[key] for key in (*KEYS, "step_ms", "mib")})
            said = noise(spreads)
            if said:
                console.print(said)


@torch.inference_mode()
def measure(
    context: int, preset: str, rounds: int, native_gqa: bool
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    torch.compiler.reset()
    contenders, sizes = {}, {}
    for cache in ("dense", preset):
        for form in ("eager", "compiled"):
            name = f"{cache}, {form}"
            model = random_model(Config(**SIZES, native_gqa=native_gqa), torch.bfloat16)
            model.setup_caches(max_batch_size=1, max_seq_length=context + rounds + 8)
            if cache != "dense":
                kvarn_ops.patch(model, cache)
            fill(model, context)
            contenders[name] = Contender(Step(model, context, form == "compiled"))
            sizes[name] = held_bytes(model)
    seconds = alternate(contenders, rounds, torch.device("cpu"), warmup=3)
    timings = {name: Timing.of(taken) for name, taken in seconds.items()}
    rows = [
        {
            "context": context,
            "cache": name.split(", ")[0],
            "form": name.split(", ")[1],
            "gqa": "enable_gqa" if native_gqa else "repeat_interleave",
            "step_ms": f"{timing.median:.3f}",
            "minimum_ms": f"{timing.minimum:.3f}",
            "spread": f"{timing.spread:.3f}",
            "mib": f"{sizes[name] / 2**20:.2f}",
            "rounds": rounds,
        }
        for name, timing in timings.items()
    ]
    return rows, {name: timing.spread for name, timing in timings.items()}


class Step:
    """The next token, one position further at each call."""

    def __init__(self, model: Transformer, start: int, compiled: bool) -> None:
        self.call = torch.compile(model, fullgraph=True) if compiled else model
        self.token, self.position = torch.full((1, 1), 7), torch.tensor([start])

    def __call__(self) -> None:
        self.call(self.token, self.position)
        self.position = self.position + 1


def fill(model: Transformer, tokens: int) -> None:
    """Random keys and values through each cache's own method."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.layers:
        shape = (2, 1, SIZES["num_kv_heads"], tokens, SIZES["head_dim"])
        k, v = torch.randn(shape, generator=generator).to(torch.bfloat16)
        layer.attention.kv_cache.update(torch.arange(tokens), k, v)


if __name__ == "__main__":
    main()
