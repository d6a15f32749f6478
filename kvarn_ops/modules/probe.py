"""Find out by trying how a method of a cache module is called, and whether it is an update.

A guess says which parameters take keys, values and the position, and in which order the dimensions
are. It is true if, on copies full of noise, every call of a series puts exactly the new tokens at
exactly their positions of both buffers, leaves all else alone, and returns the buffers, whole or up
to the last token.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import reason as said
from .plan import REQUIRED, Parameter, Update, parameters_of
from .subject import Subject, same_state

__all__ = ["MIN_TOKENS", "Found", "NotAnUpdate", "call", "try_method"]

MIN_TOKENS = 8  # room for the longest series below
_MAX_PARAMETERS = 6

# Position and number of the new tokens, call by call. Prefill, decode, a chunk; then back.
_FORWARD = ((0, 3), (3, 1), (4, 2))
_BACK = ((1, 1),)
_POSITION_FORMS = ("tensor", "rows", "int", "scalar", "start")


class NotAnUpdate(Exception):
    """Why a guess is wrong; `stage` says how far it came, `dense` that the buffers are a window."""

    def __init__(self, stage: int, reason: str, dense: bool = False) -> None:
        super().__init__(reason)
        self.stage, self.dense = stage, dense


@dataclass(frozen=True)
class Found:
    """A true guess: the update, which attribute holds the keys, and the layout of the buffers."""

    update: Update
    swapped: bool
    buffers_heads_first: bool
    form: str | None


def try_method(subject: Subject, name: str, function: Any) -> Found:
    """The first true guess about a method.

    Raises
    ------
    NotAnUpdate
        The reason of the guess that came furthest, if all are wrong.
    """
    parameters = parameters_of(function)
    if parameters is None or not 2 <= len(parameters) <= _MAX_PARAMETERS:
        raise NotAnUpdate(0, f"it does not take 2 to {_MAX_PARAMETERS} named arguments")
    best = NotAnUpdate(0, "no argument can be keys and values")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        for guess, buffers_heads_first, form in _guesses(name, parameters):
            try:
                return _Trial(subject, guess, buffers_heads_first, form).run()
            except NotAnUpdate as wrong:
                if wrong.dense:
                    raise
                if wrong.stage > best.stage:
                    best = wrong
    raise best


def _guesses(
    name: str, parameters: tuple[Parameter, ...]
) -> Iterator[tuple[Update, bool, str | None]]:
    places = range(len(parameters))
    required = {place for place in places if parameters[place].default is REQUIRED}
    # Nothing in a cache tells keys from values: keys are taken to come first.
    for keys, values in combinations(places, 2):
        rest = [place for place in places if place not in (keys, values)]
        for position in (*rest, None):
            if not required <= {keys, values, position}:
                continue
            for buffers_heads_first in (True, False):
                for heads_first in (buffers_heads_first, not buffers_heads_first):
                    for form in (None,) if position is None else _POSITION_FORMS:
                        guess = Update(
                            name, parameters, keys, values, position, heads_first=heads_first
                        )
                        yield guess, buffers_heads_first, form


def call(
    instance: nn.Module, update: Update, keys: Tensor, values: Tensor, position: Any = None
) -> Any:
    """Call the method on a copy; a position of None is left out."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    roles = {update.keys: keys, update.values: values}
    if update.position is not None and position is not None:
        roles[update.position] = position
    for place, parameter in enumerate(update.parameters):
        value = roles.get(place, parameter.default)
        if not parameter.keyword:
            args.append(value)
        elif place in roles:
            kwargs[parameter.name] = value
    return getattr(instance, update.name)(*args, **kwargs)


def positions(form: str | None, start: int, count: int, batch: int) -> Any:
    """The positions of `count` tokens in one of the forms in which methods take them."""
    if form is None:
        return None
    slots = torch.arange(start, start + count)
    return {
        "tensor": slots,
        "rows": slots.expand(batch, count).contiguous(),
        "int": start,
        "scalar": torch.tensor(start),
        "start": torch.tensor([start]),
    }[form]


class _Trial:
    def __init__(
        self, subject: Subject, guess: Update, buffers_heads_first: bool, form: str | None
    ) -> None:
        self.subject, self.guess, self.form = subject, guess, form
        self.buffers_heads_first = buffers_heads_first
        batch, heads, tokens, width = subject.shape
        if not buffers_heads_first:
            heads, tokens = tokens, heads
        self.batch, self.heads, self.tokens, self.width = batch, heads, tokens, width
        self.swapped: bool | None = None
        self.seen: tuple[int, int, bool, bool, bool] | None = None  # what a result looks like

    def run(self) -> Found:
        if self.tokens < MIN_TOKENS:
            raise NotAnUpdate(0, f"the buffers have room for {self.tokens} tokens")
        series = _FORWARD + (_BACK if self.form else ())
        instance = self.subject.copy()
        empty = self.subject.state(instance)
        for start, count in series:
            self._step(instance, self.form, start, count)
        full = self.subject.state(instance)
        self._check_end()
        assert self.seen is not None
        keys_out, values_out, heads_first_out, whole, as_list = self.seen
        follows = not whole or not same_state(empty, full)
        if follows:
            self._check_hollow(series, full, heads_first_out, whole)
        update = replace(
            self.guess,
            counts=self.form is None or self._counts(),
            keys_out=keys_out,
            values_out=values_out,
            heads_first_out=heads_first_out,
            as_list=as_list,
            follows=follows,
            other_dtype=self._other_dtype(),
        )
        return Found(update, bool(self.swapped), self.buffers_heads_first, self.form)

    def _step(self, instance: nn.Module, form: str | None, start: int, count: int) -> None:
        """One call, and all that has to hold after it."""
        keys, values = self._noise(count), self._noise(count)
        before = [buffer.clone() for buffer in self._canonical(instance)]
        result = self._call(instance, form, start, keys, values)
        after = self._canonical(instance)
        if any(old.shape != new.shape for old, new in zip(before, after, strict=True)):
            raise NotAnUpdate(1, "it changes the size of the buffers")
        landed = [_landing(*both, new) for both, new in zip(zip(before, after), (keys, values))]
        crossed = [_landing(*both, new) for both, new in zip(zip(before, after), (values, keys))]
        swapped = None not in crossed
        places = crossed if swapped else landed
        if None in places or self.swapped not in (None, swapped):
            raise NotAnUpdate(1, "it does not write just the new keys and values to both buffers")
        self.swapped = swapped
        if places != [start, start]:
            held = places[0] if form is None and start == 0 else None
            if held:
                raise NotAnUpdate(4, f"it continues at token {held}: empty the cache, then patch")
            raise NotAnUpdate(2, "it writes tokens to other positions")
        pair = after[::-1] if swapped else after
        seen = _looks(result, pair, start + count)
        if seen is None:
            raise NotAnUpdate(3, "it does not return a pair of the buffers, whole or up to the end")
        if self.seen not in (None, seen):
            raise NotAnUpdate(3, "what it returns differs from call to call")
        self.seen = seen

    def _check_end(self) -> None:
        """Nothing may be written beyond the last token: a window would go round."""
        instance = self.subject.copy()
        try:
            if self.form is None:
                self._call(instance, None, 0, self._noise(self.tokens), self._noise(self.tokens))
            before = [buffer.clone() for buffer in self._canonical(instance)]
            self._call(instance, self.form, self.tokens, self._noise(1), self._noise(1))
        except NotAnUpdate:
            return
        for old, new in zip(before, self._canonical(instance), strict=True):
            if old.shape != new.shape or not torch.equal(old, new):
                raise NotAnUpdate(5, "its oldest tokens are overwritten (a window)", dense=True)

    def _check_hollow(
        self, series: tuple[tuple[int, int], ...], full: dict[str, Any], first: bool, whole: bool
    ) -> None:
        """The method has to do without the width of the heads."""
        instance = self.subject.copy(width=0)
        for start, count in series:
            try:
                result = self._call(
                    instance, self.form, start, self._noise(count, 0), self._noise(count, 0)
                )
            except NotAnUpdate as error:
                raise NotAnUpdate(4, f"it needs the width of the heads: {error}") from None
            length = self.tokens if whole else start + count
            shape = [self.batch, self.heads, length, 0]
            shape = shape if first else [shape[place] for place in (0, 2, 1, 3)]
            if any(list(part.shape) != shape for part in result):
                raise NotAnUpdate(4, "how many tokens it returns depends on their values")
        if not same_state(full, self.subject.state(instance)):
            raise NotAnUpdate(4, "its state depends on the values of keys and values")

    def _counts(self) -> bool:
        """Whether a position may also be left out, then and after calls with one."""
        assert self.guess.position is not None
        if self.guess.parameters[self.guess.position].default is REQUIRED:
            return False
        try:
            for form in (None, self.form):
                instance = self.subject.copy()
                self._step(instance, form, 0, 3)
                self._step(instance, None, 3, 1)
        except NotAnUpdate:
            return False
        return True

    def _other_dtype(self) -> str:
        """What becomes of keys and values whose dtype is not that of the buffers."""
        stored = self.subject.dtype
        given = torch.bfloat16 if stored == torch.float32 else torch.float32
        try:
            new = self._noise(3).to(given)
            result = self._call(self.subject.copy(), self.form, 0, new, new)
        except NotAnUpdate:
            return ""
        kinds = {part.dtype for part in result}
        return "given" if kinds == {given} else "stored" if kinds == {stored} else ""

    def _call(
        self, instance: nn.Module, form: str | None, start: int, keys: Tensor, values: Tensor
    ) -> Any:
        if not self.guess.heads_first:
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        count = keys.shape[2 if self.guess.heads_first else 1]
        position = positions(form, start, count, self.batch)
        try:
            return call(instance, self.guess, keys, values, position)
        except Exception as error:  # a wrong guess may fail in any way
            raise NotAnUpdate(0, f"{type(error).__name__}: {said(error)}") from None

    def _noise(self, count: int, width: int | None = None) -> Tensor:
        shape = (self.batch, self.heads, count, self.width if width is None else width)
        return torch.randn(shape).to(self.subject.dtype)

    def _canonical(self, instance: nn.Module) -> list[Tensor]:
        """The buffers as `[B, H, T, D]`."""
        pair = self.subject.buffers(instance)
        return [each if self.buffers_heads_first else each.transpose(1, 2) for each in pair]


def _landing(before: Tensor, after: Tensor, new: Tensor) -> int | None:
    """Where in `[B, H, T, D]` exactly the tokens `new` were written, if so."""
    if after.shape[:2] != new.shape[:2] or after.shape[3] != new.shape[3]:
        return None
    changed = (before != after).any(3).any(1).any(0).nonzero().flatten().tolist()
    if not changed or changed != list(range(changed[0], changed[0] + new.shape[2])):
        return None
    return changed[0] if torch.equal(after[:, :, changed], new) else None


def _looks(
    result: Any, pair: list[Tensor], length: int
) -> tuple[int, int, bool, bool, bool] | None:
    """Keys' and values' places in a result, heads first, whole, a list; None if it is no such."""
    if type(result) not in (tuple, list) or len(result) != 2:
        return None
    if not all(isinstance(part, Tensor) and part.ndim == 4 for part in result):
        return None
    for order in ((0, 1), (1, 0)):
        for heads_first in (True, False):
            for whole in (True, False):
                for place, buffer in zip(order, pair, strict=True):
                    part = result[place] if heads_first else result[place].transpose(1, 2)
                    wanted = buffer if whole else buffer[:, :, :length]
                    if part.dtype != wanted.dtype or not torch.equal(part, wanted):
                        break
                else:
                    return (*order, heads_first, whole, type(result) is list)
    return None
