"""Move appends behind all reads of the cache, so that Inductor mutates it in place."""

from __future__ import annotations

import torch

from kvarn_ops._compat import auto_functionalized_v2

from .graph import kvarn_op

__all__ = ["AppendLast"]

_APPENDS = ("kvarn::append_", "kvarn::append_at_")


class AppendLast:
    """Put every `kvarn::append_` and `kvarn::append_at_` right before the first use of its results.

    Inductor reorders a graph for locality, which puts parts of the attention behind the append of
    its layer; it then copies the buffers that they read, whole, in every step.

    Before: append; reads of the cache; copy_(cache, result)
    After:  reads of the cache; append; copy_(cache, result)
    """

    def __call__(self, graph: torch.fx.Graph) -> int:
        """Rewrite one functional graph; return the number of appends moved."""
        moved = 0
        for node in graph.find_nodes(op="call_function", target=auto_functionalized_v2):
            if kvarn_op(node) in _APPENDS:
                moved += _move_to_first_use(graph, node)
        return moved


def _move_to_first_use(graph: torch.fx.Graph, append: torch.fx.Node) -> int:
    results = list(append.users)
    users = {user for result in results for user in result.users}
    first = next((node for node in graph.nodes if node in users), None)
    if first is None:
        return 0
    for node in (append, *results):
        first.prepend(node)
    return 1
