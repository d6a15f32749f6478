"""Prove where a program writes its cache, and which tokens each query sees.

A dense cache may be replaced if the new tokens go to the next free slots, one after the other. An
attention needs no mask if each query sees all tokens up to its own and no slot behind. Both are
run at every position that the cache has, with the program's own index and mask computations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvarn_ops._compat import size_expression
from kvarn_ops.errors import reason

from .axes import Node, number, value_of
from .evaluate import Evaluator, Sources
from .static_cache import CacheWrite

__all__ = ["MaskVerdict", "Prover"]


@dataclass(frozen=True)
class MaskVerdict:
    """`causal`: the mask is the causal one and not needed. Otherwise it has to be passed on.

    `refused` is why neither is possible.
    """

    causal: bool
    refused: str = ""
    note: str = ""


class _Fails(Exception):
    """The program itself raises at a position that the cache has room for."""


@dataclass
class Prover:
    """Proofs about one program; results are kept, since layers share masks.

    Parameters
    ----------
    evaluator : Evaluator
        For the program.
    ranges : dict
        Smallest and largest value of each unknown size, by its sympy symbol.
    """

    evaluator: Evaluator
    ranges: dict[Any, tuple[int, int]]
    _positions: dict[Any, Sources | str] = field(default_factory=dict)
    _masks: dict[Any, MaskVerdict] = field(default_factory=dict)

    def position(self, write: CacheWrite) -> Sources | str:
        """What gives the position from which on `write` fills the slots, or why none does."""
        key = (self.evaluator.signature(write.position), number(write.count), _capacity(write))
        if key not in self._positions:
            try:
                self._positions[key] = self._prove_position(write)
            except _Fails as error:
                self._positions[key] = str(error)
        return self._positions[key]

    def mask(
        self,
        write: CacheWrite,
        sources: Sources,
        mask: Node | None,
        is_causal: bool,
        length: Node | int,
    ) -> MaskVerdict:
        """What the queries of an attention see.

        Parameters
        ----------
        write : CacheWrite
            Of the keys.
        sources : Sources
            Of that write.
        mask : torch.fx.Node, optional
            The attention's mask, bool or float, broadcast to `[B, H_q, S, length]`.
        is_causal : bool
            Query `i` sees keys `0 ... i`, as SDPA has it.
        length : torch.fx.Node or int
            How many slots the attention reads.
        """
        sizes = (number(write.count), _capacity(write), write.shifts)
        inputs = [self.evaluator.signature(node) for node in (mask, length)]
        key = (*inputs, is_causal, sources, sizes)
        if key not in self._masks:
            try:
                self._masks[key] = self._judge_mask(write, sources, mask, is_causal, length)
            except _Fails as error:
                self._masks[key] = MaskVerdict(False, str(error))
        return self._masks[key]

    def shifted(self, write: CacheWrite, mask: Node | None) -> Sources | str:
        """What gives the position of a cache that shifts: only its mask can tell."""
        sources = self.evaluator.sources([mask])
        if sources.single is None or self._unusable(sources):
            return "its tokens are shifted, and no mask tells how many there are"
        return sources

    def _prove_position(self, write: CacheWrite) -> Sources | str:
        sources = self.evaluator.sources([write.position])
        problem = self._unusable(sources)
        if problem:
            return f"the slots that are written depend on {problem}"
        if not isinstance(write.count, int) and size_expression(write.count) not in self.ranges:
            return f"the number of new tokens is {write.count}, which is no size of an input"
        wanted = {"slots": write.position}
        for position, sizes, count in self._cases(write, sources):
            steps = torch.arange(position, position + count)
            slots = self._run(wanted, sources.single, position, sizes)["slots"]
            found = _slots(slots, count)
            if found.shape != steps.shape or not torch.equal(found, steps):
                given = found.flatten()[:4].tolist()
                return f"at position {position}, {count} tokens are written to slots {given}..."
        return sources

    def assumes_consecutive(self, write: CacheWrite, sources: Sources, nodes: list[Any]) -> bool:
        """Whether `nodes` are what was proven only if the position's elements are consecutive."""
        source = sources.single
        if source is None or value_of(source) is None:
            return False
        sizes = max(self._cases(write, sources), key=lambda case: (case[2], -case[0]))[1]
        wanted = {str(index): node for index, node in enumerate(nodes)}
        plain = self.evaluator(wanted, source, 0, sizes)
        try:
            other = self.evaluator(wanted, source, 0, sizes, disturb=1)
        except (IndexError, RuntimeError):  # beyond the end of a table
            return True
        return any(
            isinstance(value, Tensor) and not torch.equal(value, other[name])
            for name, value in plain.items()
        )

    def _judge_mask(
        self,
        write: CacheWrite,
        written: Sources,
        mask: Node | None,
        is_causal: bool,
        length: Node | int,
    ) -> MaskVerdict:
        sources = self.evaluator.sources([mask, length])
        others = {node.name for node in sources.positions - written.positions}
        unknown = sorted(sources.unknown | others)
        if unknown:
            if mask is None or is_causal or self.evaluator.sources([length]).unknown:
                return MaskVerdict(False, f"how far it reads depends on {', '.join(unknown)}")
            return MaskVerdict(False, note=f"the mask depends on {', '.join(unknown)}")
        source, wanted = written.single, {"mask": mask, "length": length}
        causal = True
        for position, sizes, count in self._cases(write, written):
            values = self._run(wanted, source, position, sizes)
            seen, exact = _seen(
                values["mask"], is_causal, int(values["length"]), count, _capacity(write)
            )
            end = position + count
            if write.shifts:  # token t lies in slot t + capacity - end
                seen = seen.roll(end, -1)
            if end < seen.shape[-1] and bool(seen[..., end:].any()):
                return MaskVerdict(
                    False, f"at position {position} it sees slots that hold no token yet"
                )
            wanted_here = _causal(position, count, seen.device)
            causal = causal and exact and bool((seen[..., :end] == wanted_here).all())
        if causal:
            return MaskVerdict(True)
        if is_causal:
            return MaskVerdict(
                False, "is_causal=True counts from the first slot, not from the queries' position"
            )
        if write.shifts:
            return MaskVerdict(False, "its tokens are shifted, and its mask is not the causal one")
        if mask is None:
            return MaskVerdict(False, "without a mask, a query sees tokens after its own")
        return MaskVerdict(False, note="the mask is not the causal one")

    def _run(
        self, wanted: dict[str, Any], source: Node | None, position: int, sizes: dict[Any, int]
    ) -> dict[str, Any]:
        try:
            return self.evaluator(wanted, source, position, sizes)
        except (IndexError, RuntimeError, ValueError) as error:
            raise _Fails(f"the program fails at position {position}: {reason(error)}") from error

    def _unusable(self, sources: Sources) -> str:
        if sources.unknown:
            return ", ".join(sorted(sources.unknown))
        if len(sources.positions) > 1:
            return "several inputs: " + ", ".join(sorted(n.name for n in sources.positions))
        return ""

    def _cases(self, write: CacheWrite, sources: Sources) -> list[tuple[int, dict[Any, int], int]]:
        """Positions, sizes and numbers of new tokens to try: every position, and every query."""
        capacity, count = _capacity(write), write.count
        sizes = {symbol: max(low, min(3, high)) for symbol, (low, high) in self.ranges.items()}
        if isinstance(count, int):
            last = capacity - count if sources.positions else 0
            return [(position, sizes, count) for position in range(last + 1)]
        symbol = size_expression(count)
        low, high = self.ranges[symbol]
        low, high = max(low, 1), min(high, capacity)
        cases = []
        for tokens in sorted({low, min(low + 1, high), (low + high) // 2, high}):
            last = capacity - tokens if sources.positions else 0
            where = range(last + 1) if tokens == low else {0, min(1, last), last // 2, last}
            cases += [(position, sizes | {symbol: tokens}, tokens) for position in sorted(where)]
        return cases


def _capacity(write: CacheWrite) -> int:
    return value_of(write.buffer).shape[write.axis]


def _slots(value: Any, count: int) -> Tensor:
    """The slots that are written, from an index tensor or the first slot."""
    if isinstance(value, Tensor):
        found = value.cpu().long()
        return found.reshape(1) if found.ndim == 0 else found
    return torch.arange(value, value + count)


def _causal(position: int, count: int, device: torch.device) -> Tensor:
    """`[count, position + count]` bool: each query sees the tokens up to its own."""
    ones = torch.ones(count, position + count, dtype=torch.bool, device=device)
    return ones.tril(position)


def _seen(
    mask: Tensor | None, is_causal: bool, length: int, count: int, capacity: int
) -> tuple[Tensor, bool]:
    """Which of the cache's slots are seen, `[..., count, capacity]`; whether nothing is added."""
    shape, exact = (count, length), True
    if mask is None:
        seen = torch.ones(shape, dtype=torch.bool)
    elif mask.dtype == torch.bool:
        seen = mask
    else:
        seen = mask > torch.finfo(mask.dtype).min / 2
        exact = bool((mask[seen] == 0).all())
    seen = seen.expand(*seen.shape[:-2], *shape)
    if is_causal:
        seen = seen & torch.ones(shape, dtype=torch.bool, device=seen.device).tril()
    return torch.nn.functional.pad(seen, (0, capacity - length)), exact
