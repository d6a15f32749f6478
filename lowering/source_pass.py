"""The Inductor pass that ties compiled code to our sources.

Inductor caches compiled graphs on disk, keyed by the graph and its settings. The bodies of our
traced ops are not in that key, so that an edited formula would run as its old compiled version.
A custom pass is in the key through its `uuid`, which here is a hash of every source file of the
package.

In graphs with our ops it also runs our rewrites (`AppendLast`); other graphs it leaves at once.

It is installed while any patched model is alive, appended to what is there, and removed with the
last one: `acquire` takes an object that lives as long as the patch. `inductor_options()` gives the
same pass to a single `torch.compile` call.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import kvarn_ops

from .append_last import AppendLast

__all__ = ["SourcePass", "acquire", "inductor_options", "seen_ops"]

_SLOT = "post_grad_custom_pre_pass"
_logger = logging.getLogger("kvarn_ops")
_seen: Counter[str] = Counter()
_APPEND_LAST = AppendLast()


class SourcePass(CustomGraphPass):
    """Counts `kvarn` ops and runs our rewrites; its `uuid` makes a changed source a cache miss.

    Before and after: the same graph, unless it holds our ops.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Run on one graph."""
        counts: Counter[str] = Counter()
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            # A functionalized in-place op is the first argument of auto_functionalized_v2.
            for target in (node.target, *node.args[:1]):
                if getattr(target, "namespace", None) == "kvarn":
                    counts[str(target)] += 1
        if counts:
            moved = _APPEND_LAST(graph)
            _seen.update(counts)
            _logger.debug("compiled a graph with %s; %d appends moved", dict(counts), moved)

    def uuid(self) -> str:
        """Hash of the package's sources."""
        return _source_hash()


@lru_cache(maxsize=1)
def _source_hash() -> str:
    digest = hashlib.sha256()
    roots = [Path(kvarn_ops.__file__).parent]
    for name in ("kernels", "lowering", "export"):
        roots += [Path(path) for path in getattr(kvarn_ops, name).__path__]
    for root in sorted(set(roots)):
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return f"kvarn_ops-{digest.hexdigest()}"


_PASS = SourcePass()
_users: dict[int, Any] = {}  # id of an owner -> its finalizer


def acquire(owner: object) -> None:
    """Install the pass for as long as `owner` lives."""
    setattr(inductor_config, _SLOT, _joined(getattr(inductor_config, _SLOT)))
    key = id(owner)
    _users[key] = weakref.finalize(owner, _drop, key)


def inductor_options() -> dict[str, Any]:
    """Options for one compilation: `torch.compile(model, options=inductor_options())`.

    Only needed for code that calls `torch.ops.kvarn.*` itself, without `patch`.
    """
    return {_SLOT: _joined(getattr(inductor_config, _SLOT))}


def seen_ops() -> Counter[str]:
    """How often each `kvarn` op was seen in graphs compiled in this process."""
    return Counter(_seen)


def _joined(present: Any) -> Any:
    """`present` and our pass, in the simplest form the slot takes."""
    if present is None:
        return _PASS
    if isinstance(present, (list, tuple)):
        return present if _PASS in present else [*present, _PASS]
    return present if present is _PASS else [present, _PASS]


def _drop(key: int) -> None:
    _users.pop(key, None)
    if _users:
        return
    present = getattr(inductor_config, _SLOT)
    if present is _PASS:
        setattr(inductor_config, _SLOT, None)
    elif isinstance(present, (list, tuple)) and _PASS in present:
        rest = [item for item in present if item is not _PASS]
        setattr(inductor_config, _SLOT, rest[0] if len(rest) == 1 else rest or None)
