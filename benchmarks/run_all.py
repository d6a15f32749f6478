"""Run every CPU benchmark, then draw the pictures and rewrite the tables of docs/benchmarks.md.

    python benchmarks/run_all.py            about 20 minutes on two idle cores
    python benchmarks/run_all.py --quick    about 5, into a scratch folder: does everything run?
    python benchmarks/run_all.py --resume   go on with a run that was stopped

Each benchmark is a process of its own. Rows are written as they are measured; `--resume` keeps rows
that were made on this machine with the same versions. `optimum-quanto` and `hqq` have to be
installed for the peers; without them their rows are missing, and the run says so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="names of benchmarks, with commas")
    args = parser.parse_args()
    started = time.perf_counter()
    out = Path(tempfile.mkdtemp(prefix="kvarn_bench_")) if args.quick else RESULTS
    failed = []
    for name, command in commands(out, args.threads, args.quick, args.resume).items():
        if args.only and name.split()[0] not in args.only.split(","):
            continue
        begun = time.perf_counter()
        print(f"=== {name}", flush=True)
        if subprocess.run([sys.executable, *command], check=False).returncode:
            failed.append(name)
        print(f"=== {name}: {time.perf_counter() - begun:.0f} s", flush=True)
    if args.quick:
        subprocess.run(
            [sys.executable, HERE / "plot.py", "--results", out, "--out", out], check=True
        )
    else:
        subprocess.run([sys.executable, HERE / "plot.py"], check=True)
        subprocess.run([sys.executable, HERE / "tables.py"], check=True)
    print(f"=== all: {time.perf_counter() - started:.0f} s; results in {out}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def commands(out: Path, threads: int, quick: bool, resume: bool) -> dict[str, list[str]]:
    """Arguments of the interpreter, by benchmark."""
    shared = ["--resume"] if resume else []

    def script(name: str, *arguments: str) -> list[str]:
        return [str(HERE / f"{name}.py"), "--out", str(out / f"{name}_cpu.csv"), *arguments]

    few_rounds = ["--rounds", "3"] if quick else []
    found = {
        "decode_attention": script(
            "decode_attention", *shared, *few_rounds, "--threads", str(threads),
            *(["--quick"] if quick else []),
        ),
        "model_decode": script(
            "model_decode", *shared, "--threads", str(threads),
            *(["--contexts", "512", "--hidden", "256"] if quick else []),
        ),
    }  # fmt: skip
    for count in sorted({1, threads}):
        # The second number of threads adds its rows to the file of the first.
        joined = shared if count == 1 else ["--resume"]
        few = ["--contexts", "1024", "--presets", "k4v2", "--head-dims", "64"] if quick else []
        found[f"encode {count}"] = script(
            "encode", *joined, *few_rounds, "--threads", str(count), *few
        )
    few = ["--context", "512", "--batch", "2", "--tokens", "32", "--no-compile"] if quick else []
    found["demo_peers"] = [str(HERE / "demo_peers.py"), "--out", str(out), *few]
    return found


if __name__ == "__main__":
    main()
