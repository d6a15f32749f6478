"""Decode attention of one layer against dense attention, for the shapes of docs/benchmarks.md.

    python benchmarks/decode_attention.py --out benchmarks/results/decode_attention_cpu.csv

The measuring code is that of `kvarn-ops bench` (`kvarn_ops.benchmark`); this is its list of shapes:
k4v2 over batch, GQA and head_dim, the other presets on one shape.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import torch
from rich.console import Console

from kvarn_ops.benchmark.decode_step import Shape
from kvarn_ops.benchmark.results import ResultFile
from kvarn_ops.benchmark.run import KEYS, Case, check_device, run_cases

HEADS = ("16/4", "8/8", "8/1")
CONTEXTS = (1024, 4096, 16384)
OTHER_PRESETS = ("k2v2", "k3v2", "k4v4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("decode_attention_cpu.csv"))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="one shape, two contexts")
    parser.add_argument("--resume", action="store_true", help="keep rows that are there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = [Shape.parse(batch, heads, dim) for batch, dim, heads in
              product((1, 4), (128, 64), HEADS)]  # fmt: skip
    contexts = CONTEXTS
    if args.quick:
        shapes, contexts = shapes[:1], CONTEXTS[:2]
    cases = [Case("k4v2", shape, context) for shape, context in product(shapes, contexts)]
    if not args.quick:
        cases += [Case(*parts) for parts in product(OTHER_PRESETS, shapes[:1], contexts)]
    differences = run_cases(
        cases,
        ResultFile(args.out, KEYS, args.resume),
        device=check_device(args.device),
        rounds=args.rounds,
        refcheck=True,
        console=Console(stderr=True),
    )
    for difference in differences:
        print(f"DIFFERENT: {difference}")
    raise SystemExit(bool(differences))


if __name__ == "__main__":
    main()
