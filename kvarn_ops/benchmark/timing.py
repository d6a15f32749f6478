"""How things are timed: contenders in alternation, medians over rounds, the noise said."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import torch

__all__ = ["Contender", "Timing", "alternate", "noise"]

NOISY = 0.15  # interquartile range over median, above which ratios deserve a second run
_L2_FLUSH_BYTES = 256 << 20  # several times the largest L2 cache


@dataclass(frozen=True)
class Contender:
    """Something to time; `prepare` runs before every call, off the clock."""

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender."""

    median: float
    minimum: float
    spread: float  # interquartile range over median; 0 with fewer than four rounds

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarize the rounds."""
        middle = median(seconds)
        spread = 0.0
        if len(seconds) >= 4:
            low, _, high = quantiles(seconds, n=4)
            spread = (high - low) / middle
        return cls(1e3 * middle, 1e3 * min(seconds), spread)


def alternate(
    contenders: dict[str, Contender],
    rounds: int,
    device: torch.device,
    warmup: int = 2,
    each: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call, one call per contender and round.

    Alternation spreads what else the machine does over all contenders. On a GPU the L2 cache is
    flushed before each call and events take the time, which then includes launches that the
    preceding flush does not hide.

    Parameters
    ----------
    contenders : dict of str to Contender
    rounds : int
        Calls that count, per contender.
    device : torch.device
    warmup : int
        Calls before, per contender: compilation, first touch of memory.
    each : callable, optional
        Called after every round.
    """
    clock = _cuda_clock(device) if device.type == "cuda" else _wall_clock
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        for _ in range(warmup):
            _prepare(contender)
            contender.run()
    for _ in range(rounds):
        for name, contender in contenders.items():
            _prepare(contender)
            seconds[name].append(clock(contender.run))
        if each is not None:
            each()
    return seconds


def noise(spreads: dict[str, float]) -> str | None:
    """A sentence if a spread says that the ratios are not to be trusted, else None."""
    name, worst = max(spreads.items(), key=lambda item: item[1])
    if worst <= NOISY:
        return None
    return (
        f"the machine is noisy: the middle half of the rounds of {name} spans {worst:.0%} of the "
        f"median, more than {NOISY:.0%}. Stop other work and run again."
    )


def _prepare(contender: Contender) -> None:
    if contender.prepare is not None:
        contender.prepare()


def _wall_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    scratch = torch.empty(_L2_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def clock(call: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        scratch.zero_()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1e3

    return clock
