"""Stage `copy`: how fast this GPU's memory is, the yardstick of the other stages."""

from __future__ import annotations

from gpu_stage import Stage
from gpu_timing import memory_rates

KEYS = ("kind",)
COLUMNS = ("gb_per_s", "error")


def run(stage: Stage) -> str:
    rates = memory_rates(stage.clock)
    for kind, value in rates.items():
        stage.add({"kind": kind}, gb_per_s=f"{value:.5g}")
    return ", ".join(f"{kind} {value:.0f} GB/s" for kind, value in rates.items())
