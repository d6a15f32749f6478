"""What `generate` of a patched model does differently: its cache, its drafts, and what it refuses.

Each function here takes the place of a method of one model instance (`OVERRIDES`).
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .._compat import cache_capacity
from ..config import KVarNConfig
from ..errors import CacheCropError, CacheError, UnsupportedModelError
from .attention import is_wrapped, unwrapped, wrapped
from .cache import KVarNCache
from .growth import grow
from .layer import KVarNLayer

__all__ = ["OVERRIDES"]

# Checkpoints of gemma 2 and 3 name these in generation_config.json; transformers ignores them since
# it infers the layers, so they say nothing about what the user asks for.
_INFERRED_CACHES = ("hybrid", "hybrid_chunked", "sliding_window")
# Target tokens that one token of an assistant with another tokenizer may become.
_TOKENS_PER_FOREIGN_TOKEN = 16
# Tokens that an assistant with another tokenizer may take back beside its draft.
_FOREIGN_LOOKBEHIND = 32
_UNKNOWN_DRAFT = 128


def prepare_cache(
    model: PreTrainedModel,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    """Replacement of `_prepare_cache_for_generation`: a KVarN cache unless another is asked for."""
    given = model_kwargs.get("past_key_values")
    is_assistant = bool(getattr(generation_config, "is_assistant", False))
    virtual_tokens, replaces_cache = _prompt_learning(model)
    if isinstance(given, KVarNCache) and "assisted" in str(generation_mode).lower():
        _refuse_second_turn(given)
    if (
        given is not None
        or replaces_cache
        or generation_config.use_cache is False
        or generation_config.cache_implementation not in (None, *_INFERRED_CACHES)
    ):
        original = type(model)._prepare_cache_for_generation
        result = original(
            model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if isinstance(given, KVarNCache) and given.made_by_generate:
            needed = max_cache_length + _tokens_before(generation_config, model_kwargs)
            held = cache_capacity(given)
            if needed > held:
                # An assistant is called again for every draft: do not copy each time.
                spare = held // 2 if is_assistant else 0
                grow(given, max(needed, held + spare))
        return result
    assisted = is_assistant or "assisted" in str(generation_mode).lower()
    if assisted and not hasattr(KVarNCache, "activate_past_recording"):
        raise UnsupportedModelError(
            "assisted generation with a KVarN cache needs transformers 5.17 or newer, where caches "
            "take back a number of tokens: update it, or pass past_key_values=DynamicCache()."
        )
    longest = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
    longest += virtual_tokens + 1  # contrastive search feeds the last token too
    if is_assistant:
        draft = _own_draft(model, generation_config)
        model_kwargs["past_key_values"] = _croppable_cache(model, longest, draft)
    else:  # in assisted mode `candidate_generator` replaces it, when the draft is known
        model_kwargs["past_key_values"] = _cache(model, longest, model._kvarn_patch.config)
    return None


def candidate_generator(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Replacement of `_get_candidate_generator`: the cache can take back the longest draft."""
    generator = type(model)._get_candidate_generator(model, *args, **kwargs)
    model_kwargs = kwargs["model_kwargs"]
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, KVarNCache):
        return generator
    room = kwargs["generation_config"].max_length - kwargs["input_ids"].shape[1]
    draft = _longest_draft(generator, max(room, 1))
    if getattr(generator, "num_output_tokens", None) is not None:
        draft = min(draft, kwargs["generation_config"].max_length)  # it repeats tokens of the text
    tail = cache.kvarn_config.tail_tokens
    if cache.made_by_generate and not any(layer.is_initialized for layer in cache.layers):
        # A draft may reach beyond the end before it is taken back.
        longest = cache_capacity(cache) + draft
        model_kwargs["past_key_values"] = _croppable_cache(model, longest, draft)
    elif tail < draft:
        raise CacheCropError(
            f"assisted generation may take back drafts of {draft} tokens and this cache was made "
            f"with tail_tokens={tail}: create it with tail_tokens={draft} or more, or let "
            "generate make it."
        )
    elif not all(layer.is_croppable for layer in cache.layers):
        raise CacheCropError(
            "assisted generation must take back tokens, which the sliding layers of this cache "
            "cannot: let generate make the cache."
        )
    return generator


def set_attention(
    model: PreTrainedModel, attn_implementation: Any, *args: Any, **kwargs: Any
) -> None:
    """Replacement of `set_attn_implementation`: the new one, and still packed with KVarN caches."""
    configs = model._kvarn_patch.configs
    unwrapped(configs)
    try:
        type(model).set_attn_implementation(model, attn_implementation, *args, **kwargs)
    finally:
        wrapped(configs)


def save(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Replacement of `save_pretrained`: it validates the config, where our names are unknown."""
    configs = [config for config in model._kvarn_patch.configs if is_wrapped(config)]
    unwrapped(configs)
    try:
        return type(model).save_pretrained(model, *args, **kwargs)
    finally:
        wrapped(configs)


def refuse_continuous_batching(model: PreTrainedModel, *args: Any, **kwargs: Any) -> NoReturn:
    """Replacement of `init_continuous_batching`."""
    raise UnsupportedModelError(
        "continuous batching (generate_batch, cache_implementation='paged') keeps keys and values "
        "in transformers' own paged cache, which is not packed: call kvarn_ops.unpatch(model) "
        "first to use it dense, or model.generate for a KVarN cache."
    )


OVERRIDES = {
    "_prepare_cache_for_generation": prepare_cache,
    "_get_candidate_generator": candidate_generator,
    "set_attn_implementation": set_attention,
    "save_pretrained": save,
    "init_continuous_batching": refuse_continuous_batching,
}


def _cache(model: PreTrainedModel, length: int, config: KVarNConfig) -> KVarNCache:
    record = model._kvarn_patch
    cache = KVarNCache(model.config, length, config, backend=record.backend, device=model.device)
    cache.made_by_generate = True
    return cache


def _croppable_cache(model: PreTrainedModel, length: int, draft: int) -> KVarNCache:
    """A cache from which any draft can be removed exactly."""
    config = model._kvarn_patch.config
    tail = max(config.tail_tokens, draft)
    cache = _cache(model, length, KVarNConfig.coerce(config, tail_tokens=tail))
    # Static sliding layers cannot be cropped.
    stock = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, KVarNLayer):
            layer.is_compileable = False  # drafts have all lengths
        else:
            cache.layers[index] = stock[index]
    cache.activate_past_recording()
    return cache


def _refuse_second_turn(cache: KVarNCache) -> None:
    held = int(cache.get_seq_length())
    if held:
        raise CacheError(
            f"this cache already holds {held} tokens, and assisted generation (transformers 5.17 "
            "to 5.23) would store the whole prompt once more behind them: generate without the "
            "assistant, or without past_key_values."
        )


def _prompt_learning(model: PreTrainedModel) -> tuple[int, bool]:
    """What PEFT's prompt learning does behind `generate`: tokens it puts before the prompt, and
    whether it does so by replacing the cache with a dense one of its own (prefix tuning).
    """
    owner = getattr(model.prepare_inputs_for_generation, "__self__", None)
    peft = None if owner is model else getattr(owner, "active_peft_config", None)
    if not getattr(peft, "is_prompt_learning", False):
        return 0, False
    kind = str(getattr(peft, "peft_type", ""))
    return peft.num_virtual_tokens, "PREFIX" in kind or "CARTRIDGE" in kind


def _tokens_before(generation_config: Any, model_kwargs: dict[str, Any]) -> int:
    """Tokens in the given cache that `max_length` does not count: the prompt is the new turn only.

    transformers knows this case by an attention mask that is longer than the prompt.
    """
    mask = model_kwargs.get("attention_mask")
    seen = getattr(generation_config, "_mask_length", 0) if mask is None else mask.shape[1]
    if not generation_config.max_new_tokens:
        return 0
    return max(0, seen - (generation_config.max_length - generation_config.max_new_tokens))


def _longest_draft(generator: Any, room: int) -> int:
    """The most tokens that a candidate generator proposes at once, `room` being left to generate.

    Generators are told apart by what they have: their classes differ between versions.
    """
    for name in ("num_output_tokens", "num_mtp_layers", "block_size"):
        fixed = getattr(generator, name, None)
        if fixed is not None:  # prompt lookup and heads of the model itself: not cut at the end
            return fixed
    draft = getattr(generator, "num_assistant_tokens", None) or _UNKNOWN_DRAFT
    own = getattr(generator, "assistant_generation_config", None)
    if "heuristic" in (getattr(own, "num_assistant_tokens_schedule", None) or ""):
        draft = _heuristic_draft(draft, room)
    if getattr(generator, "assistant_tokenizer", None) is not None:
        draft *= _TOKENS_PER_FOREIGN_TOKEN
    return max(1, min(int(draft), room))


def _own_draft(model: PreTrainedModel, generation_config: Any) -> int:
    """The most tokens that are taken back from an assistant's cache: two drafts and a bit.

    The main model's length is not known here: a draft that grows is bounded by the context.
    """
    draft = generation_config.max_new_tokens or _UNKNOWN_DRAFT
    if "heuristic" in (model.generation_config.num_assistant_tokens_schedule or ""):
        context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 0)
        draft = _heuristic_draft(draft, context)
    return 2 * draft + _FOREIGN_LOOKBEHIND


def _heuristic_draft(start: int, room: int) -> int:
    """Longest draft of the schedule that adds 2 after each fully accepted draft.

    After r of them at least r (start + 1) + r (r - 1) tokens are generated, so r is bounded.
    """
    return start + 2 * math.ceil((math.sqrt(start**2 + 4 * max(room, 0)) - start) / 2)
