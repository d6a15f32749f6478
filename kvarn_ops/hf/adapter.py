"""Patch and unpatch one transformers model: what is hooked and put back."""

from __future__ import annotations

import functools
import logging
import weakref
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .._compat import is_compiling
from ..config import KVarNConfig
from ..errors import CacheError, InputError
from .attention import LAYER_KWARG, is_wrapped, unwrapped, wrapped
from .cache import KVarNCache
from .frame import frame_of, take_frame
from .generation import OVERRIDES
from .inspection import LayerReport, attention_modules, inspect_model
from .layer import KVarNLayer

__all__ = ["LayerReport", "PatchRecord", "attach", "attention_configs", "inspect_model"]

FOLDS_ROTATION = True

_logger = logging.getLogger("kvarn_ops")


@dataclass(eq=False)
class PatchRecord:
    """Everything needed to describe and to undo a patch. Lives on the model as `_kvarn_patch`.

    `lifetime` and `guard` are any objects that live as long as a patched model or a copy of it.
    """

    config: KVarNConfig
    backend: str
    layers: list[LayerReport]
    lifetime: Any
    handles: list[Any] = field(default_factory=list)
    configs: list[Any] = field(default_factory=list)
    fold_rotation: bool = False  # asked for; `layers` say where it was done
    guard: Any = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, perhaps in another process that has not registered the functions yet."""
        self.__dict__.update(state)
        wrapped([config for config in self.configs if is_wrapped(config)])
        _records.add(self)

    def undo(self, model: PreTrainedModel) -> None:
        """Undo `attach`: the model has the attributes and the behaviour it had before."""
        for handle in self.handles:
            handle.remove()
        for name in OVERRIDES:
            vars(model).pop(name, None)
        del model._kvarn_patch
        _records.discard(self)
        in_use = {id(config) for other in _records for config in other.configs}
        unwrapped([config for config in self.configs if id(config) not in in_use])

    def lost(self, model: PreTrainedModel) -> bool:
        """Whether parts of the patch are gone: nothing here can be replaced."""
        return False


# Models made from one config object share it: the last one to be unpatched puts it back.
_records: weakref.WeakSet[PatchRecord] = weakref.WeakSet()


def attach(model: PreTrainedModel, record: PatchRecord) -> None:
    """Hook the attention modules named in the record and redirect attention and generate."""
    if any(report.packed for report in record.layers):
        for found in attention_modules(model).values():
            for _, module in found:
                hook = module.register_forward_pre_hook(_pass_layer, with_kwargs=True)
                record.handles.append(hook)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                hook = module.register_forward_pre_hook(_check_training, with_kwargs=True)
                record.handles.append(hook)
        for name, function in OVERRIDES.items():
            if hasattr(model, name):
                # Unlike a bound method, a partial of a function can be pickled.
                vars(model)[name] = functools.partial(function, model)
    record.configs = attention_configs(model)
    wrapped(record.configs)
    _records.add(record)
    model._kvarn_patch = record


def _pass_layer(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: hand the cache layer to the attention function through `**kwargs`."""
    cache = _cache_among(args, kwargs)
    if not isinstance(cache, KVarNCache):
        if cache is not None and not is_compiling():
            _mention_other_cache(type(cache).__name__)
        return None
    config = getattr(module, "config", None)
    if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        raise InputError(
            "output_attentions=True needs the full attention matrix, which a KVarN cache never "
            "forms: leave it off, or pass another cache."
        )
    if config is not None and not is_wrapped(config):
        raise CacheError(
            f"the attention implementation was set to {config._attn_implementation!r} in the "
            "config of a patched model, which turns packed attention off: set it with "
            "model.set_attn_implementation(...), which keeps the patch, or unpatch and patch again."
        )
    layer = cache.layers[module.layer_idx]
    if not isinstance(layer, KVarNLayer):
        return None
    take_frame(layer, frame_of(module))
    layer.armed = True
    return args, kwargs | {LAYER_KWARG: layer}


def _check_training(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: transformers would drop the cache in every layer, after a warning."""
    if not module.training or not isinstance(_cache_among(args, kwargs), KVarNCache):
        return
    if any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
        raise CacheError(
            "gradient checkpointing in train mode drops the KV cache: call model.eval(), or "
            "model.gradient_checkpointing_disable(), or run without a KVarN cache."
        )


def _cache_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    cache = kwargs.get("past_key_values")
    if cache is None:  # gpt-neox calls it `layer_past`, and it may be positional
        rest = (*args, kwargs.get("layer_past"))
        cache = next((value for value in rest if isinstance(value, Cache)), None)
    return cache


@lru_cache(maxsize=8)
def _mention_other_cache(name: str) -> None:
    _logger.warning(
        "a patched model runs with a %s, which keeps keys and values dense: pass "
        "past_key_values=kvarn_ops.KVarNCache(model.config, max_cache_len) to pack them. "
        "(This is said once.)",
        name,
    )


def attention_configs(model: nn.Module) -> list[Any]:
    """The distinct config objects that the decoder's attention modules read."""
    configs: list[Any] = [model.config.get_text_config(decoder=True)]
    for found in attention_modules(model).values():
        for _, module in found:
            config = getattr(module, "config", None)
            if config is not None and not any(config is known for known in configs):
                configs.append(config)
    return configs


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter (CPU if there is none)."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
