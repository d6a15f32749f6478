"""How an op is registered: schema, eager kernel, fake, and an error instead of a wrong gradient.

`Library.define` is used rather than `torch.library.custom_op`, whose in-place ops cost four times
as much per call. A schema is never edited: a changed signature gets a new name, since compile
caches remember schemas by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._compat import below_autograd, register_functional_rule
from ..errors import InputError
from ..layout import PackedTiles, TileCache

__all__ = ["CACHE_ARGS", "CACHE_MUTATED_ARGS", "CACHE_RETURNS", "SHARED_ARGS", "define"]

# Module level: ops vanish when their Library is collected.
_LIBRARY = torch.library.Library("kvarn", "DEF")

CACHE_ARGS = ", ".join(f"Tensor {name}" for name in TileCache._fields)
CACHE_MUTATED_ARGS = ", ".join(
    f"Tensor({chr(ord('a') + i)}!) {name}" for i, name in enumerate(TileCache._fields)
)
SHARED_ARGS = ", ".join(f"Tensor shared_{name}" for name in PackedTiles._fields)
CACHE_RETURNS = ", ".join(["Tensor"] * len(TileCache._fields))

_NO_GRADIENT = (
    "backward through a quantized KV cache is not defined: rounding has no gradient. Run the model "
    "under torch.no_grad() or torch.inference_mode(), or train without a KVarN cache."
)


def define(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    traced: Callable[..., Any] | None = None,
) -> Any:
    """Register `kvarn::<name>` and return its default overload.

    Parameters
    ----------
    schema : str
        Arguments and returns, without the name.
    kernel : callable
        Eager implementation for all devices; validates its inputs.
    fake : callable
        Shapes and dtypes of the result only.
    traced : callable, optional
        `rule(mode, op, types, args, kwargs)` that decomposes the op when it is compiled.
    """
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _LIBRARY.define(f"{name}{schema}", tags=tags)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kvarn::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.kvarn, name).default

    def autograd(*args: Any, **kwargs: Any) -> Any:
        with below_autograd():
            result = op(*args, **kwargs)
        if not torch.is_grad_enabled():
            return result
        sources = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
        if not sources:
            return result
        if isinstance(result, Tensor):
            return _NoGradient.apply(result, *sources)
        return result

    _LIBRARY.impl(name, autograd, "Autograd")
    if traced is not None:
        register_functional_rule(f"kvarn::{name}", traced, _LIBRARY)
    return op


class _NoGradient(torch.autograd.Function):
    """Identity whose backward explains why there is none."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise InputError(_NO_GRADIENT)
