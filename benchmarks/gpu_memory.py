"""Models and caches of stage `model`, and the largest batch that fits into a GPU's memory.

That is computed for all 32 layers: memory of the GPU, less the weights of the whole model and
2 GiB, over the bytes of a row. Those are measured on an allocated cache of one layer; then weights
and caches of that size are allocated in full (`confirmed`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_caches import fill_randomly
from gpu_stage import Stage

import kvarn_ops

LLAMA: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 500000.0,
    "max_position_embeddings": 1 << 18, "tie_word_embeddings": False, "attn_implementation": "sdpa",
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "rope_theta": 500000.0,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "attn_implementation": "sdpa",
}  # fmt: skip
GIB = 1 << 30
RESERVE = 2 * GIB
DRY_MEMORY = 64 << 20


def make_model(fields: dict[str, Any], device: torch.device) -> Any:
    """A model with random weights, made where it runs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**fields))
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval()


def shared_copy(model: Any) -> Any:
    """The same weights in another model object: a patch belongs to one object."""
    return copy.deepcopy(model, {id(x): x for x in model.parameters()})


def unmasked_attention() -> str:
    """The name, for transformers, of SDPA for one query per row over all slots of a cache."""
    from transformers import AttentionInterface

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
        scaling: float | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        rows = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
        out = F.scaled_dot_product_attention(rows, key, value, scale=scaling)
        return out.reshape(query.shape).transpose(1, 2).contiguous(), None

    AttentionInterface.register("unmasked", attend)
    return "unmasked"


def dense_cache(
    model_config: Any, config: Any, batch: int, context: int, room: int, device: torch.device
) -> tuple[Any, Callable[[int], None]]:
    """A `StaticCache` of random keys and values."""
    from transformers.cache_utils import StaticCache

    cache: Any = StaticCache(config=model_config, max_cache_len=room)
    token = _token(model_config, batch, device)
    for layer in cache.layers:
        layer.lazy_initialization(token, token)
        layer.keys.normal_()
        layer.values.normal_()

    def reset(length: int) -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)

    return cache, reset


def kvarn_cache(
    model_config: Any, config: Any, batch: int, context: int, room: int, device: torch.device
) -> tuple[Any, Callable[[int], None]]:
    """A `KVarNCache` of random codes."""
    cache: Any = kvarn_ops.KVarNCache(model_config, room, config, backend="triton", device=device)
    token = _token(model_config, batch, device)
    for layer in cache.layers:
        layer.lazy_initialization(token, token)
        fill_randomly(layer.tiles, context, config)

    def reset(length: int) -> None:
        for layer in cache.layers:
            layer.tiles.seq_lens.fill_(length)
            layer.cumulative_length.fill_(length)

    return cache, reset


def cache_bytes(cache: Any) -> int:
    """Of keys and values, packed or not."""
    if isinstance(cache, kvarn_ops.KVarNCache):
        return cache.memory()["total"]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def largest_batch(stage: Stage, fields: dict[str, Any], config: Any, context: int) -> None:
    """The largest batch of this context that fits beside the weights, dense and KVarN."""
    from transformers import LlamaConfig

    model_config = LlamaConfig(**fields)
    layers = model_config.num_hidden_layers
    total = torch.cuda.mem_get_info()[1] if stage.clock.on_gpu else DRY_MEMORY
    budget = total - weight_bytes(fields) - (RESERVE if stage.clock.on_gpu else 0)
    one_layer = copy.deepcopy(model_config)
    one_layer.num_hidden_layers = 1
    rows = {}
    for name, make in (("dense", dense_cache), ("kvarn", kvarn_cache)):
        cache, _ = make(one_layer, config, 1, context, context, stage.device)
        rows[name] = cache_bytes(cache) * layers
        del cache
    for name, row in rows.items():
        batch = budget // row
        keys = {"measure": "largest batch", "cache": name, "form": "", "batch": "",
                "context": context}  # fmt: skip
        stage.add(
            keys, value=batch, bytes_per_row=row, layers=layers,
            ratio=f"{batch / max(1, budget // rows['dense']):.3f}",
            confirmed=confirmed(stage, name, fields, config, batch, context),
        )  # fmt: skip


def weight_bytes(fields: dict[str, Any]) -> int:
    """Of the whole model in bfloat16."""
    hidden, width = fields["hidden_size"], fields["head_dim"]
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    attention = 2 * hidden * width * (heads + kv_heads)
    layer = attention + 3 * hidden * fields["intermediate_size"] + 2 * hidden
    outside = 2 * fields["vocab_size"] * hidden + hidden
    return 2 * (fields["num_hidden_layers"] * layer + outside)


def confirmed(
    stage: Stage, name: str, fields: dict[str, Any], config: Any, batch: int, context: int
) -> str:
    """Whether weights and caches of that size can be allocated, besides what is there already."""
    from transformers import LlamaConfig

    if not batch:
        return ""
    model_config = LlamaConfig(**fields)
    token = _token(model_config, batch, stage.device)
    held = torch.cuda.memory_allocated() if stage.clock.on_gpu else 0
    try:
        weights = torch.empty(max(0, weight_bytes(fields) - held), dtype=torch.uint8,
                              device=stage.device)  # fmt: skip
        if name == "kvarn":
            cache: Any = kvarn_ops.KVarNCache(model_config, context, config, backend="triton",
                                              device=stage.device)  # fmt: skip
        else:
            from transformers.cache_utils import StaticCache

            cache = StaticCache(config=model_config, max_cache_len=context)
        for layer in cache.layers:
            layer.lazy_initialization(token, token)
        del cache, weights
    except torch.OutOfMemoryError:
        return "no"
    finally:
        if stage.clock.on_gpu:
            torch.cuda.empty_cache()
    return "yes"


def _token(model_config: Any, batch: int, device: torch.device) -> torch.Tensor:
    size = (batch, model_config.num_key_value_heads, 1, model_config.head_dim)
    return torch.zeros(size, dtype=torch.bfloat16, device=device)
