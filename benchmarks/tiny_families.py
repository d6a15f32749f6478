"""Tiny models with random weights of every decoder that transformers knows.

A config class is shrunk by the names of its fields; `SPECIAL` has what a name does not tell.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, EXPERTS = 128, 4, 2, 32, 4, 2
WINDOW = 24
VOCAB = 128

# One value for all fields of a kind. Every expert is used by every token: a router's choice is
# discontinuous, and the smallest rounding of the cache would change it.
_SIZES: tuple[tuple[int, str], ...] = (
    (
        HIDDEN,
        "hidden_size d_model n_embd dim backbone_hidden_size attention_hidden_size "
        "embedding_size input_embedding_size output_embedding_size word_embed_proj_dim "
        "dim_model_base lru_width emb_dim out_hidden_size hidden_size_global width "
        "text_hidden_size",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
        "encoder_attention_heads attention_heads swa_num_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads conf_num_attention_heads "
        "linear_num_heads linear_num_key_heads",
    ),
    (
        KV_HEADS,
        "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads",
    ),
    (
        HEAD_DIM,
        "head_dim swa_head_dim d_head dim_head attention_head_dim attention_head_size "
        "kv_channels v_head_dim qk_nope_head_dim qk_rope_head_dim global_head_dim "
        "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_head_dim "
        "mamba_d_head kv_lora_rank q_lora_rank o_lora_rank index_head_dim indexer_head_dim "
        "moe_latent_size router_hidden_size hidden_size_per_layer_input laurel_rank "
        "hc_lowrank adapter_rank",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth "
        "num_decoder_layers num_encoder_layers conf_num_hidden_layers",
    ),
    (
        EXPERTS,
        "num_experts num_local_experts n_routed_experts moe_num_experts num_experts_per_tok "
        "moe_topk moe_k moe_top_k top_k_experts",
    ),
    (
        64,
        "intermediate_size ffn_dim n_inner dff dim_ff decoder_ffn_dim encoder_ffn_dim "
        "ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size "
        "intermediate_size_mlp expert_ffn_hidden_size shared_intermediate_size "
        "dense_intermediate_size mlp_dim d_inner moe_shared_expert_intermediate_size "
        "shared_experts_intermediate_size prefix_dense_intermediate_size feed_forward_size",
    ),
    (
        VOCAB,
        "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size "
        "audio_vocab_size encoder_hash_byte_group_vocab",
    ),
    (
        512,
        "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions "
        "context_length original_max_position_embeddings",
    ),
    (
        WINDOW,
        "sliding_window attention_chunk_size local_attention window_size "
        "attention_window_size sliding_window_size",
    ),
    (
        1,
        "n_group topk_group n_groups mamba_n_groups mamba_ngroups num_shared_experts "
        "n_shared_experts moe_num_shared_experts mtp_loss_scaling_factor zero_expert_num",
    ),
    (
        0,
        "first_k_dense_replace num_dense_layers num_mtp_layers num_nextn_predict_layers "
        "dropout attention_dropout hidden_dropout activation_dropout resid_pdrop embd_pdrop "
        "attn_pdrop hidden_dropout_prob attention_probs_dropout_prob residual_dropout "
        "embedding_dropout resid_dropout embed_dropout layerdrop decoder_layerdrop dropout_p "
        "pad_token_id num_kv_shared_layers",
    ),
    (
        8,
        "index_topk linear_num_value_heads mamba_num_heads mamba_n_heads n_mamba_heads "
        "rel_extent d_rel",
    ),
    (
        16,
        "state_size ssm_state_size mamba_d_state chunk_size mamba_chunk_size mamba_dt_rank "
        "time_step_rank rotary_dim",
    ),
)
_BY_NAME = {name: size for size, names in _SIZES for name in names.split()}
_EVEN_IF_NONE = {"num_key_value_heads", "num_kv_heads", "num_experts", "num_experts_per_tok"} | {
    "head_dim",
    *("n_routed_experts", "n_shared_experts", "n_group", "topk_group"),
}
_ALWAYS = {
    "is_decoder": True,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}

_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
_HALF_MROPE = _MROPE | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
_HYBRID = ["linear_attention", "full_attention"] * 2
# Small enough to bite. In eager form: sdpa of some versions leaves the softcap out.
_SOFTCAP = {
    "attn_logit_softcapping": 1.0,
    "query_pre_attn_scalar": HEAD_DIM,
    "attn_implementation": "eager",
}
_SCALE = {"attention_multiplier": HEAD_DIM**-0.5}  # 1.0, the default, is used by no checkpoint

# Fields of a config by its `model_type`.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "dbrx": {"attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "gemma2": _SOFTCAP,
    "glm46v_text": {"rope_parameters": _HALF_MROPE},
    "glm4v_text": {"rope_parameters": _HALF_MROPE},
    "glm4v_moe_text": {"rope_parameters": _HALF_MROPE},
    "glm_ocr_text": {"rope_parameters": _HALF_MROPE},
    "glm5_next_text": {"num_key_value_heads": HEADS, "index_topk": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite": _SCALE,
    "granite_swa": _SCALE,
    "granitemoe": _SCALE,
    "granitemoe_swa": _SCALE,
    "granitemoehybrid": _SCALE | {"layer_types": _HYBRID},
    "granitemoeshared": _SCALE,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "mimo_v2_flash": {"v_head_dim": HEAD_DIM // 2},
    "paddleocr_vl_text": {"rope_parameters": _MROPE},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_omni_text": {"rope_parameters": _MROPE},
    "cosmos3_edge_text": {"rope_parameters": _MROPE},
    "qwen4_exp_text": {
        "indexer_n_heads": HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"] * 2},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


# Other settings of a family that change what its layers are.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, alibi": ("falcon", {"alibi": True}),
    "idefics2, no window": ("idefics2", {"text_config": {"sliding_window": None}}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "mistral3, no window": ("mistral3", {"text_config": {"sliding_window": None}}),
    "phi3, window": ("phi3", {"sliding_window": WINDOW}),
    "qwen2, windows": (
        "qwen2",
        {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gemma3_text, both directions": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma4_text, shared layers": ("gemma4_text", {"num_kv_shared_layers": 2}),
}


def model_types() -> dict[str, str]:
    """`model_type` (or variant) -> class name of everything that generates text."""
    names: dict[str, Any] = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    names |= modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = {key: name if isinstance(name, str) else name[0] for key, name in names.items()}
    return found | {variant: found[family] for variant, (family, _) in VARIANTS.items()}


def tiny_fields(config_class: Any) -> dict[str, Any]:
    """Constructor arguments that make a config of this class small."""
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    fields: dict[str, Any] = {}
    for name, default in defaults.items():
        if name in _ALWAYS:
            fields[name] = _ALWAYS[name]
        elif name in _BY_NAME and not isinstance(default, (bool, str, list, tuple)):
            if default is not None or name in _EVEN_IF_NONE:
                size = _BY_NAME[name]
                fields[name] = float(size) if isinstance(default, float) else size
    try:
        full = config_class()
    except Exception:  # some composite configs need arguments
        full = None
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        # Shortened so that every kind of layer stays.
        kinds = getattr(full, name, None)
        if kinds and name in defaults:
            distinct = list(dict.fromkeys(kinds))
            fields[name] = [distinct[i % len(distinct)] for i in range(LAYERS)]
    for name, sub_class in (getattr(config_class, "sub_configs", None) or {}).items():
        if sub_class.__name__ == "AutoConfig":
            sub_class = type(getattr(full, name, None))
        if name in defaults and dataclasses.is_dataclass(sub_class):
            fields[name] = tiny_fields(sub_class)
            fields[name]["model_type"] = sub_class.model_type
    return fields | SPECIAL.get(config_class.model_type, {})


def build(name: str, seed: int = 0) -> Any:
    """A tiny model of a family or variant in eval mode on the CPU, in float32."""
    family, changed = VARIANTS.get(name, (name, {}))
    model_class = getattr(transformers, model_types()[family])
    # May be the config of the text part of a family.
    config_class = model_class.config_class or transformers.CONFIG_MAPPING[family]
    fields = tiny_fields(config_class)
    for key, value in changed.items():
        fields[key] = fields[key] | value if isinstance(value, dict) else value
    torch.manual_seed(seed)
    return _roughened(model_class(config_class(**fields)).float().eval())


@torch.no_grad()
def _roughened(model: nn.Module) -> nn.Module:
    """Make every parameter matter: initial biases are zero and attention nearly uniform."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            parameter.mul_(4)
        elif name.endswith(("q_norm.weight", "query_layernorm.weight")):
            parameter.mul_(0.5)  # keys and queries of norm 1 and no scale: one-hot attention
        elif parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model
