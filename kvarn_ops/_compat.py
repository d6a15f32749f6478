"""What differs between releases of torch and transformers, and every private import of torch.

Checked on torch 2.11.0, 2.12.1 and 2.13.0, transformers 4.57.6, 5.0.0 and 5.17.0 to 5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch._guards import CompileContext, TracingContext, detect_fake_mode
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.utils._config_module import _UNSET_SENTINEL

__all__ = [
    "auto_functionalized_v2",
    "bases_to_clone",
    "below_autograd",
    "cache_capacity",
    "current_compilation",
    "fused_multiply_add",
    "get_pass_slot",
    "graphs_from_cache",
    "hint_of",
    "hint_size",
    "is_compiling",
    "is_saved",
    "is_set_here",
    "is_unbacked",
    "keeps_custom_ops",
    "mark_static",
    "maybe_dynamic",
    "new_slots",
    "query_count",
    "register_functional_rule",
    "set_pass_slot",
    "size_expression",
    "slots_take_lists",
    "tensor_version",
    "trace_scalars",
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


def trace_scalars() -> None:
    """From here on in this compilation, let `.item()` give a symbolic size, as `fullgraph` does.

    Without it, code compiled with graph breaks allowed (the default) breaks at our ops. Inductor
    evaluates the graph once more, so this is not undone; the mode ends with the compilation.
    """
    mode = detect_fake_mode()
    if mode is not None:
        mode.allow_scalar_outputs = True


def hint_size(size: Any, value: int) -> None:
    """Tell Inductor what to assume of a data-dependent size; without it (torch < 2.13) no fusion
    across loops of that size is found, which costs speed only.
    """
    override = getattr(torch._dynamo, "override_optimization_hint", None)
    if override is not None:
        override(size, value)


def fused_multiply_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """`a * b + c` in one instruction where Inductor has a name for it; its C++ code never contracts
    a product and a sum by itself.
    """
    from torch._inductor import inductor_prims

    prim = getattr(inductor_prims, "fma", None)
    return a * b + c if prim is None else prim(a, b, c)


def size_expression(size: torch.SymInt) -> Any:
    """The sympy expression of an unknown size. Reading it adds no guard, as a comparison would."""
    return size.node.expr


def is_saved(module: torch.nn.Module, buffer: str) -> bool:
    """Whether a buffer of a module is in its `state_dict`."""
    return buffer not in module._non_persistent_buffers_set


def is_unbacked(size: torch.SymInt) -> bool:
    """Whether a size depends on data, so that it is unknown even for known input shapes."""
    from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

    return has_free_unbacked_symbols(size)


def is_compiling() -> bool:
    """Whether Dynamo or torch.export is tracing."""
    return torch.compiler.is_compiling()


def below_autograd() -> Any:
    """Context in which ops skip their Autograd kernels."""
    return torch._C._AutoDispatchBelowAutograd()


def mark_static(tensor: torch.Tensor) -> None:
    """Promise that a tensor keeps its address, so that compiled graphs may mutate it in place."""
    torch._dynamo.mark_static_address(tensor)


def query_count(query: Any) -> Any:
    """How many tokens are new, from what `get_mask_sizes` is called with.

    That is their number; up to transformers 5.0 it was their slots, a tensor.
    """
    return query.shape[0] if isinstance(query, torch.Tensor) else query


def new_slots(mask_kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Number and first slot of the new tokens, from what a mask function is called with.

    Up to transformers 5.0 that was their slots, `cache_position` `[S]`.
    """
    slots = mask_kwargs.get("cache_position")
    if slots is None:
        return mask_kwargs["q_length"], mask_kwargs["q_offset"]
    return slots.shape[0], slots[0]


def maybe_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Let compiled code accept any size of a dimension from the start, if it can."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def tensor_version(tensor: torch.Tensor) -> int:
    """A number that changes when a tensor is changed in place (0 for tensors that count none)."""
    return 0 if tensor.is_inference() else tensor._version


def cache_capacity(cache: Any) -> int:
    """Tokens per row that fit into a static cache. `Cache.get_max_length` came after 5.0."""
    if hasattr(cache, "get_max_length"):
        return cache.get_max_length()
    return max(layer.get_max_cache_shape() for layer in cache.layers)


def current_compilation() -> tuple[str, Any]:
    """Name of what is being compiled ("0/0"; "" outside Dynamo), and an object, the same in all its
    stages, that can be weakly referenced (None: there is none).
    """
    name = CompileContext.current_compile_id()
    return "" if name is None else str(name), TracingContext.try_get()


def slots_take_lists() -> bool:
    """Whether a custom pass slot of Inductor takes several passes (torch 2.13; 2.11 takes one)."""
    from torch._inductor import custom_graph_pass

    return hasattr(custom_graph_pass, "get_custom_graph_passes")


def get_pass_slot(slot: str, *, everywhere: bool = False) -> Any:
    """What a slot of Inductor's config holds in this context, or by default in all threads."""
    entry = _pass_slot(slot)
    if everywhere and _is_set_by_thread(entry):
        return entry.default
    return getattr(_inductor_config(), slot)


def set_pass_slot(slot: str, value: Any, *, everywhere: bool) -> None:
    """Set a slot in this context, or by default in all threads.

    From torch 2.13 on an assignment to Inductor's config is seen in one thread only. A default is
    copied into every context that reads it, unless it is a tuple or None.
    """
    entry = _pass_slot(slot)
    if everywhere and _is_set_by_thread(entry):
        entry.default = tuple(value) if isinstance(value, list) else value
    else:
        setattr(_inductor_config(), slot, value)


def is_set_here(slot: str) -> bool:
    """Whether a slot has a value in this context that hides the default of all threads."""
    entry = _pass_slot(slot)
    return _is_set_by_thread(entry) and entry.user_override.get() is not _UNSET_SENTINEL


def _inductor_config() -> Any:
    import torch._inductor.config  # takes a second, and packages that `import kvarn_ops` does not

    return torch._inductor.config


def _pass_slot(slot: str) -> Any:
    return _inductor_config()._config[slot]


def _is_set_by_thread(entry: Any) -> bool:
    return isinstance(getattr(entry, "user_override", None), ContextVar)


def bases_to_clone(graph: torch.fx.Graph) -> list[tuple[torch.fx.Node, int]]:
    """Functionalized in-place ops, and those of their bases that Inductor would copy.

    Inductor decides after its last hook for passes. Its analysis runs here on a copy of the graph.
    """
    from torch._dynamo.utils import ReinplaceCounters
    from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops_core

    twin = torch.fx.Graph(graph.owning_module)
    twins: dict[torch.fx.Node, torch.fx.Node] = {}
    twin.output(twin.graph_copy(graph, twins))
    wrapped = [node for node in twins if node.target is auto_functionalized_v2]
    counts = dict(ReinplaceCounters._values)
    try:
        reinplace_inplaceable_ops_core(twin)
    finally:
        ReinplaceCounters._values.clear()
        ReinplaceCounters._values.update(counts)
    return [
        (node, index)
        for node in wrapped
        for index in twins[node].meta.get("only_clone_these_tensors", ())
    ]


def hint_of(size: Any) -> int:
    """A size, or what a symbolic one was when it was traced; 0 if nobody knows."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def graphs_from_cache() -> int:
    """How many graphs Inductor took from its cache on disk since the last `counters.clear()`."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_hit"]
