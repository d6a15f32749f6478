"""The attention and mask functions that a patched model calls through transformers' registries.

A name `kvarn_<base>` in the config selects both. With a KVarN layer they use packed storage;
otherwise they do exactly what `<base>` does, so that a patched model without a KVarN cache is
unchanged. The mask function cannot see the cache: KVarN layers ask for a mask of negative offset,
and get the validity of the new tokens `[B, 1, 1, S]`, or None if all are valid.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .._compat import is_compiling, new_slots
from ..errors import InputError, UnsupportedModelError
from .layer import KVarNLayer

__all__ = ["LAYER_KWARG", "is_wrapped", "unwrapped", "wrapped"]

LAYER_KWARG = "kvarn_layer"
ATTENTION_PREFIX = "kvarn_"  # of the attention implementation's name in a patched model's config


def is_wrapped(config: Any) -> bool:
    """Whether a model with this config calls our attention and mask functions."""
    return (config._attn_implementation or "").startswith(ATTENTION_PREFIX)


def wrapped(configs: list[Any]) -> None:
    """Select `kvarn_<base>` where `<base>` was selected, and register it with transformers."""
    for config in configs:
        base = (config._attn_implementation or "sdpa").removeprefix(ATTENTION_PREFIX)
        name = ATTENTION_PREFIX + base
        if name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(name, _attention_function(base))
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, _mask_function(base))
        config._attn_implementation = name


def unwrapped(configs: list[Any]) -> None:
    """Select `<base>` where `kvarn_<base>` was selected, and leave others alone."""
    for config in configs:
        if is_wrapped(config):
            config._attn_implementation = config._attn_implementation.removeprefix(ATTENTION_PREFIX)


def _attention_function(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        layer = kwargs.pop(LAYER_KWARG, None)
        if layer is None:
            if base == "eager":
                dense = sys.modules[type(module).__module__].eager_attention_forward
            else:
                dense = ALL_ATTENTION_FUNCTIONS[base]
            return dense(module, query, key, value, attention_mask, **kwargs)
        return _packed_attention(layer, query, key, value, attention_mask, **kwargs), None

    attention.__name__ = f"{ATTENTION_PREFIX}{base}_attention"
    return attention


def _packed_attention(
    layer: KVarNLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """`[B, S, H_q, D]`: attention over the layer's cache and the new tokens, which are stored."""
    if dropout:
        raise InputError(
            f"attention dropout {dropout} with a KVarN cache: call model.eval(), dropout is not "
            "applied to packed tokens."
        )
    if kwargs.get("output_attentions"):
        raise InputError(
            "output_attentions=True needs the full attention matrix, which a KVarN cache never "
            "forms: leave it off, or use another cache."
        )
    for name in ("position_bias", "sliding_window", "head_mask"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"this layer hands {name} to a packed layer, which is not supported: patch with "
                "strict=False to leave the model dense."
            )
    out = layer.attend(
        query,
        key,
        value,
        _new_token_validity(attention_mask, query.shape[2]),
        s_aux,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap or 0.0,
    )
    layer.cumulative_length.add_(key.shape[2])  # last: an error above leaves the layer as it was
    return out.transpose(1, 2).contiguous()  # as every base function; some modules `view` it


def _new_token_validity(mask: Tensor | None, new_tokens: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.ndim == 4 and mask.shape[2] == 0:
        raise UnsupportedModelError(
            "this model asks for a sliding or chunked mask on a layer that is packed: patch with "
            "strict=False to leave the model dense."
        )
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != 1 or mask.shape[3] != new_tokens:
        raise InputError(
            f"an attention mask of shape {tuple(mask.shape)} was given with a KVarN cache: pass "
            "the 2-D padding mask [batch, tokens], other patterns than causal are not supported."
        )
    return mask[:, 0, 0]


def _mask_function(base: str) -> Callable[..., Tensor | None]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        if kwargs["kv_offset"] >= 0:
            return ALL_MASK_ATTENTION_FUNCTIONS[base](*args, **kwargs)
        if kwargs.get("local_size") is not None:
            # Some models make this mask although no layer uses it: refused where it is used.
            return torch.zeros(1, 1, 0, 0, dtype=torch.bool)
        if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
            raise UnsupportedModelError(
                "this model asks for a mask that is not plainly causal (packed sequences, image "
                "blocks, chunks) on a packed layer: use another cache for such inputs."
            )
        return _validity(kwargs)

    mask.__name__ = f"{ATTENTION_PREFIX}{base}_mask"
    return mask


def _validity(kwargs: dict[str, Any]) -> Tensor | None:
    """`[B, 1, 1, S]` bool from the 2-D padding mask, or None if all new tokens are valid."""
    padding = kwargs.get("attention_mask")
    count, first = new_slots(kwargs)
    if padding is None:
        return None
    if count == 1:
        # generate appends ones only. Checking would put a reduction into every compiled step.
        if is_compiling() or padding.device.type != "cpu" or bool(padding[:, -1].all()):
            return None
    positions = torch.arange(count, device=padding.device) + first
    return padding.bool().index_select(1, positions)[:, None, None, :]
