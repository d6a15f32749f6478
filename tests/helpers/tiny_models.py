"""Tiny Hugging Face models with random weights, and how tests drive them token by token."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

import kvarn_ops

# Its name before transformers 5.0.
PreTrainedConfig = getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig

# Small enough that tiles fill early: 8 sinks, tiles of 32 tokens.
SMALL = {"group_size": 32, "num_sink_tokens": 8}
PAD = 0

_COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
_FULL = ["full_attention", "full_attention"]
_GPT2 = {
    "vocab_size": 96,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 1024,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MIXED = {"num_hidden_layers": 4, "sliding_window": 16, "query_pre_attn_scalar": 32}
_SLIDING_PATTERN = ["sliding_attention", "full_attention"] * 2

# name -> (classes' prefix, config fields, packed layers)
FAMILIES: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "llama": ("Llama", {}, [0, 1]),
    "mistral": ("Mistral", {"sliding_window": None}, [0, 1]),
    "mistral_sliding": ("Mistral", {"sliding_window": 16}, []),
    "qwen2": ("Qwen2", {"layer_types": _FULL}, [0, 1]),
    "qwen3": ("Qwen3", {"layer_types": _FULL}, [0, 1]),
    "phi3": ("Phi3", {"num_attention_heads": 2}, [0, 1]),
    "gpt2": ("GPT2", _GPT2, [0, 1]),
    "gemma2": (
        "Gemma2",
        _MIXED
        | {
            "layer_types": _SLIDING_PATTERN,
            "attn_logit_softcapping": 2.0,
            "attn_implementation": "eager",
        },
        [1, 3],
    ),
    "gemma3_text": ("Gemma3", _MIXED | {"layer_types": _SLIDING_PATTERN}, [1, 3]),
}


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """A model of the family in eval mode; the same weights for the same seed and fields."""
    prefix, fields, _ = FAMILIES[family]
    config_name = f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    base = {} if prefix == "GPT2" else _COMMON
    config = getattr(transformers, config_name)(**(base | fields | overrides))
    torch.manual_seed(seed)
    return sharpened(getattr(transformers, _model_name(prefix))(config)).eval()


def _model_name(prefix: str) -> str:
    return "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"


def sharpened(model: Any, factor: float = 4.0) -> Any:
    """Scale up the initial weights, so that attention is not uniform and logits tell tokens
    apart: with the usual 0.02 a wrong cache hardly shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.mul_(factor)
    return model


def random_ids(rows: int, length: int, seed: int = 0, vocab: int = 96) -> Tensor:
    """Token ids without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab, (rows, length), generator=generator)


def patched(family: str = "llama", preset: str = "k8v8_g32", **fields: Any) -> Any:
    """A patched tiny model; `fields` are of the KVarN config or of the model's.

    The preset is so precise that generated text is that of the dense model.
    """
    own = {field.name for field in dataclasses.fields(kvarn_ops.KVarNConfig)}
    overrides = {"num_sink_tokens": SMALL["num_sink_tokens"]}
    overrides |= {name: fields.pop(name) for name in own & fields.keys()}
    return kvarn_ops.patch(tiny_model(family, **fields), preset, **overrides)


def small_cache(model: Any, length: int = 256, preset: str = "k8v8_g32", **fields: Any) -> Any:
    """A cache for a patched tiny model."""
    overrides = {"num_sink_tokens": SMALL["num_sink_tokens"]} | fields
    return kvarn_ops.KVarNCache(model.config, length, preset, **overrides)


@torch.no_grad()
def run(model: Any, ids: Tensor, cache: Any, **kwargs: Any) -> Tensor:
    """Logits of one forward over the new tokens `ids`."""
    return model(ids, past_key_values=cache, use_cache=cache is not None, **kwargs).logits


@torch.no_grad()
def teacher_forced(
    model: Any, ids: Tensor, cache: Any, prefill: int, step: Callable[..., Any] | None = None
) -> Tensor:
    """Logits `[rows, length, vocab]`: one prefill, then a token at a time through `step`."""
    logits = [run(model, ids[:, :prefill], cache)]
    call = model if step is None else step
    for position in range(prefill, ids.shape[1]):
        # As generate does: without it the token has the strides of `ids`, which compilers guard on.
        token = ids[:, position : position + 1].clone(memory_format=torch.contiguous_format)
        out = call(token, past_key_values=cache, use_cache=True)
        logits.append(out.logits.clone())
    return torch.cat(logits, dim=1)


def padded(
    rows: list[Tensor], side: str, length: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, 2-D mask and position ids of a batch of rows `[n]` of different lengths."""
    length = length or max(len(row) for row in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[index, where] = row
        mask[index, where] = 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return ids, mask, positions


def cache_state(cache: Any) -> list[Tensor]:
    """A copy of every tensor that the cache holds, in a fixed order."""
    state = []
    for layer in cache.layers:
        for _, value in sorted(vars(layer).items()):
            items = value if isinstance(value, (list, tuple)) else [value]
            state += [item.clone() for item in items if isinstance(item, Tensor)]
    return state


def assert_same_state(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted), "the cache holds more or fewer tensors than before"
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other), "a tensor of the cache changed"


def storages_of(root: Any) -> dict[int, int]:
    """Bytes of every distinct storage reachable from an object, by address.

    Walks with the garbage collector, and so sees whatever attribute or container holds a tensor.
    Stops at modules, classes, functions and configs, which lead to the whole process.
    """
    found: dict[int, int] = {}
    seen: set[int] = set()
    stack = [root]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, (type, type(gc), PreTrainedConfig)):
            continue
        if callable(item) and not isinstance(item, Tensor):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
            continue
        stack.extend(gc.get_referents(item))
        stack.extend(vars(item).values() if hasattr(item, "__dict__") else ())
    return found
