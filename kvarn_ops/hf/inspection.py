"""What can be packed in a transformers model: decided here, before anything is changed."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import StaticCache, StaticLayer

from ..config import KVarNConfig
from ..errors import InputError, UnsupportedModelError
from ..hadamard import check_head_dim
from ..layer_report import LayerReport
from .attention_source import why_not_packable

__all__ = ["LayerReport", "attention_modules", "inspect_model"]

# Dense by design: their memory does not grow with the context.
_DENSE_BY_DESIGN = ("Sliding", "LinearAttention", "Chunked")
# Names of the cache among the arguments of attention modules.
_CACHE_ARGUMENTS = ("past_key_values", "layer_past")


def inspect_model(model: PreTrainedModel, config: KVarNConfig) -> list[LayerReport]:
    """Decide for every layer whether it can be packed, without changing the model.

    Raises
    ------
    UnsupportedModelError
        If the model as a whole cannot be patched.
    """
    text_config = model.config.get_text_config(decoder=True)
    _refuse_whole_models(model, text_config)
    kinds = _cache_layers(model)
    modules = attention_modules(model)
    if any(index >= len(kinds) for index in modules):
        _refuse(
            model,
            "has attention layers that transformers' cache has no place for: it makes "
            f"{len(kinds)}.",
        )
    reports = []
    for index, kind in enumerate(kinds):
        if kind is StaticLayer:
            reports.append(_packed_layer(model, index, modules.get(index, []), config))
        elif kind.__name__ == "DummyLayer":
            if "reuse" in (getattr(text_config, "kv_sharing_modes", None) or ()):
                _refuse(
                    model,
                    f"shares keys and values between layers (layer {index}): a packed layer "
                    "cannot be shared.",
                )
            reports.append(LayerReport(index, "", False, "no attention in this layer"))
        elif "FullAttention" in kind.__name__:
            _refuse(
                model,
                f"keeps full attention and a linear state in one layer (layer {index}, "
                f"{kind.__name__}): not supported in this version.",
            )
        elif any(word in kind.__name__ for word in _DENSE_BY_DESIGN):
            reports.append(LayerReport(index, "", False, f"dense by design ({kind.__name__})"))
        else:
            _refuse(
                model,
                f"caches layer {index} with {kind.__name__}, which is not known here.",
            )
    return reports


def attention_modules(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Causal self-attention modules by layer index."""
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if index is None or not getattr(module, "is_causal", False):
            continue
        if getattr(module, "is_cross_attention", False):
            continue
        parameters = inspect.signature(module.forward).parameters
        takes_rest = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if takes_rest and any(name in parameters for name in _CACHE_ARGUMENTS):
            found.setdefault(index, []).append((path, module))
    return found


def _packed_layer(
    model: PreTrainedModel, index: int, found: list[tuple[str, nn.Module]], config: KVarNConfig
) -> LayerReport:
    """Report of a full-attention layer, which is packed or refuses the model."""
    if not found and not hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS"):
        _refuse(
            model,
            "does not call attention through transformers' attention interface "
            "(ALL_ATTENTION_FUNCTIONS), so its attention cannot be redirected.",
        )
    if len(found) != 1:
        _refuse(
            model,
            f"has {len(found)} modules that can be hooked in layer {index}: one causal attention "
            "module is expected, which takes past_key_values and further keyword arguments.",
        )
    path, module = found[0]
    why = why_not_packable(type(module))
    if why is not None:
        _refuse(model, f"{why} ({type(module).__name__}, layer {index}).")
    head_dim, value_dim, num_kv_heads = _geometry(
        module, model.config.get_text_config(decoder=True)
    )
    if head_dim != value_dim:
        _refuse(
            model,
            f"has keys of width {head_dim} and values of width {value_dim} in layer {index}: "
            "different widths are not supported.",
        )
    try:
        check_head_dim(head_dim, config.rotate_keys or config.rotate_values)
    except InputError as error:
        raise UnsupportedModelError(f"{type(model).__name__}, layer {index}: {error}") from None
    size = config.bytes_per_token(head_dim, num_kv_heads)
    return LayerReport(index, path, True, "packed", size)


def _cache_layers(model: PreTrainedModel) -> list[type]:
    """Classes of the layers of transformers' static cache for this model."""
    try:
        layers = StaticCache(config=model.config, max_cache_len=256).layers
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        _refuse(
            model,
            f"has no static cache in transformers ({type(error).__name__}: {error}), on whose "
            "layers a packed cache is built.",
        )
    return [type(layer) for layer in layers]


def _geometry(module: nn.Module, text_config: Any) -> tuple[int, int, int]:
    """Width of keys, width of values and number of KV heads of an attention module."""
    config = getattr(module, "config", None) or text_config
    query_heads = _field(config, "num_attention_heads") or text_config.num_attention_heads
    head_dim = (
        getattr(module, "head_dim", None)
        or _field(config, "head_dim")
        or text_config.hidden_size // query_heads
    )
    value_dim = getattr(module, "v_head_dim", None) or head_dim
    heads = (
        getattr(module, "num_key_value_heads", None)
        or getattr(module, "num_kv_heads", None)
        or _field(config, "num_key_value_heads")
        or query_heads
    )
    project = getattr(module, "k_proj", None)
    if isinstance(project, nn.Linear) and project.out_features % head_dim == 0:
        heads = project.out_features // head_dim  # layers of one model may differ
    return int(head_dim), int(value_dim), int(heads)


def _field(config: Any, name: str) -> Any:
    """A field of a config, or of its first layer where layers differ; None if there is none."""
    if name in (getattr(config, "per_layer_attributes", None) or ()):
        config = config.per_layer_config[0]
    return getattr(config, name, None)


def _refuse(model: PreTrainedModel, why: str) -> Any:
    raise UnsupportedModelError(
        f"{type(model).__name__} {why} Use strict=False to leave the model dense."
    )


def _refuse_whole_models(model: PreTrainedModel, text_config: Any) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        _refuse(model, "is an encoder-decoder model: only decoder-only models can be patched.")
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        _refuse(model, "has a cache or state of its own, in the place of a transformers cache.")
    if _field(text_config, "kv_lora_rank"):
        _refuse(
            model,
            "caches a multi-head latent (MLA, kv_lora_rank), which is already compressed and not "
            "made of heads: it is not supported.",
        )
    if _field(text_config, "num_kv_shared_layers"):
        _refuse(model, "shares keys and values between layers (num_kv_shared_layers).")
    if not getattr(text_config, "is_causal", True):
        _refuse(model, "is configured for non-causal attention (is_causal=False).")
    bidirectional = getattr(text_config, "use_bidirectional_attention", None)
    # "vision" concerns the tokens of an image: nothing in a model that reads text only.
    if bidirectional and (bidirectional != "vision" or model.config is not text_config):
        _refuse(model, "attends in both directions (use_bidirectional_attention).")
    modules = [module for found in attention_modules(model).values() for _, module in found]
    for source in {type(module).__module__ for module in modules}:
        if ".get_mask_sizes(" in _source(sys.modules[source]):
            _refuse(
                model, "builds its own masks from the cache's size, which a packed cache lacks."
            )


def _source(module: Any) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return ""
