"""Every private import of torch, in one place, with the versions it was checked on.

Checked on torch 2.11.0 and 2.13.0 (CPU).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._subclasses.functional_tensor import FunctionalTensorMode

__all__ = [
    "auto_functionalized_v2",
    "below_autograd",
    "hint_size",
    "is_compiling",
    "keeps_custom_ops",
    "mark_static",
    "register_functional_rule",
]


def register_functional_rule(op_name: str, rule: Callable[..., Any], lib: Any) -> None:
    """Call `rule(mode, op, types, args, kwargs)` when AOTAutograd traces `op_name`.

    The rule may decompose the op into others, with its own control flow and unbacked sizes, which
    a decomposition table cannot. `triton_op` uses the same mechanism.
    """
    torch.library.register_torch_dispatch(op_name, FunctionalTensorMode, rule, lib=lib)


def keeps_custom_ops() -> bool:
    """Whether the running trace (torch.export) wants custom ops left whole."""
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    return custom_triton_ops_decomposition_disabled()


def hint_size(size: Any, value: int) -> None:
    """Tell Inductor what to assume of a data-dependent size; without it (torch < 2.13) no fusion
    across loops of that size is found, which costs speed only.
    """
    override = getattr(torch._dynamo, "override_optimization_hint", None)
    if override is not None:
        override(size, value)


def is_compiling() -> bool:
    """Whether Dynamo or torch.export is tracing."""
    return torch.compiler.is_compiling()


def below_autograd() -> Any:
    """Context in which ops skip their Autograd kernels."""
    return torch._C._AutoDispatchBelowAutograd()


def mark_static(tensor: torch.Tensor) -> None:
    """Promise that a tensor keeps its address, so that compiled graphs may mutate it in place."""
    torch._dynamo.mark_static_address(tensor)
