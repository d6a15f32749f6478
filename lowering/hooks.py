"""Where our stages enter Inductor, and for how long.

They are installed while any patched model is alive, appended to what is in Inductor's slots, and
removed with the last one: `acquire` takes an object that lives as long as the patch.
`inductor_options()` gives the same stages to a single `torch.compile` call.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from kvarn_ops._compat import get_pass_slot, is_set_here, set_pass_slot, slots_take_lists

from .pipeline import FINAL, POST_GRAD, PRE_GRAD, Pass
from .stage import Stage

__all__ = ["PassChain", "acquire", "as_slot_value", "inductor_options", "passes_in"]

# slot of Inductor's config -> what stands in it for us
_STAGES = {
    "pre_grad_custom_pass": Stage("pre_grad", PRE_GRAD),
    "post_grad_custom_pre_pass": Stage("post_grad", POST_GRAD),
    "post_grad_custom_post_pass": Stage("final", FINAL),
}

_lock = threading.RLock()  # re-entrant: a finalizer may run anywhere
_users: dict[int, Any] = {}  # id of an owner -> its finalizer


class PassChain(CustomGraphPass):
    """Several passes as one, for releases of torch whose slots take only one (2.11)."""

    def __init__(self, passes: tuple[Any, ...]) -> None:
        self.passes = passes

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Run all passes, in order."""
        for one in self.passes:
            one(graph)

    def uuid(self) -> Any:
        """All uuids, or None (no caching) if a pass has none."""
        found = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.passes]
        return None if None in found else tuple(found)

    def __deepcopy__(self, memo: dict[int, Any]) -> PassChain:
        return self

    def __reduce__(self) -> tuple[type[PassChain], tuple[tuple[Any, ...]]]:
        return PassChain, (self.passes,)


def acquire(owner: object) -> None:
    """Install our stages for as long as `owner` lives."""
    with _lock:
        for slot, stage in _STAGES.items():
            for everywhere in _scopes(slot):
                present = _members(get_pass_slot(slot, everywhere=everywhere))
                if stage not in present:
                    _put(slot, (*present, stage), everywhere)
        key = id(owner)
        _users[key] = weakref.finalize(owner, _drop, key)


def passes_in(slot: str) -> tuple[Any, ...]:
    """All passes in a slot of Inductor's config, anybody's, as seen in this thread."""
    return _members(get_pass_slot(slot))


def inductor_options(
    *, pre_grad: tuple[Pass, ...] = (), post_grad: tuple[Pass, ...] = ()
) -> dict[str, Any]:
    """Options for one compilation: `torch.compile(model, options=inductor_options())`.

    Only needed for code that calls `torch.ops.kvarn.*` itself, without `patch`, and to run passes
    of your own behind ours. Passes that are in Inductor's config already stay.

    Parameters
    ----------
    pre_grad, post_grad : tuple of passes
        Run after ours of the same stage (docs/lowering.md, "A new pass").
    """
    extra = {"pre_grad": pre_grad, "post_grad": post_grad}
    options = {}
    for slot, stage in _STAGES.items():
        more = extra.get(stage.name, ())
        wanted = Stage(stage.name, (*stage.passes, *more)) if more else stage
        others = tuple(one for one in passes_in(slot) if not isinstance(one, Stage))
        options[slot] = as_slot_value((*others, wanted))
    return options


def _members(present: Any) -> tuple[Any, ...]:
    """The passes in a slot."""
    if present is None:
        return ()
    if isinstance(present, PassChain):
        return present.passes
    return tuple(present) if isinstance(present, (list, tuple)) else (present,)


def as_slot_value(members: tuple[Any, ...]) -> Any:
    """Passes in the simplest form that a slot takes."""
    if len(members) < 2:
        return members[0] if members else None
    return list(members) if slots_take_lists() else PassChain(members)


def _scopes(slot: str) -> tuple[bool, ...]:
    """For all threads, and in this one too if it has a value of its own."""
    return (True, False) if is_set_here(slot) else (True,)


def _put(slot: str, members: tuple[Any, ...], everywhere: bool) -> None:
    value = as_slot_value(members)
    if everywhere and slots_take_lists() and value is not None:
        value = members  # a default that is one pass would be copied by whoever reads it
    set_pass_slot(slot, value, everywhere=everywhere)


def _drop(key: int) -> None:
    with _lock:
        _users.pop(key, None)
        if _users:
            return
        for slot, stage in _STAGES.items():
            for everywhere in _scopes(slot):
                present = _members(get_pass_slot(slot, everywhere=everywhere))
                if stage in present:
                    rest = tuple(one for one in present if one is not stage)
                    _put(slot, rest, everywhere)
