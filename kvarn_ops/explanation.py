"""`Explanation`: what `kvarn_ops.explain` returns, and how it prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .config import KVarNConfig

__all__ = ["Explanation"]


@dataclass(frozen=True)
class Explanation:
    """What `patch` did to a model, and what compiled code does. Print it for a table.

    Attributes
    ----------
    config : KVarNConfig or None
        None if the model is not patched.
    backend : str or None
    layers : tuple
        One `LayerReport` per layer of the cache: index, module path, packed, reason,
        bytes_per_token.
    graph_ops : dict
        How often each `kvarn` op was seen in graphs compiled so far in this process.
    graphs : tuple
        One `lowering.record.GraphRecord` per graph compiled in this process with an op of ours (the
        last 64): its attentions, rewrites by pass, refusals with reasons, copied cache buffers.
    graphs_from_cache : int
        Graphs that Inductor took from its cache on disk: no pass ran on them here, so nothing more
        is known. TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 compiles them anew.
    """

    config: KVarNConfig | None
    backend: str | None
    layers: tuple[Any, ...]
    graph_ops: dict[str, int]
    graphs: tuple[Any, ...] = ()
    graphs_from_cache: int = 0

    def __str__(self) -> str:
        if self.config is None and not self.graphs:
            return "not patched: call kvarn_ops.patch(model)."
        lines = []
        shown: set[str] = set()
        if self.config is not None:
            lines.append(f"{self.config.to_string()}, backend {self.backend}")
            for layer in self.layers:
                size = (
                    "" if layer.bytes_per_token is None else f"{layer.bytes_per_token:.0f} B/token"
                )
                lines.append(
                    f"{layer.index:4d}  {layer.module or '-':40s} {layer.reason:32s} {size}"
                )
                sites = [site for site in self._sites() if _is_of(layer.module, site.module)]
                lines += [f"      compiled: {text}" for text in _counted(s.what for s in sites)]
                shown |= {str(site) for site in sites}
        seen = ", ".join(f"{name} x{count}" for name, count in sorted(self.graph_ops.items()))
        lines.append(f"compiled graphs: {seen or 'none yet'}")
        lines += self._about_graphs(shown)
        return "\n".join(lines)

    def _sites(self) -> Iterator[Any]:
        return (site for graph in self.graphs for site in graph.sites)

    def _about_graphs(self, shown: set[str]) -> Iterator[str]:
        """What the graphs held beyond the layers that were shown."""
        if self.graphs_from_cache:
            yield (
                f"  {self.graphs_from_cache} more came from Inductor's cache, where no pass looks "
                "(TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 compiles them anew)"
            )
        rewrites = sum((graph.rewrites for graph in self.graphs), Counter())
        if rewrites:
            passes = ", ".join(f"{name} x{count}" for name, count in sorted(rewrites.items()))
            yield f"  rewrites: {passes}"
        others = [str(site) for site in self._sites() if str(site) not in shown]
        for text in _counted(others):
            yield f"  attention: {text}"
        for text in _counted(str(copy) for graph in self.graphs for copy in graph.copies):
            yield f"  copied: {text}"


def _is_of(layer: str, module: str) -> bool:
    """Whether a module path of a graph, which may begin with names of callers, is a layer's."""
    return bool(layer) and (module == layer or module.endswith(f".{layer}"))


def _counted(texts: Iterable[str]) -> list[str]:
    return [
        text if count == 1 else f"{text} (in {count} graphs)"
        for text, count in Counter(texts).items()
    ]
