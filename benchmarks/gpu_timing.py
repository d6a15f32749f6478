"""Times of calls with cold caches, and the copy rate of the memory, for `gpu_check.py`.

A contender is a list of calls, each on inputs of its own, together several times the L2 cache. All
of them are captured in one CUDA graph, as the layers of a model are, so that a time per call holds
the gaps between kernels and no work of the CPU. The graphs take turns, one replay per round. In a
dry run the calls are made one after the other and a wall clock takes the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kvarn_ops.benchmark.timing import Timing

Calls = Sequence[Callable[[], Any]]

_L2_TIMES = 3  # bytes that a round of calls reads, in L2 caches
_MOST_COPIES = 128
_SPIN_CYCLES = 1_000_000  # about 0.5 ms, in which the CPU enqueues what is timed
_COPY_BYTES = 4 << 30


class Clock:
    """Measures on one device; `warm` calls everything once and measures nothing."""

    def __init__(self, device: torch.device, warm: bool = False) -> None:
        self.device, self.warm = device, warm
        self.on_gpu = device.type == "cuda"

    def copies(self, nbytes: int) -> int:
        """How many inputs of this size make every call find a cold L2 cache."""
        if not self.on_gpu or self.warm:
            return 1
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(1, min(_MOST_COPIES, -(-_L2_TIMES * l2 // max(1, nbytes))))

    def fits(self, nbytes: int) -> bool:
        """Whether this much memory is free, with a tenth to spare."""
        if not self.on_gpu:
            return True
        torch.cuda.empty_cache()
        return nbytes < 0.9 * torch.cuda.mem_get_info(self.device)[0]

    def measure(self, works: Mapping[str, Calls], rounds: int = 15) -> dict[str, Timing]:
        """Milliseconds per call of every contender, the median of rounds in turn."""
        if self.warm:
            for calls in works.values():
                calls[0]()
            return {}
        seconds = self._on_gpu(works, rounds) if self.on_gpu else self._on_cpu(works, 3)
        return {name: Timing.of(values) for name, values in seconds.items()}

    def _on_cpu(self, works: Mapping[str, Calls], rounds: int) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, calls in works.items():
                begun = time.perf_counter()
                for call in calls:
                    call()
                seconds[name].append((time.perf_counter() - begun) / len(calls))
        return seconds

    def _on_gpu(self, works: Mapping[str, Calls], rounds: int) -> dict[str, list[float]]:
        graphs = {name: captured(calls) for name, calls in works.items()}
        events = {name: [_event_pair() for _ in range(rounds + 1)] for name in works}
        for index in range(rounds + 1):
            for name, graph in graphs.items():
                start, stop = events[name][index]
                torch.cuda._sleep(_SPIN_CYCLES)
                start.record()
                graph.replay()
                stop.record()
            torch.cuda.synchronize(self.device)
        return {
            name: [a.elapsed_time(b) / 1e3 / len(works[name]) for a, b in pairs[1:]]
            for name, pairs in events.items()
        }


def captured(calls: Calls) -> torch.cuda.CUDAGraph:
    """All calls in one graph, after the first ran once: it compiles and takes its workspaces."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def memory_rates(clock: Clock, nbytes: int | None = None) -> dict[str, float]:
    """GB/s of a large copy (read and written), of reading and of writing alone."""
    nbytes = nbytes or (_COPY_BYTES if clock.on_gpu else 1 << 20)
    source = torch.empty(nbytes // 4, dtype=torch.int32, device=clock.device).random_()
    target = torch.empty_like(source)
    works: dict[str, Calls] = {
        "copy": [lambda: target.copy_(source)],
        "read": [lambda: source.amax()],
        "write": [lambda: target.fill_(1)],
    }
    moved = {"copy": 2 * nbytes, "read": nbytes, "write": nbytes}
    timings = clock.measure(works)
    return {name: rate(moved[name], timing.median) for name, timing in timings.items()}


def rate(nbytes: float, milliseconds: float) -> float:
    """GB/s."""
    return nbytes / 1e6 / milliseconds


def micros(timing: Timing) -> str:
    """The median, as a column."""
    return f"{1e3 * timing.median:.4g}"


def _event_pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
