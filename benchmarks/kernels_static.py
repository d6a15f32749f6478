"""Compile the kernels for GPUs that need not be here and keep what the compilers say.

    python benchmarks/kernels_static.py            the covering set: a minute or two on two cores
    python benchmarks/kernels_static.py --full     the full matrix: 70 minutes of CPU time

Counts instructions, registers, spills and shared memory. Nothing is run: nothing is a speed.
"""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from pathlib import Path

import triton

from kvarn_ops import kernel_report
from kvarn_ops.tables import write_rows

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--archs", default="all", help="with commas (default %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows, failures = kernel_report.compile_named(args.archs, args.full)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ("kernels_static_full.csv" if args.full else "kernels_static.csv")
    made = {
        "made by": "python benchmarks/kernels_static.py" + (" --full" if args.full else ""),
        "triton": triton.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    write_rows(path, kernel_report.as_dicts(rows), made)
    spilling = [row for row in rows if row.spill_bytes]
    print(f"{len(rows)} kernels, {len(spilling)} spill: {path}")
    for row in spilling:
        print(f"  {row.kernel} {row.config} {row.arch}: {row.spill_bytes} bytes per thread")
    for name in failures:
        print(f"  does not compile: {name}")


if __name__ == "__main__":
    main()
