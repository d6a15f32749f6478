"""The evaluation from options to files: plan, run what is not there yet, tabulate, draw."""

from __future__ import annotations

import importlib
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from ..benchmark.results import conditions
from ..errors import InputError
from ..tables import write_rows
from . import plots
from .checks import fingerprint
from .options import Options
from .plan import Job, jobs, tasks_of
from .report import Results, collect, summary_table
from .store import Store

__all__ = ["run_eval"]

FILES = ("summary", "positions", "layers", "answers")


def run_eval(options: Options, console: Console) -> Results:
    """Run an evaluation, or the rest of one; returns the rows of its tables.

    Raises
    ------
    InputError
        For options that do not go together, or a folder that holds another run.
    """
    importlib.import_module("matplotlib")  # if it is missing: said now, not after minutes
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    settings = options.settings() | fingerprint(options, tasks_of(options))
    store = Store(options.out, settings)
    plan = list(jobs(options))
    if not plan:
        raise InputError("nothing to do: these tasks and methods together give no measurement.")
    store.open()
    known = {job.piece.key: store.get(job.piece.key) for job in plan}
    missing = [job for job in plan if known[job.piece.key] is None]
    if len(missing) < len(plan):
        console.print(f"{len(plan) - len(missing)} of {len(plan)} pieces are there already.")
    with _progress(console) as progress:
        bar = progress.add_task("", total=sum(job.piece.forwards for job in missing))
        finished: list[tuple[Job, dict[str, Tensor]]] = []
        for job in plan:
            tensors = known[job.piece.key]
            if tensors is None:
                progress.update(bar, description=job.piece.label)
                tensors = job.piece.run(lambda: progress.advance(bar))
                store.put(job.piece.key, tensors)
            finished.append((job, tensors))
    results = collect(finished)
    write_tables(options, results, settings)
    console.print(summary_table(results.summary))
    console.print(
        f"Done in {time.perf_counter() - started:.0f} s. Written to {options.out}: "
        + ", ".join(sorted(p.name for p in options.out.iterdir() if p.suffix in (".csv", ".png"))),
        highlight=False,
        markup=False,
    )
    return results


def write_tables(options: Options, results: Results, settings: dict[str, Any]) -> None:
    """Write the CSV files and the pictures."""
    device = torch.device(options.placed()[0])
    given = {name: str(value) for name, value in settings.items() if value is not None}
    header = given | conditions(device, torch.get_num_threads())
    for name, rows in zip(FILES, results, strict=True):
        if rows:
            write_rows(options.out / f"{name}.csv", rows, header)
    note = (
        f"kvarn_ops {header['kvarn_ops']}, torch {header['torch']}, {header['placed']}, "
        f"{header['date'].split()[0]}; bars: one standard error"
    )
    plots.draw(options.out, results.summary, results.positions, results.layers, note)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<44}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
