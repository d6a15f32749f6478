"""Run the evaluations of docs/evaluation.md, keep their tables and pictures, rewrite the page.

    python benchmarks/evaluation.py                    all of them: about 1.5 hours of one core
    python benchmarks/evaluation.py --only chase       one of them
    python benchmarks/evaluation.py --page             nothing is run: tables and pictures again

Each is a `kvarn-ops eval`; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
IMAGES = HERE.parent / "docs" / "images"

ALL_PRESETS = "k2v2,k3v2,k3v3,k4v2,k4v4"
VARIANTS = (
    *("unequalized", "equalize_k", "equalize_v", "equalize_025", "equalize_075"),
    *("clip_only", "norm_only", "paper_rounding", "refit", "iters0"),
    *("k_token", "k_unrotated", "v_symmetric", "kv_symmetric", "zero8", "log8", "mixed8"),
)
# name -> (options of `kvarn-ops eval`, tables that are kept, pictures that are kept)
RUNS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "text": (
        f"--tasks text --protocols pseudo --block 64 --presets {ALL_PRESETS} --windows 4 "
        "--placements 2",
        ("summary",),
        ("quality_vs_bits",),
    ),
    "attention": (
        "--tasks attention --block 64 --presets k2v2 --windows 2 --placements 0",
        ("layers",),
        ("error_by_layer", "static_vs_accumulated"),
    ),
    "chase": (
        f"--tasks chase --presets {ALL_PRESETS} --samples 64 --placements 5",
        ("summary",),
        ("intact_answers",),
    ),
    "lines": ("--tasks lines --presets k2v2,k4v2 --samples 64 --placements 5", ("summary",), ()),
    "decode": (
        "--tasks text --protocols decode,prefill --presets k2v2 --windows 4 --placements 0",
        ("summary", "positions"),
        ("error_vs_position",),
    ),
    "variants": (
        "--tasks text,chase --protocols pseudo --block 64 --presets k2v2,k4v4 --context 2048 "
        f"--windows 4 --placements 2 --methods plus,plus/{',plus/'.join(VARIANTS)}",
        ("summary",),
        (),
    ),
} | {
    f"tail{tail}": (
        "--tasks text --protocols decode --presets k2v2,k4v2 --methods plus --context 2048 "
        f"--windows 4 --placements 0 --tail {tail}",
        ("summary",),
        (),
    )
    for tail in (0, 32, 64, 128)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(RUNS), help="names, with commas")
    parser.add_argument("--page", action="store_true", help="only tables and pictures")
    scratch = Path(tempfile.gettempdir()) / "kvarn_evaluation"
    parser.add_argument("--scratch", type=Path, default=scratch, help="folders of the runs")
    args = parser.parse_args()
    for name in args.only.split(",") if not args.page else ():
        options, tables, pictures = RUNS[name]
        out = args.scratch / name
        command = [sys.executable, "-m", "kvarn_ops", "eval", "--out", str(out), *options.split()]
        print(f"=== {name}: kvarn-ops eval {options}", flush=True)
        subprocess.run(command, check=True, env=os.environ | {"OMP_WAIT_POLICY": "passive"})
        for table in tables:
            shutil.copy(out / f"{table}.csv", RESULTS / f"eval_{name}_{table}.csv")
        for picture in pictures:
            shutil.copy(out / f"{picture}.png", IMAGES / f"eval_{picture}.png")
    subprocess.run([sys.executable, HERE / "tables.py"], check=True)


if __name__ == "__main__":
    main()
