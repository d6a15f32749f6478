"""What our passes found, did and could not do, graph by graph; `kvarn_ops.explain` reads it.

A stage of passes opens the record of its graph; `refuse` and `note_copies` write into the open one.
Old records are dropped, so that a process that compiles for days keeps a bounded list.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from kvarn_ops._compat import current_compilation

from .graph import module_path, source_line

__all__ = [
    "AttentionSite",
    "CacheCopy",
    "GraphRecord",
    "Refusal",
    "clear",
    "recorded",
    "recording",
    "refuse",
    "seen_ops",
]

_KEPT_GRAPHS = 64
_KEPT_PER_GRAPH = 256  # refusals, attentions, copies

_logger = logging.getLogger("kvarn_ops")


@dataclass(frozen=True)
class Refusal:
    """A place where a pass did not rewrite, and why."""

    pass_name: str
    node: str
    module: str  # path of the module that made the node, "" if unknown
    source: str  # the user's line that made it, "" if unknown
    reason: str

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.module, self.source) if part) or self.node
        return f"{self.pass_name} left {place}: {self.reason}"


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a graph."""

    module: str  # path of the module that made it, "" if unknown
    source: str  # the user's line, "" if unknown
    packed: bool  # whether it reads packed tiles
    what: str  # what it is, and why it reads no packed tiles

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.module, self.source) if part)
        return f"{place}: {self.what}" if place else self.what


@dataclass(frozen=True)
class CacheCopy:
    """A cache buffer that compiled code copies in every call."""

    buffer: str  # field of the cache, `k_codes`
    size: int  # bytes of the copy
    module: str  # path of the module that writes or reads it, "" if unknown
    cause: str

    def __str__(self) -> str:
        place = f" of {self.module}" if self.module else ""
        return f"{self.buffer}{place}, {self.size} bytes in every call: {self.cause}"


@dataclass
class GraphRecord:
    """One compiled graph.

    Attributes
    ----------
    name : str
        Dynamo's name of the compilation (`"0/0"`), or of what opened the record.
    ops : dict[str, Counter]
        Calls of our ops after each stage: stage -> op (`"kvarn::append_"`) -> number.
    rewrites : Counter
        Rewrites by pass.
    refusals : list of Refusal
    refused : int
        Number of refusals; `refusals` holds the first ones.
    sites : list of AttentionSite
        The attentions of the graph, after the passes of the first stage.
    copies : list of CacheCopy
        Cache buffers that the compiled code copies.
    """

    name: str
    ops: dict[str, Counter[str]] = field(default_factory=dict)
    rewrites: Counter[str] = field(default_factory=Counter)
    refusals: list[Refusal] = field(default_factory=list)
    refused: int = 0
    sites: list[AttentionSite] = field(default_factory=list)
    copies: list[CacheCopy] = field(default_factory=list)
    _token: Callable[[], Any] = field(default=lambda: None, repr=False, compare=False)

    def summary(self) -> str:
        """One line."""
        ops = self.ops.get("post_grad") or next(reversed(self.ops.values()), Counter())
        parts = [_listed(ops) or "none of our ops left"]
        parts.append(f"rewrites: {_listed(self.rewrites) or 'none'}")
        if self.refused:
            parts.append(f"{self.refused} places left as they were (kvarn_ops.explain says why)")
        if self.copies:
            parts.append(f"{len(self.copies)} cache buffers copied")
        return f"graph {self.name or '-'}: {'; '.join(parts)}"


_lock = threading.RLock()  # re-entrant: a finalizer may run anywhere
_records: deque[GraphRecord] = deque(maxlen=_KEPT_GRAPHS)
_totals: Counter[str] = Counter()
_open: ContextVar[GraphRecord | None] = ContextVar("kvarn_ops_graph_record", default=None)


@contextmanager
def recording(name: str = "", *, joins: bool = True) -> Iterator[GraphRecord]:
    """Open the record of the graph that is being compiled, or a new one called `name`.

    All stages of one compilation share a record, unless `joins` is False.
    """
    compilation, token = current_compilation()
    with _lock:
        found = None
        if joins and token is not None:
            found = next((one for one in reversed(_records) if one._token() is token), None)
        if found is None:
            found = GraphRecord(name or compilation)
            if token is not None:
                found._token = weakref.ref(token)
            _records.append(found)
    reset = _open.set(found)
    try:
        yield found
    finally:
        _open.reset(reset)


def refuse(pass_name: str, node: torch.fx.Node, reason: str) -> None:
    """Note that a pass leaves a node as it is.

    Parameters
    ----------
    pass_name : str
        Name of the pass's class.
    node : torch.fx.Node
        What was not rewritten: the attention, not one of its inputs.
    reason : str
        Why, as the end of a sentence: "its mask is not the cache's length mask".
    """
    refusal = Refusal(pass_name, node.name, module_path(node), source_line(node), reason)
    _logger.debug("%s", refusal)
    record = _open.get()
    if record is None:
        with recording("outside a compilation", joins=False) as record:
            pass
    with _lock:
        record.refused += 1
        if len(record.refusals) < _KEPT_PER_GRAPH:
            record.refusals.append(refusal)


def note_sites(sites: list[AttentionSite]) -> None:
    """Add attentions to the open record."""
    record = _open.get()
    with _lock:
        if record is not None:
            record.sites += sites[: _KEPT_PER_GRAPH - len(record.sites)]


def note_copies(copies: list[CacheCopy]) -> None:
    """Add copies of cache buffers to the open record."""
    record = _open.get()
    with _lock:
        if record is not None:
            record.copies += copies[: _KEPT_PER_GRAPH - len(record.copies)]


def is_recorded() -> bool:
    """Whether the running compilation has a record: an earlier stage met our ops."""
    _, token = current_compilation()
    with _lock:
        return token is not None and any(one._token() is token for one in _records)


def add_ops(stage: str, ops: Counter[str]) -> None:
    """Count the ops that a stage leaves in the open record's graph."""
    record = _open.get()
    with _lock:
        if record is not None:
            record.ops[stage] = record.ops.get(stage, Counter()) + ops
        if stage == "post_grad":
            _totals.update(ops)


def recorded() -> tuple[GraphRecord, ...]:
    """Records of the last compiled graphs with something of ours, oldest first."""
    with _lock:
        return tuple(_records)


def seen_ops() -> Counter[str]:
    """How often each of our ops was handed to Inductor's code generation in this process."""
    with _lock:
        return Counter(_totals)


def clear() -> None:
    """Forget all records and counts."""
    with _lock:
        _records.clear()
        _totals.clear()


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in sorted(counts.items()) if count)
