"""One stage of passes as a single Inductor custom pass, whose `uuid` covers our sources.

Inductor caches compiled graphs on disk, keyed by the graph and its settings. The bodies of our
traced ops are not in that key, so that an edited formula would run as its old compiled version.
A custom pass is in the key through its `uuid`, which here is a hash of every source file of the
package, and of the files of passes from elsewhere.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

import kvarn_ops

from . import record
from .graph import count_ops
from .pipeline import Pass
from .survey import survey

__all__ = ["DUMP_VARIABLE", "Stage"]

# A folder: every pass that rewrites a graph leaves the graph before and after in it.
DUMP_VARIABLE = "KVARN_OPS_DUMP"

_logger = logging.getLogger("kvarn_ops")


class Stage(CustomGraphPass):
    """Runs passes in order on graphs that hold an op of ours; other graphs it leaves at once.

    Parameters
    ----------
    name : str
        `pre_grad`, `post_grad` or `final`: in records, dumps and messages.
    passes : tuple of passes
    """

    def __init__(self, name: str, passes: tuple[Pass, ...]) -> None:
        self.name = name
        self.passes = passes

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Run on one graph."""
        if not count_ops(graph) and not record.is_recorded():
            return
        with record.recording() as found:
            refused = len(found.refusals)
            for one in self.passes:
                found.rewrites[_name(one)] += _run(one, graph, self.name, found.name)
            record.add_ops(self.name, count_ops(graph))
            if self.name == "pre_grad":
                record.note_sites(survey(graph, found.refusals[refused:]))
        _warn(found.refusals[refused:], found.name)
        if self.name == "final":
            _logger.info("%s", found.summary())

    def uuid(self) -> str | None:
        """Hash of our sources and of the passes; None (no caching) if a pass has no source file."""
        parts = [_source_hash(), self.name]
        for one in self.passes:
            source = _foreign_source(type(one))
            if source is None:
                return None
            parts.append(f"{type(one).__module__}.{_name(one)}:{source}")
        if os.environ.get(DUMP_VARIABLE):
            parts.append(f"dump by process {os.getpid()}")  # what comes from a cache is not dumped
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return f"kvarn_ops-{self.name}-{digest}"

    # Inductor copies its settings, and torch 2.11 pickles the pre-grad slot into the cache's key.
    def __deepcopy__(self, memo: dict[int, Any]) -> Stage:
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.uuid() or f"{self.name} without a hash, in process {os.getpid()}",)


def _name(one: Pass) -> str:
    return type(one).__name__


def _run(one: Pass, graph: torch.fx.Graph, stage: str, graph_name: str) -> int:
    folder = os.environ.get(DUMP_VARIABLE)
    before = str(graph) if folder else ""
    count = one(graph)
    _logger.debug("graph %s: %s, %s: %d rewrites", graph_name, stage, _name(one), count)
    if count:
        graph.lint()
        if folder:
            _dump(Path(folder), f"{stage}-{_name(one)}", before, str(graph))
    return count


def _dump(folder: Path, name: str, before: str, after: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("*.before.txt")))
    stem = f"{number:03d}-{os.getpid()}-{name}"
    (folder / f"{stem}.before.txt").write_text(before, encoding="utf-8")
    (folder / f"{stem}.after.txt").write_text(after, encoding="utf-8")


def _warn(refusals: list[record.Refusal], graph_name: str) -> None:
    """One line per reason: layers are alike."""
    reasons = Counter((refusal.pass_name, refusal.reason) for refusal in refusals)
    for (pass_name, reason), count in reasons.items():
        first = next(r for r in refusals if (r.pass_name, r.reason) == (pass_name, reason))
        more = f" (and {count - 1} more)" if count > 1 else ""
        _logger.warning("graph %s: %s%s", graph_name or "-", first, more)


def _foreign_source(kind: type) -> str | None:
    """Hash of the file that defines a class; "" for our own, None if there is no file."""
    if kind.__module__.startswith("kvarn_ops."):
        return ""
    path = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if path is None or not Path(path).is_file():
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


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
    return digest.hexdigest()
