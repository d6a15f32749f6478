"""The packed bytes are what the model reads: change one and the logits change."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvarn_ops


@pytest.mark.parametrize("field", ["k_codes", "v_codes"])
@torch.no_grad()
def test_one_corrupted_byte_changes_the_logits(field: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    model = kvarn_ops.patch(LlamaForCausalLM(config).eval(), "k4v2_g32", num_sink_tokens=32)
    ids, token = torch.randint(0, 64, (1, 100)), torch.tensor([[7]])

    def next_logits(corrupt: bool) -> torch.Tensor:
        cache = kvarn_ops.KVarNCache(model.config, 128, "k4v2_g32", num_sink_tokens=32)
        model(ids, past_key_values=cache)
        if corrupt:
            getattr(cache.layers[0].tiles, field)[0, 0, 0, 3, 5] ^= 0xFF
        return model(token, past_key_values=cache).logits

    assert torch.equal(next_logits(False), next_logits(False))
    assert not torch.equal(next_logits(True), next_logits(False))
