"""Patch a tiny model of every family that transformers has, and compare it with its dense self.

    python benchmarks/model_families.py                    all families, 10 minutes on one core
    python benchmarks/model_families.py --only llama,phi   these rows of the CSV anew
    python benchmarks/model_families.py --docs-only        docs/models.md from the CSV

Each family is a process of its own: one that crashes or hangs does not end the run. The exit code
is 1 if a family is silently wrong or crashes. Writes benchmarks/results/model_families.csv,
docs/models.md and kvarn_ops/families.py.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import queue
import re
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from check_family import Outcome, check
from family_page import page, supported_module
from rich.progress import track
from tiny_families import model_types
from transformers.utils import logging as transformers_logging

from kvarn_ops.benchmark.results import ResultFile, conditions, read_rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CSV = ROOT / "benchmarks" / "results" / "model_families.csv"
SECONDS = 90.0  # per family; what is compared takes 2 to 10, more on a busy machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="model types, with commas")
    parser.add_argument("--resume", action="store_true", help="skip rows of the same versions")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--docs-only", action="store_true")
    parser.add_argument("--out", type=Path, default=CSV)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "models.md")
    parser.add_argument("--module", type=Path, default=ROOT / "kvarn_ops" / "families.py")
    args = parser.parse_args()
    if not args.docs_only:
        # The name of a variant has a comma and a space.
        names = re.split(",(?! )", args.only) if args.only else sorted(model_types())
        file = ResultFile(args.out, ["family"], bool(args.only) or args.resume)
        measure(names, file, args.resume, args.jobs)
    rows = read_rows(args.out)
    args.docs.write_text(page(rows), encoding="utf-8")
    args.module.write_text(supported_module(rows), encoding="utf-8")
    print(
        ", ".join(f"{count} {name}" for name, count in Counter(r["outcome"] for r in rows).items())
    )
    bad = [row["family"] for row in rows if row["outcome"] in ("WRONG", "CRASH")]
    if bad:
        raise SystemExit(f"wrong or crashed: {', '.join(bad)}")


def measure(names: list[str], file: ResultFile, resume: bool, jobs: int) -> None:
    """A row per family, written as it is known."""
    made_under = conditions(torch.device("cpu"), 1)
    context = multiprocessing.get_context("forkserver")
    # The server imports transformers once; before Python 3.13 it knows this folder from here only.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    context.set_forkserver_preload(["check_family"])
    if resume:
        names = [name for name in names if not file.has({"family": name} | made_under)]

    def row(name: str) -> dict[str, Any]:
        started = time.perf_counter()
        found = asdict(in_process(context, name))
        for column in ("error_exact", "error_packed"):
            found[column] = f"{found[column]:.1e}"
        found |= {"class": model_types()[name], "seconds": round(time.perf_counter() - started, 1)}
        return found | made_under

    with ThreadPoolExecutor(jobs) as pool:
        for one in track(pool.map(row, names), "families", total=len(names)):
            file.add(one)


def in_process(context: Any, name: str) -> Outcome:
    """The outcome of `check`, whatever happens to the process that finds it."""
    answers = context.Queue()
    process = context.Process(target=_answer, args=(name, answers), daemon=True)
    process.start()
    waited = 0.0
    while waited < SECONDS:
        try:
            outcome = answers.get(timeout=1.0)
            process.join()
            return outcome
        except queue.Empty:
            waited += 1.0
            if not process.is_alive() and answers.empty():
                return Outcome(name, "CRASH", note=f"the process ended with {process.exitcode}")
    process.kill()
    process.join()
    return Outcome(name, "not built", note=f"took longer than {SECONDS:.0f} s")


def _answer(name: str, answers: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    logging.getLogger("kvarn_ops").setLevel(logging.ERROR)
    answers.put(check(name))


if __name__ == "__main__":
    main()
