"""How tokens reach a cache: teacher-forced in blocks, all at once, or free running.

`decode` feeds one token per forward, as generation does. `pseudo` feeds blocks: within a block
tokens meet exactly, earlier tiles are read quantized. `prefill` feeds everything at once: no
quantized token is ever read, so every method scores 0 there. It is the control that shows nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import KVarNConfig

__all__ = [
    "PROTOCOLS",
    "Protocol",
    "free_running",
    "last_logits_only",
    "protocol",
    "teacher_forced",
]

PROTOCOLS = ("decode", "pseudo", "prefill")

Tick = Callable[[], None]


class Protocol(NamedTuple):
    """Which tokens go into one forward."""

    name: str
    prefix: int  # tokens of the first forward, which reads nothing quantized
    block: int  # tokens of each later forward

    def spans(self, length: int) -> list[range]:
        """Positions of each forward over `length` tokens."""
        starts = [0, *range(self.prefix, length, self.block)] if self.prefix else [0]
        stops = [*starts[1:], length]
        return [range(a, b) for a, b in zip(starts, stops, strict=True) if b > a]

    def scored(self, length: int) -> range:
        """Positions whose logits are compared."""
        return range(self.prefix, length)


def protocol(name: str, config: KVarNConfig, block: int) -> Protocol:
    """The protocol by name; its prefix ends before the first tile of `config` is complete."""
    if name == "prefill":
        return Protocol(name, 0, 0)
    prefix = config.num_sink_tokens + config.tail_tokens + config.group_size // 2
    return Protocol(name, prefix, 1 if name == "decode" else block)


def last_logits_only(model: Any) -> dict[str, int]:
    """Arguments for the last position alone: a large vocabulary makes the others expensive."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if known else {}


@torch.no_grad()
def teacher_forced(
    model: Any, cache: Any, ids: Tensor, protocol: Protocol, tick: Tick | None = None
) -> Iterator[tuple[range, Tensor]]:
    """Run `ids` `[B, n]` int64 through the model; yields positions and their logits `[B, s, V]`."""
    for span in protocol.spans(ids.shape[1]):
        block = ids[:, span.start : span.stop]
        logits = model(input_ids=block, past_key_values=cache, use_cache=True).logits
        if tick is not None:
            tick()
        if span.start >= protocol.prefix:
            yield span, logits


@torch.no_grad()
def free_running(
    model: Any,
    cache: Any,
    prompts: Tensor,
    steps: int,
    attention_mask: Tensor | None = None,
    stop_ids: frozenset[int] = frozenset(),
    tick: Tick | None = None,
) -> Tensor:
    """Greedy continuation of prompts `[B, n]` int64: `[B, at most steps]` int64.

    Parameters
    ----------
    attention_mask : Tensor or None
        `[B, n]` int64 for left-padded prompts.
    stop_ids : frozenset of int
        A row is finished after one of these; what follows in the row is meaningless. The run ends
        when all rows are finished.
    """
    new, mask = prompts, attention_mask
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    stops = torch.tensor(sorted(stop_ids), device=prompts.device)
    out = []
    for step in range(steps):
        extra = {} if mask is None else {"attention_mask": mask}
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            extra["position_ids"] = positions[:, -new.shape[1] :]
        keep = last_logits_only(model) if step == 0 else {}
        logits = model(input_ids=new, past_key_values=cache, use_cache=True, **extra, **keep).logits
        new = logits[:, -1].argmax(-1, keepdim=True)
        out.append(new)
        finished |= torch.isin(new[:, 0], stops)
        if tick is not None:
            tick()
        if bool(finished.all()):
            break
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)
    return torch.cat(out, dim=-1)
