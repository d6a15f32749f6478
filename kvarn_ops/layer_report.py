"""What `patch` says about one attention layer."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerReport"]


@dataclass(frozen=True)
class LayerReport:
    """What happens to one attention layer, and why."""

    index: int
    module: str
    packed: bool
    reason: str
    bytes_per_token: float | None = None
