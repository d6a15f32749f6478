"""What was found out about a cache module: which method takes what, and what it returns."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

__all__ = ["REQUIRED", "Parameter", "Plan", "Update", "parameters_of"]


class _Required:
    def __repr__(self) -> str:
        return "required"

    def __reduce__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, without `self`."""

    name: str
    default: Any
    positional: bool
    keyword: bool


@dataclass(frozen=True)
class Update:
    """A method that writes keys and values into the buffers and returns what they hold.

    Attributes
    ----------
    name : str
    parameters : tuple of Parameter
    keys, values : int
        Which parameters take the new keys and values.
    position : int or None
        Which one takes the position of the first new token, as a tensor or an integer.
    counts : bool
        Without a position, tokens follow those that are there.
    heads_first : bool
        Keys and values come as `[B, H, S, D]`; else as `[B, S, H, D]`.
    keys_out, values_out : int
        Their places in the result.
    heads_first_out : bool
        The result is `[B, H, T, D]`; else `[B, T, H, D]`.
    as_list : bool
        The result is a list; else a tuple.
    follows : bool
        The method has state besides the buffers, or returns no more than the tokens so far: it runs
        at every call, on buffers of width 0.
    other_dtype : str
        Keys and values of another dtype than the buffers' are refused (empty), or converted and
        returned in the dtype that was `given` or that is `stored`.
    """

    name: str
    parameters: tuple[Parameter, ...]
    keys: int
    values: int
    position: int | None
    counts: bool = False
    heads_first: bool = True
    keys_out: int = 0
    values_out: int = 1
    heads_first_out: bool = True
    as_list: bool = False
    follows: bool = False
    other_dtype: str = ""

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The argument of each parameter.

        Raises
        ------
        TypeError
            As a call of the method itself would.
        InputError
            For an argument whose effect is not known.
        """
        # Not inspect.Signature.bind: this is traced by Dynamo.
        given: list[Any] = []
        for index, parameter in enumerate(self.parameters):
            if index < len(args):
                if not parameter.positional or parameter.name in kwargs:
                    raise TypeError(f"{self.name}() got unexpected positional arguments.")
                given.append(args[index])
            elif parameter.keyword and parameter.name in kwargs:
                given.append(kwargs[parameter.name])
            elif parameter.default is REQUIRED:
                raise TypeError(f"{self.name}() is missing the argument {parameter.name!r}.")
            else:
                given.append(parameter.default)
        if len(args) > len(self.parameters):
            raise TypeError(f"{self.name}() got more than {len(self.parameters)} arguments.")
        for name in kwargs:
            if all(name != parameter.name for parameter in self.parameters):
                raise TypeError(f"{self.name}() got an unexpected argument {name!r}.")
        for index, parameter in enumerate(self.parameters):
            if index in (self.keys, self.values, self.position):
                continue
            value, default = given[index], parameter.default
            plain = isinstance(value, (bool, int, float, str))
            if value is not default and not (plain and value == default):
                raise InputError(
                    f"{self.name}({parameter.name}=...) is not the default: what the argument does "
                    "to the cache is not known, so a packed cache cannot do it. Leave it out, or "
                    "call kvarn_ops.unpatch(model)."
                )
        return given

    def replaced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], keys: Any, values: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with other keys and values."""
        swapped, named = list(args), dict(kwargs)
        for index, value in ((self.keys, keys), (self.values, values)):
            if index < len(args):
                swapped[index] = value
            else:
                named[self.parameters[index].name] = value
        return tuple(swapped), named


@dataclass(frozen=True)
class Plan:
    """All that is needed to replace the buffers of a cache module.

    Attributes
    ----------
    keys, values : str
        The attributes that hold them.
    heads_first : bool
        The buffers are `[B, H, T, D]`; else `[B, T, H, D]`.
    updates : tuple of Update
    resets : tuple of str
        Methods without arguments that empty the buffers.
    refused : tuple of str
        Other methods that use the buffers in ways which were not understood.
    """

    keys: str
    values: str
    heads_first: bool
    updates: tuple[Update, ...]
    resets: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def parameters_of(function: Any) -> tuple[Parameter, ...] | None:
    """The parameters of a method without `self`; None if they are not of fixed number."""
    try:
        found = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):
        return None
    kinds = inspect.Parameter
    if any(one.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD) for one in found):
        return None
    return tuple(
        Parameter(
            one.name,
            REQUIRED if one.default is kinds.empty else one.default,
            one.kind is not kinds.KEYWORD_ONLY,
            one.kind is not kinds.POSITIONAL_ONLY,
        )
        for one in found
    )
