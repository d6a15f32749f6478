"""Fold the Hadamard rotation `H` of values into the projections around the cache.

Before: `v_proj -> cache: rotate, encode ... attention: decode, sum, rotate back -> o_proj`
After:  `v_proj F H -> cache: encode ... attention: decode, sum -> H^T F^-1 o_proj`

The same function in exact arithmetic: weights are multiplied once instead of values at every
encode and outputs at every step. `F` is a factor per channel, since `plus` cannot equalize channels
that arrive rotated; 1 for `paper`. No pass over a graph: it acts on a model, before anything is
traced, where a trial run shows that nothing lies between the projections and the cache.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from kvarn_ops.errors import CacheError, UnsupportedModelError, reason
from kvarn_ops.hadamard import hadamard
from kvarn_ops.hf.adapter import PatchRecord, attention_configs
from kvarn_ops.hf.frame import FOLDED, Folded
from kvarn_ops.reference.normalize import equalizer

from .fold_probe import Wiring, eager_eval, find_wirings
from .folded_linear import FOLDABLE_DTYPES, FoldedLinear, Folding, fold_linear, unfold_linear

__all__ = ["fold_rotation", "unfold_rotation"]

_logger = logging.getLogger("kvarn_ops")
_PROBE_TOKENS = 16
# How much rounding may change the outputs of a whole model; a wrong fold changes them by about 1.
_ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_ADAPTER_METHODS = ("load_adapter", "add_adapter")
ADAPTER_REFUSAL = (
    "this model was patched with fold_rotation=True, and an adapter would be added to values that "
    "are rotated: call kvarn_ops.unpatch(model) first, load the adapter, and patch again."
)


def fold_rotation(wrapper: nn.Module, model: Any, record: PatchRecord) -> None:
    """Fold where it can be done, before the hooks of the patch are attached.

    Parameters
    ----------
    wrapper : nn.Module
        What the user called `patch` with: `model`, or something around it.
    model : PreTrainedModel
        The model.
    record : PatchRecord
        Its `layers` say afterwards which are folded and why others are not; its `handles` undo the
        hooks made here.
    """
    packed = [report for report in record.layers if report.packed]
    modules = [model.get_submodule(report.module) for report in packed]
    with eager_eval(model):
        reasons = _fold_modules(wrapper, model, modules, record.config.equalizes)
    said = {
        report.index: "packed, rotation folded" if why is None else f"packed, not folded: {why}"
        for report, why in zip(packed, reasons, strict=True)
    }
    record.layers = [
        replace(report, reason=said.get(report.index, report.reason)) for report in record.layers
    ]
    folded = [m for m, why in zip(modules, reasons, strict=True) if why is None]
    for module in folded:
        record.handles.append(module.register_forward_pre_hook(_check_whole))
    if folded:
        record.guard = AdapterGuard()
        for name in _ADAPTER_METHODS:
            if hasattr(model, name):
                vars(model)[name] = functools.partial(_refuse_adapter, model)
    size = sum(_extra_bytes(part) for module in folded for part in module.modules())
    level = logging.INFO if folded else logging.WARNING
    _logger.log(
        level,
        "%s: rotation of values folded in %d of %d packed layers, %.1f MiB of weights more.%s",
        type(model).__name__,
        len(folded),
        len(packed),
        size / 2**20,
        "" if len(folded) == len(packed) else " kvarn_ops.explain(model) says why not in the rest.",
    )


def unfold_rotation(model: nn.Module, record: PatchRecord) -> None:
    """Undo `fold_rotation`, except for the handles of the record."""
    _unfold_modules(model)
    record.guard = None
    AdapterGuard.retire()
    for name in _ADAPTER_METHODS:
        own = vars(model).get(name)
        if isinstance(own, functools.partial) and own.func is _refuse_adapter:
            del vars(model)[name]


def _unfold_modules(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FoldedLinear):
            unfold_linear(module)
        vars(module).pop(FOLDED, None)


def _fold_modules(
    wrapper: nn.Module, model: Any, modules: list[nn.Module], equalize: bool
) -> list[str | None]:
    """Fold each attention module that can be folded; None, or why not."""
    if why := _why_no_module(wrapper):
        return [why] * len(modules)
    try:
        before = _outputs(model, _PROBE_TOKENS)
        wirings = find_wirings(
            model, modules, attention_configs(model), functools.partial(_outputs, model)
        )
    except Exception as error:  # whatever a model makes of token ids alone
        return [f"a trial run failed ({type(error).__name__}: {reason(error)})"] * len(modules)
    found: list[str | None] = []
    why_not = _linear_checks(model)
    for module, wiring in zip(modules, wirings, strict=True):
        why = wiring if isinstance(wiring, str) else None
        if isinstance(wiring, Wiring):
            why = why_not(wiring.values) or why_not(wiring.output)
            if why is None:
                _fold_module(module, wiring, equalize)
        found.append(why)
    if None in found:
        after = _outputs(model, _PROBE_TOKENS)
        change = ((after - before).norm() / before.norm()).item()
        if not change < _ROUNDING[model.dtype]:
            _unfold_modules(model)
            why = f"the model's outputs would change by {change:.1g}: values are read elsewhere too"
            found = [why if was is None else was for was in found]
    return found


def _fold_module(module: nn.Module, wiring: Wiring, equalize: bool) -> None:
    values, rows, output, columns = wiring
    rotation = hadamard(rows.shape[1], torch.float64)
    factor = torch.ones_like(rows, dtype=torch.float64)
    if equalize:
        factor = _channel_factors(values, rows)
    # Query head h reads KV head h // (heads per KV head), everywhere.
    read = factor.repeat_interleave(len(columns) // len(rows), dim=0)
    fold_linear(values, Folding(rows, 1 / factor, rotation, is_input=False))
    fold_linear(output, Folding(columns, read, rotation, is_input=True))
    names = {id(part): name for name, part in module.named_modules()}
    frame = "equalized and rotated by its weights" if equalize else "rotated by its weights"
    vars(module)[FOLDED] = Folded(frame, names[id(values)], names[id(output)])


def _channel_factors(values: nn.Linear, rows: Tensor) -> Tensor:
    """`[H_kv, D]` float64: what `plus` divides channels by before it rotates them.

    A cache that gets rotated values cannot do that. Here the weights say how loud a channel is,
    as far as they know: inputs are taken for equally loud and uncorrelated.
    """
    index = rows.to(values.weight.device)
    parts = values.weight.detach()[index].double()  # [H_kv, D, in]
    if values.bias is not None:
        parts = torch.cat([parts, values.bias.detach()[index].double().unsqueeze(-1)], dim=-1)
    return torch.exp2(equalizer(parts.mT).double()).cpu()


def _why_no_module(wrapper: nn.Module) -> str | None:
    for path, module in wrapper.named_modules():
        if _is_peft(module) or "base_layer" in module._modules:
            return f"{path or type(module).__name__} is an adapter: merge or unload adapters first"
    if any(parameter.is_meta for parameter in wrapper.parameters()):
        return "weights are not in memory (offloaded, or on the meta device)"
    return None


def _linear_checks(model: nn.Module) -> Callable[[nn.Linear], str | None]:
    """A function that says why a linear layer of the model is left as it is."""
    modules = [(path, module) for path, module in model.named_modules(remove_duplicate=False)]
    places = Counter(id(module) for _, module in modules)
    paths = {id(module): path for path, module in modules}
    shared = Counter(
        parameter.data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False)
    )

    def why_not(linear: nn.Linear) -> str | None:
        name, weight = paths[id(linear)].rpartition(".")[2], linear.weight
        if isinstance(linear, FoldedLinear):
            return f"{name} is folded already, by a patch of a part of this model"
        if type(linear) is not nn.Linear:
            return f"{name} is a {type(linear).__name__}: only torch.nn.Linear is folded"
        if type(weight) is not nn.Parameter or weight.dtype not in FOLDABLE_DTYPES:
            return f"{name} has quantized weights ({type(weight).__name__}, {weight.dtype})"
        tensors = [weight] if linear.bias is None else [weight, linear.bias]
        if places[id(linear)] > 1 or any(shared[tensor.data_ptr()] > 1 for tensor in tensors):
            return f"{name} shares its weights with another module"
        if "forward" in vars(linear) or any(
            getattr(linear, hooks)
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        ):
            return f"{name} has hooks, which would see rotated values"
        return None

    return why_not


def _outputs(model: Any, count: int) -> Tensor:
    """First output (logits, or hidden states) for `count` fixed tokens, without a cache."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids.to(model.device), use_cache=False)[0].cpu().double()


def _check_whole(module: nn.Module, args: Any) -> None:
    """Forward pre-hook: both projections are still those that were folded."""
    folded: Folded = vars(module)[FOLDED]
    for name in (folded.values, folded.output):
        part = module.get_submodule(name)
        if type(part) is not FoldedLinear:
            raise CacheError(
                f"{name} was replaced by a {type(part).__name__} after this model was patched with "
                "fold_rotation=True, which breaks its pair of rotations: call "
                "kvarn_ops.unpatch(model) first, change the model, and patch again."
            )


def _refuse_adapter(model: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    """Replacement of `load_adapter` and `add_adapter`."""
    raise UnsupportedModelError(ADAPTER_REFUSAL)


def _is_peft(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def _refuse_wrapping(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Hook on every registration of a submodule: PEFT takes a model in by registering it."""
    if submodule is not None and _is_peft(module):
        if any(isinstance(part, FoldedLinear) for part in submodule.modules()):
            raise UnsupportedModelError(ADAPTER_REFUSAL)


class AdapterGuard:
    """Refuses PEFT's own ways to add an adapter, as long as such an object lives.

    The hook goes with `unpatch` only, not with a model that is collected: Dynamo may be reading the
    table of hooks then.
    """

    _living: ClassVar[weakref.WeakSet[AdapterGuard]] = weakref.WeakSet()
    _handle: ClassVar[Any] = None

    def __init__(self) -> None:
        self._living.add(self)
        if AdapterGuard._handle is None:
            AdapterGuard._handle = register_module_module_registration_hook(_refuse_wrapping)

    @classmethod
    def retire(cls) -> None:
        """Remove the hook if nothing needs it."""
        if not cls._living and cls._handle is not None:
            cls._handle.remove()
            cls._handle = None

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterGuard:
        return self

    def __reduce__(self) -> tuple[type[AdapterGuard], tuple[()]]:
        return AdapterGuard, ()


def _extra_bytes(module: nn.Module) -> int:
    if not isinstance(module, FoldedLinear):
        return 0
    bias = module.kvarn_bias
    return module.kvarn_weight.nbytes + (0 if bias is None else bias.nbytes)
