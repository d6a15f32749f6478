"""The stages of an export: a line with the time of each on a terminal, and in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["stage"]

_logger = logging.getLogger("kvarn_ops")


@contextmanager
def stage(text: str, steps: int | None = None) -> Iterator[Callable[[], None]]:
    """One stage; yields a function that is called after each of its `steps`.

    Nothing is shown where standard error is no terminal. None steps: how many is not known.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    start = time.perf_counter()
    console = Console(stderr=True)
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description:<34}"), BarColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task(text, total=steps)
        yield lambda: progress.advance(bar)
        # The number of steps is torch's business and may be another one in another release.
        done = progress.tasks[0].completed or 1
        progress.update(bar, total=done, completed=done)
    _logger.info("%s: %.1f s", text, time.perf_counter() - start)
