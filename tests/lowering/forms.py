"""The forms in which users write attention over a KV cache, by name.

Each is `form(q, k, v, mask) -> [B, H_q, S, D]` with `q` `[B, H_q, S, D]`, dequantized `k`, `v`
`[B, H_kv, T, D]` and the causal mask `[1, 1, S, T]` bool. `FUSED` are rewritten, `REFUSED` must not
be, and say what the reason contains.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

sdpa = F.scaled_dot_product_attention


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """As in Hugging Face code."""
    batch, heads, tokens, width = x.shape
    x = x[:, :, None].expand(batch, heads, times, tokens, width)
    return x.reshape(batch, heads * times, tokens, width)


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def enable_gqa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)


def repeat_kv_bool(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    return sdpa(q, repeat_kv(k, times), repeat_kv(v, times), mask)


def repeat_kv_float(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    return sdpa(q, repeat_kv(k, times), repeat_kv(v, times), attn_mask=additive(mask))


def repeat_interleave(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(times, dim=1) for x in (k, v))
    return sdpa(q, k, v, attn_mask=mask, dropout_p=0.0)


def casts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    return sdpa(q, k, v, attn_mask=mask, enable_gqa=True).float()


def scale(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)


def two_axes_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, v, mask[0, 0], enable_gqa=True)


def head_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    slopes = torch.arange(q.shape[1], device=q.device)[:, None, None] / 8
    distance = torch.arange(k.shape[2], device=q.device) / k.shape[2]
    return sdpa(q, k, v, attn_mask=additive(mask) + slopes * distance, enable_gqa=True)


def prefix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    tokens = k.shape[2] - 7
    return sdpa(q, k[:, :, :tokens], v[:, :, :tokens], mask[..., :tokens], enable_gqa=True)


def is_causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Query i sees the first i + 1 slots, wherever the sequence stands."""
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


def by_tokens(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Code that keeps [batch, tokens, heads, width] and swaps for the attention."""
    k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    out = sdpa(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).transpose(1, 2)


def spelled_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, times), repeat_kv(v, times)
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = scores + additive(mask)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.5, training=False)
    return torch.matmul(weights, v)


def spelled_out_fill(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    scores = (q @ k.transpose(-2, -1)) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(mask == 0, float("-inf"))
    return scores.softmax(-1) @ v


def softcap(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    scores = torch.tanh(scores / 5.0) * 5.0
    scores = torch.where(mask, scores, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v


FUSED = {
    form.__name__: form
    for form in (
        *(enable_gqa, repeat_kv_bool, repeat_kv_float, repeat_interleave, casts, scale),
        *(two_axes_mask, head_mask, prefix, is_causal, by_tokens),
        *(spelled_out, spelled_out_fill, softcap),
    )
}


def wrong_head_order(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Same shapes as repeat_kv, other heads."""
    times = q.shape[1] // k.shape[1]
    return sdpa(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1), attn_mask=mask)


def wrong_head_order_of_values(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    return sdpa(q, repeat_kv(k, times), v.repeat(1, times, 1, 1), attn_mask=mask)


def dropout(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=mask, dropout_p=0.1, enable_gqa=True)


def dropout_spelled_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, times), repeat_kv(v, times)
    weights = (q @ k.transpose(2, 3) + additive(mask)).softmax(-1)
    return F.dropout(weights, p=0.1, training=True) @ v


def no_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Sees slots without a token, which a packed cache does not have."""
    return sdpa(q, k, v, enable_gqa=True)


def another_reader(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=mask, enable_gqa=True) + k.mean()


def swapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, v, k, attn_mask=mask, enable_gqa=True)


def shifted_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = k[:, :, 1:], v[:, :, 1:]
    return sdpa(q, k, v, attn_mask=mask[..., 1:], enable_gqa=True)


def reversed_tokens(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k.flip(2), v.flip(2), attn_mask=mask.flip(3), enable_gqa=True)


def scaled_values(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, 2 * v, attn_mask=mask, enable_gqa=True)


def weights_read(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, times), repeat_kv(v, times)
    weights = (q @ k.transpose(2, 3) + additive(mask)).softmax(-1)
    return weights @ v + weights.amax()


def mask_before_scale(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, times), repeat_kv(v, times)
    bias = torch.linspace(-1, 0, k.shape[2])
    return ((q @ k.transpose(2, 3) + additive(mask) + bias) * 0.3).softmax(-1) @ v


REFUSED = {
    wrong_head_order: "order",
    wrong_head_order_of_values: "order",
    dropout: "dropout",
    dropout_spelled_out: "dropout",
    no_mask: "no mask",
    another_reader: "read by mean",
    swapped: "",
    shifted_keys: "getitem",
    reversed_tokens: "flip",
    scaled_values: "(mul)",
    weights_read: "",
    mask_before_scale: "",
}
