"""Dense attention of one query per row by every implementation that is installed.

Each is a function of `q` `[B, H_q, 1, D]`, `k` and `v` `[B, H_kv, T, D]` in bfloat16 that returns
`[B, H_q, 1, D]`. `gqa` leaves the grouping of heads to the implementation (`enable_gqa`), `packed`
makes the query heads of a KV head the rows of one product, `[B, H_kv, H_q / H_kv, D]`: the softmax
of one query has no causal mask, so both are the same. An implementation that does not run here
raises, and the stage says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_PAGE = 16  # tokens, of FlashInfer's cache


def sdpa(backend: SDPBackend, packed: bool) -> Attention:
    """PyTorch's own attention by one of its backends."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            if not packed:
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
            return F.scaled_dot_product_attention(rows, k, v).reshape(q.shape)

    return attend


def flex(compiled: bool) -> Attention:
    """FlexAttention, compiled for these shapes: with one query it takes its decoding kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # else shapes before these count as recompilations
    run: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    return lambda q, k, v: run(q, k, v, enable_gqa=True)


SDPA: dict[str, Attention] = {
    f"{name}_{form}": sdpa(backend, form == "packed")
    for name, backend in _BACKENDS.items()
    for form in ("gqa", "packed")
    if (name, form) != ("efficient", "gqa")  # not offered
}
OTHERS = ("flex", "flash_attn", "flashinfer")
NAMES = (*SDPA, *OTHERS)


def flash_attn_calls(q: Tensor, copies: list[tuple[Tensor, Tensor]]) -> list[Callable[[], Tensor]]:
    """Calls of the flash-attn package, version 3 if it is there; its layout is `[B, T, H, D]`."""
    try:
        from flash_attn_interface import flash_attn_with_kvcache  # type: ignore[import-not-found]
    except ImportError:
        from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found]

    def call(keys: Tensor, values: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            out = flash_attn_with_kvcache(query, keys, values, cache_seqlens=lengths)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return run

    query = q.transpose(1, 2).contiguous()
    tokens = copies[0][0].shape[2]
    lengths = torch.full((q.shape[0],), tokens, dtype=torch.int32, device=q.device)
    turned = [tuple(x.transpose(1, 2).contiguous() for x in pair) for pair in copies]
    return [call(keys, values) for keys, values in turned]


def flashinfer_calls(q: Tensor, copies: list[tuple[Tensor, Tensor]]) -> list[Callable[[], Tensor]]:
    """Calls of FlashInfer's batched decoding over a paged cache, planned once."""
    import flashinfer  # type: ignore[import-not-found]

    batch, q_heads, _, head_dim = q.shape
    _, kv_heads, tokens, _ = copies[0][0].shape
    pages = tokens // _PAGE
    place: dict[str, Any] = {"dtype": torch.int32, "device": q.device}
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=q_heads // kv_heads >= 4
    )
    wrapper.plan(
        torch.arange(batch + 1, **place) * pages, torch.arange(batch * pages, **place),
        torch.full((batch,), _PAGE, **place), q_heads, kv_heads, head_dim, _PAGE,
        q_data_type=q.dtype, kv_data_type=q.dtype,
    )  # fmt: skip

    def paged(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(batch * pages, _PAGE, kv_heads, head_dim)

    def call(cache: Tensor) -> Callable[[], Tensor]:
        return lambda: wrapper.run(query, cache).unsqueeze(2)

    query = q[:, :, 0].contiguous()
    return [call(torch.stack([paged(k), paged(v)], dim=1)) for k, v in copies]


def calls_of(
    name: str, q: Tensor, copies: list[tuple[Tensor, Tensor]]
) -> list[Callable[[], Tensor]]:
    """What is timed: one call per copy of keys and values."""
    if name == "flash_attn":
        return flash_attn_calls(q, copies)
    if name == "flashinfer":
        return flashinfer_calls(q, copies)
    attend = flex(q.is_cuda) if name == "flex" else SDPA[name]
    return [lambda k=k, v=v: attend(q, k, v) for k, v in copies]


def fp8_calls(
    attend: Attention, q: Tensor, copies: list[tuple[Tensor, Tensor]]
) -> list[Callable[[], Tensor]]:
    """A cache in fp8 (e4m3, no scales), made bfloat16 before every attention."""
    kind = torch.float8_e4m3fn
    stored = [(k.to(kind), v.to(kind)) for k, v in copies]
    return [lambda k=k, v=v: attend(q, k.to(q.dtype), v.to(q.dtype)) for k, v in stored]
