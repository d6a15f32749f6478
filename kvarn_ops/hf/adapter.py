"""Patch and unpatch one transformers model: what is checked, hooked and put back."""

from __future__ import annotations

import inspect
import logging
import sys
import types
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache, StaticLayer

from .._compat import is_compiling
from ..config import KVarNConfig
from ..errors import InputError, UnsupportedModelError
from ..hadamard import check_head_dim
from .attention import LAYER_KWARG, register
from .cache import KVarNCache
from .layer import KVarNLayer

__all__ = ["LayerReport", "PatchRecord", "attach", "detach", "inspect_model"]

_logger = logging.getLogger("kvarn_ops")

# Dense by design: their memory does not grow with the context.
_DENSE_BY_DESIGN = ("Sliding", "LinearAttention", "Chunked")
# Checkpoints of gemma 2 and 3 name these in generation_config.json; transformers ignores them since
# it infers the layers, so they say nothing about what the user asks for.
_INFERRED_CACHES = ("hybrid", "hybrid_chunked", "sliding_window")
# Tokens that an assistant may draft per round before `crop`.
ASSISTED_TAIL_TOKENS = 128


@dataclass(frozen=True)
class LayerReport:
    """What happens to one attention layer, and why."""

    index: int
    module: str
    packed: bool
    reason: str
    bytes_per_token: float | None = None


class Lifetime:
    """Lives while a patched model or a copy of it does: `copy.deepcopy` shares it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Lifetime:
        return self


@dataclass
class PatchRecord:
    """Everything needed to describe and to undo a patch. Lives on the model as `_kvarn_patch`."""

    config: KVarNConfig
    backend: str
    layers: list[LayerReport]
    lifetime: Lifetime = field(default_factory=Lifetime)
    handles: list[Any] = field(default_factory=list)
    implementations: list[tuple[Any, str]] = field(default_factory=list)


def inspect_model(model: PreTrainedModel, config: KVarNConfig) -> list[LayerReport]:
    """Decide for every layer whether it can be packed, without changing the model.

    Raises
    ------
    UnsupportedModelError
        If the model as a whole cannot be patched.
    """
    text_config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    _refuse_whole_models(model, text_config, name)
    kinds = [type(layer) for layer in StaticCache(config=model.config, max_cache_len=256).layers]
    modules = _attention_modules(model)
    if any(index >= len(kinds) for index in modules):
        raise UnsupportedModelError(
            f"{name} has attention layers that transformers' cache has no place for: it makes "
            f"{len(kinds)}. Use strict=False to leave the model dense."
        )
    reports = []
    for index, kind in enumerate(kinds):
        if kind is not StaticLayer:
            if kind.__name__ == "DummyLayer":
                raise UnsupportedModelError(
                    f"{name} shares keys and values between layers (layer {index}): a packed layer "
                    "cannot be shared. Use strict=False to leave the model dense."
                )
            if not any(word in kind.__name__ for word in _DENSE_BY_DESIGN):
                raise UnsupportedModelError(
                    f"{name} caches layer {index} with {kind.__name__}, which is not known here: "
                    "use strict=False to leave the model dense."
                )
            reports.append(LayerReport(index, "", False, f"dense by design ({kind.__name__})"))
            continue
        found = modules.get(index, [])
        if len(found) != 1:
            raise UnsupportedModelError(
                f"{name}: expected one causal attention module for layer {index}, found "
                f"{len(found)}. Use strict=False to leave the model dense."
            )
        path, module = found[0]
        head_dim, num_kv_heads = _geometry(module, text_config)
        try:
            check_head_dim(head_dim, config.rotate_keys or config.rotate_values)
        except InputError as error:
            raise UnsupportedModelError(f"{name}, layer {index}: {error}") from None
        size = config.bytes_per_token(head_dim, num_kv_heads)
        reports.append(LayerReport(index, path, True, "packed", size))
    return reports


def attach(model: PreTrainedModel, record: PatchRecord) -> None:
    """Hook the attention modules named in the record and redirect attention and generate."""
    packed = {report.index for report in record.layers if report.packed}
    for found in _attention_modules(model).values() if packed else ():
        for _, module in found:
            handle = module.register_forward_pre_hook(_pass_layer, with_kwargs=True)
            record.handles.append(handle)
    for config in _attention_configs(model):
        base = config._attn_implementation or "sdpa"
        record.implementations.append((config, base))
        config._attn_implementation = register(base)
    if packed and hasattr(model, "_prepare_cache_for_generation"):
        model._prepare_cache_for_generation = types.MethodType(_prepare_cache, model)
    model._kvarn_patch = record


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`: the model has the attributes and the behaviour it had before."""
    record: PatchRecord = model._kvarn_patch
    for handle in record.handles:
        handle.remove()
    for config, base in record.implementations:
        config._attn_implementation = base
    model.__dict__.pop("_prepare_cache_for_generation", None)
    del model._kvarn_patch


def _pass_layer(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: hand the cache layer to the attention function through `**kwargs`."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        cache = next((value for value in args if isinstance(value, Cache)), None)
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
    layer = cache.layers[module.layer_idx]
    if not isinstance(layer, KVarNLayer):
        return None
    layer.armed = True
    return args, kwargs | {LAYER_KWARG: layer}


@lru_cache(maxsize=8)
def _mention_other_cache(name: str) -> None:
    _logger.warning(
        "a patched model runs with a %s, which keeps keys and values dense: pass "
        "past_key_values=kvarn_ops.KVarNCache(model.config, max_cache_len) to pack them. "
        "(This is said once.)",
        name,
    )


def _prepare_cache(
    self: PreTrainedModel,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    """Replacement of `_prepare_cache_for_generation`: a KVarN cache unless another is asked for."""
    record: PatchRecord = self._kvarn_patch
    asked_for_other = (
        model_kwargs.get("past_key_values") is not None
        or generation_config.use_cache is False
        or generation_config.cache_implementation not in (None, *_INFERRED_CACHES)
    )
    if asked_for_other:
        original = type(self)._prepare_cache_for_generation
        return original(
            self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
    config = record.config
    assisted = "assisted" in str(generation_mode).lower() or bool(
        getattr(generation_config, "is_assistant", False)
    )
    longest = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
    if assisted:
        tail = max(config.tail_tokens, ASSISTED_TAIL_TOKENS)
        config = KVarNConfig.coerce(config, tail_tokens=tail)
        longest += tail  # a draft may reach beyond the end before it is cropped
    cache = KVarNCache(self.config, longest, config, backend=record.backend, device=self.device)
    if assisted:
        # Static sliding layers cannot be cropped.
        stock = DynamicCache(config=self.config.get_text_config(decoder=True)).layers
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, KVarNLayer):
                layer.is_compileable = False
            else:
                cache.layers[index] = stock[index]
        cache.activate_past_recording()
    model_kwargs["past_key_values"] = cache
    return None


def _attention_modules(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Causal self-attention modules by layer index."""
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if index is None or not getattr(module, "is_causal", False):
            continue
        parameters = inspect.signature(module.forward).parameters
        takes_rest = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "past_key_values" in parameters and takes_rest:
            found.setdefault(index, []).append((path, module))
    return found


def _attention_configs(model: nn.Module) -> list[Any]:
    """The distinct config objects that the decoder's attention modules read."""
    configs: list[Any] = [model.config.get_text_config(decoder=True)]
    for found in _attention_modules(model).values():
        for _, module in found:
            config = getattr(module, "config", None)
            if config is not None and not any(config is known for known in configs):
                configs.append(config)
    return configs


def _geometry(module: nn.Module, text_config: Any) -> tuple[int, int]:
    """head_dim and number of KV heads of an attention module."""
    head_dim = getattr(module, "head_dim", None) or getattr(text_config, "head_dim", None)
    if head_dim is None:
        head_dim = text_config.hidden_size // text_config.num_attention_heads
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    return int(head_dim), int(heads)


def _refuse_whole_models(model: PreTrainedModel, text_config: Any, name: str) -> None:
    def refuse(why: str) -> None:
        raise UnsupportedModelError(f"{name} {why} Use strict=False to leave the model dense.")

    if getattr(model.config, "is_encoder_decoder", False):
        refuse("is an encoder-decoder model: only decoder-only models can be patched.")
    if getattr(text_config, "kv_lora_rank", None):
        refuse(
            "caches a multi-head latent (MLA, kv_lora_rank), which is already compressed and not "
            "made of heads: it is not supported."
        )
    if getattr(text_config, "num_kv_shared_layers", 0):
        refuse("shares keys and values between layers (num_kv_shared_layers): not supported.")
    if not getattr(text_config, "is_causal", True):
        refuse("is configured for non-causal attention (is_causal=False): not supported.")
    if getattr(text_config, "use_bidirectional_attention", False):
        refuse("attends in both directions (use_bidirectional_attention): not supported.")
    modules = [module for found in _attention_modules(model).values() for _, module in found]
    sources = {type(module).__module__ for module in modules} or {type(model).__module__}
    for source in sources:
        if not hasattr(sys.modules[source], "ALL_ATTENTION_FUNCTIONS"):
            refuse(
                "does not call attention through transformers' attention interface "
                "(ALL_ATTENTION_FUNCTIONS), so its attention cannot be redirected."
            )
        if ".get_mask_sizes(" in _source(sys.modules[source]):
            refuse("builds its own masks from the cache's size, which a packed cache has not.")


def _source(module: Any) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return ""


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter (CPU if there is none)."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
