"""Find launch settings with which nothing spills, where the binaries of the rule do.

    python benchmarks/spill_free.py        after `kernels_static.py` with and without `--full`

`ptxas` stops at 80, 96, 128 or 168 registers per thread, with which a program more fits, and spills
what is left over. Other chunks and blocks move a kernel away from such a step. What is found goes
into `kernels/settings.json` beside what is there; after an upgrade of Triton empty that file
(`{}`) and start with both tables. Nothing is run: nothing is a speed.
"""

from __future__ import annotations

import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from kvarn_ops import kernel_report, kernel_tools
from kvarn_ops.benchmark.results import read_rows
from kvarn_ops.kernel_report import Case

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "kernels" / "settings.json"
RESULTS = ROOT / "benchmarks" / "results"
TABLES = (RESULTS / "kernels_static.csv", RESULTS / "kernels_static_full.csv")

_LONGER = 1.02  # of the rule's loop: what avoiding a spill may cost

# In the order in which they are tried: the rule's neighbours first.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "attend": [
        *({"block_tokens": tokens} for tokens in (16, 32)),
        *(
            {"folds": folds, "block_tokens": tokens}
            for folds, tokens in product((1, 2, 4), (16, 32))
        ),
        *({"stages": 3, "block_tokens": tokens} for tokens in (16, 32)),
        *(
            {"warps": warps, "block_tokens": tokens}
            for warps, tokens in product((2, 4, 8), (16, 32))
        ),
    ],
    "encode": [
        {"encode_width": width, "encode_stages": stages, "encode_block_k": block}
        for width, stages, block in product((64, 32), (1, 2), (16, 32))
    ],
}  # fmt: skip


class Group(NamedTuple):
    """Cases whose launches share a line of the file."""

    arch: str
    kernel: str
    key: str
    cases: tuple[Case, ...]


def groups() -> list[Group]:
    """Of which the last tables have one that spills."""
    rows = [row for table in TABLES for row in read_rows(table)]
    rows = [row for row in rows if int(row["spill_bytes"]) and row["arch"] != "gfx942"]
    cases = [*kernel_report.covering_cases(), *kernel_report.full_cases()]
    named = {str(case): case for case in cases}
    spilling = dict.fromkeys(
        (row["arch"], row["kernel"], kernel_report.settings_key(case, row["kernel"]))
        for row in rows
        if (case := named[row["config"]]).head_dim <= 256
    )
    return [
        Group(arch, kernel, key, tuple(dict.fromkeys(
            replace(case, kernels=(kernel,))
            for case in cases
            if not case.kernels or kernel in case.kernels
            if kernel_report.settings_key(case, kernel) == key
        )))
        for arch, kernel, key in spilling
    ]  # fmt: skip


def settings_of(group: Group) -> dict[str, int] | None:
    """The first settings without spills that lengthen no loop, else those that do so least."""
    most = _longest(group, {})
    found: dict[str, int] | None = None
    least = math.inf
    for settings in CANDIDATES[group.kernel]:
        length = _longest(group, settings, spills=False)
        if length < least:
            found, least = settings, length
        if length <= _LONGER * most:
            break
    return found


def _longest(group: Group, settings: dict[str, int], spills: bool = True) -> float:
    """Instructions per code of the longest loop (0: of none); infinite if something spills."""
    longest = 0.0
    with kernel_tools.trying(settings):
        for case in group.cases:
            for row in kernel_report.compile_case(case, group.arch):
                if row.spill_bytes and not spills:
                    return math.inf
                longest = max(longest, row.instructions_per_code or 0.0)
    return longest


def main() -> None:
    work = groups()
    held = json.loads(TARGET.read_text(encoding="utf-8"))
    left = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        results = tqdm(pool.map(settings_of, work), total=len(work), unit="case", desc="searching")
        for group, settings in zip(work, results, strict=True):
            if settings is None:
                left.append(f"{group.kernel} {group.key} {group.arch}")
            else:
                held.setdefault(group.arch, {}).setdefault(group.key, {}).update(settings)
    ordered = {arch: dict(sorted(held[arch].items())) for arch in sorted(held)}
    TARGET.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")
    print(f"{len(work) - len(left)} of {len(work)} cases settled: {TARGET}")
    for name in left:
        print(f"  spills with all settings: {name}")


if __name__ == "__main__":
    main()
