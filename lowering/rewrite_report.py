"""What `rewrite_kv_cache` did with each attention layer of a program, and why not more."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from kvarn_ops.errors import InputError

__all__ = ["RewriteReport", "RewrittenLayer", "explain_rewrite"]


@dataclass(frozen=True)
class RewrittenLayer:
    """One attention, or one cache that no attention reads.

    Attributes
    ----------
    layer : str
        The module that computes it, or the node's name where that is unknown.
    caches : tuple of str
        Names of the dense buffers that it reads, as far as they were recognised.
    rewritten : bool
        Whether these buffers are gone.
    mask : str
        For a rewritten layer: "causal" (proven, not needed any more) or "passed on", with the
        reason.
    reason : str
        For another one: why it was left as it is.
    """

    layer: str
    caches: tuple[str, ...]
    rewritten: bool
    mask: str = ""
    reason: str = ""

    def __str__(self) -> str:
        names = " and ".join(self.caches) or "no cache"
        if self.rewritten:
            return f"{self.layer}: {names} packed, mask {self.mask}"
        return f"{self.layer}: {names} left dense: {self.reason}"


@dataclass(frozen=True)
class RewriteReport:
    """Of one program.

    Attributes
    ----------
    layers : tuple of RewrittenLayer
        In the program's order.
    removed : dict
        Names and bytes of the buffers that are gone: dense caches, and tables of masks that
        nothing else reads.
    packed_bytes : int
        Of the buffers that took their place.
    """

    layers: tuple[RewrittenLayer, ...]
    removed: Mapping[str, int] = field(default_factory=dict)
    packed_bytes: int = 0

    @property
    def refused(self) -> tuple[RewrittenLayer, ...]:
        """The layers that were left dense."""
        return tuple(layer for layer in self.layers if not layer.rewritten)

    def __str__(self) -> str:
        done = len(self.layers) - len(self.refused)
        head = f"{done} of {len(self.layers)} attention layers read a packed KV cache"
        if done:
            head += f" ({sum(self.removed.values()):,} bytes became {self.packed_bytes:,})"
        return "\n".join([head, *(f"  {layer}" for layer in self.layers)])


_reports: weakref.WeakKeyDictionary[torch.export.ExportedProgram, RewriteReport] = (
    weakref.WeakKeyDictionary()
)


def remember(program: torch.export.ExportedProgram, report: RewriteReport) -> None:
    """Keep the report for as long as the program lives."""
    _reports[program] = report


def explain_rewrite(program: torch.export.ExportedProgram) -> RewriteReport:
    """The report on a program that `rewrite_kv_cache` returned.

    Raises
    ------
    InputError
        For another program, a saved and loaded one included.
    """
    report = _reports.get(program)
    if report is None:
        raise InputError(
            "this program was not returned by rewrite_kv_cache in this process, which is where "
            "the report is kept: rewrite the dense program again, or look for kvarn ops in graph."
        )
    return report
