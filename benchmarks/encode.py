"""What quantizing costs: the step that finishes a tile, against decoding the tile's 128 tokens.

    python benchmarks/encode.py --out benchmarks/results/encode_cpu.csv

One layer, one row, 4 KV heads, 16 query heads. `append_ms` is the append of the token that finishes
a tile (store it, encode K and V of all heads, eagerly), `step_ms` a compiled decode step that
finishes none; `share = append / (128 step)`. Both encoders take turns with the step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from kvarn_ops import KVarNConfig
from kvarn_ops.benchmark.decode_step import DecodeStep, Shape, compiled_step, random_cache
from kvarn_ops.benchmark.results import ResultFile, conditions
from kvarn_ops.benchmark.timing import Contender, Timing, alternate

KEYS = ("preset", "head_dim", "encoder", "context")
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("encode_cpu.csv"))
    parser.add_argument("--presets", default="k4v2,k2v2")
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--contexts", default="1024,4096,16384")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep rows that are there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = ResultFile(args.out, KEYS, args.resume)
    around = conditions(CPU, args.threads)
    for preset in args.presets.split(","):
        for head_dim in map(int, args.head_dims.split(",")):
            torch.compiler.reset()
            compiled = compiled_step()
            for context in map(int, args.contexts.split(",")):
                keys = {"preset": preset, "head_dim": head_dim, "context": context}
                if results.has(keys | around):
                    continue
                for row in measure(preset, head_dim, context, compiled, args.rounds):
                    results.add(row | around)
                    print({key: row[key] for key in list(row)[:7]}, flush=True)


@torch.no_grad()
def measure(preset: str, head_dim: int, context: int, compiled: object, rounds: int) -> list[dict]:
    shape = Shape(1, 16, 4, head_dim)
    configs = {
        encoder: KVarNConfig.from_preset(preset, encoder=encoder) for encoder in ("plus", "paper")
    }
    config = configs["plus"]
    step = DecodeStep(config, shape, context, CPU, compiled)  # type: ignore[arg-type]
    contenders = {"step": step.contenders()["kvarn_compiled"]}
    # One token before a tile is finished, at about this context.
    before = config.num_sink_tokens + config.num_tiles(context) * config.group_size - 1
    for encoder, other in configs.items():
        cache, rotation = random_cache(other, shape, before, CPU)
        arguments = (step.k, step.v, None, *cache, rotation, other.to_string(), "aten")
        contenders[encoder] = Contender(
            lambda arguments=arguments: torch.ops.kvarn.append_(*arguments),
            lambda cache=cache: cache.seq_lens.fill_(before),
        )
        assert other.num_tiles(before + 1) == other.num_tiles(before) + 1
    seconds = alternate(contenders, rounds, CPU)
    timings = {name: Timing.of(values) for name, values in seconds.items()}
    return [
        {
            "preset": preset,
            "head_dim": head_dim,
            "encoder": encoder,
            "context": context,
            "append_ms": f"{timings[encoder].median:.4f}",
            "step_ms": f"{timings['step'].median:.4f}",
            "share": f"{timings[encoder].median / (128 * timings['step'].median):.4f}",
            "append_min_ms": f"{timings[encoder].minimum:.4f}",
            "spread": f"{max(timing.spread for timing in timings.values()):.3f}",
        }
        for encoder in configs
    ]


if __name__ == "__main__":
    main()
