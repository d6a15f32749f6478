"""One attention with a static cache, written in any form, to export and rewrite."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kvarn_ops import fake_quantize
from kvarn_ops.config import KVarNConfig

B, H, D, T = 2, 2, 32, 96
HQ = 4
SMALL = {"config": "k8v8_g32", "num_sink_tokens": 8}


def start_of(pos: Tensor, x: Tensor, cache: Tensor) -> int:
    start = pos[0].item()
    torch._check(start >= 0)
    torch._check(start + x.shape[2] <= cache.shape[2])
    return start


def index_copy(cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    return cache.index_copy_(2, pos, x)


def index_put(cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    cache[:, :, pos] = x
    return cache


def slice_assignment(cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    start = start_of(pos, x, cache)
    cache[:, :, start : start + x.shape[2]] = x
    return cache


def narrow(cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    cache.narrow(2, start_of(pos, x, cache), x.shape[2]).copy_(x)
    return cache


def slice_scatter(cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    start = start_of(pos, x, cache)
    new = cache.slice_scatter(x, 2, start, start + x.shape[2])
    cache.copy_(new)
    return new


def cat(cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    start = start_of(pos, x, cache)
    new = torch.cat([cache[:, :, :start], x, cache[:, :, start + x.shape[2] :]], 2)
    cache.copy_(new)
    return cache


def select(cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    cache.select(2, start_of(pos, x, cache)).copy_(x[:, :, 0])
    return cache


def shift(cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    new = torch.cat([cache[:, :, x.shape[2] :], x], 2)
    cache.copy_(new)
    return new


def causal(module: nn.Module, pos: Tensor) -> dict[str, Any]:
    return {"attn_mask": torch.arange(T) <= pos[:, None]}


def from_the_right(module: nn.Module, pos: Tensor) -> dict[str, Any]:
    """The causal mask of a cache whose newest token is the last."""
    token = torch.arange(T) - (T - 1 - pos[-1])
    return {"attn_mask": (token >= 0) & (token <= pos[:, None])}


class Attention(nn.Module):
    """`forward(q, k, v, pos)`: write `[B, H, S, D]` at `pos` `[S]`, attend `[B, HQ, S, D]`."""

    def __init__(
        self,
        write: Callable[..., Tensor] = index_copy,
        mask: Callable[..., dict[str, Any]] = causal,
        read: Callable[[Tensor], Tensor] = lambda x: x,
        shape: tuple[int, ...] = (B, H, T, D),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(shape, dtype=dtype))
        self.register_buffer("values", torch.zeros(shape, dtype=dtype))
        self.write, self.mask, self.read = write, mask, read

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        k = self.read(self.write(self.keys, k, pos))
        v = self.read(self.write(self.values, v, pos))
        out = F.scaled_dot_product_attention(
            q, k, v, enable_gqa=k.shape[1] != q.shape[1], **self.mask(self, pos)
        )
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def step(count: int, start: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of one call."""
    generator = torch.Generator().manual_seed(1000 * seed + start)

    def draw(heads: int) -> Tensor:
        return torch.randn(B, heads, count, D, generator=generator)

    return draw(HQ), draw(H), draw(H), torch.arange(start, start + count)


def exported(module: nn.Module, count: int | None = 1) -> ExportedProgram:
    """The program for `count` tokens, or for any number of them (None)."""
    if count is not None:
        return torch.export.export(module, step(count, 0))
    size = Dim("size", min=2, max=T - 1)
    shapes = ({2: size}, {2: size}, {2: size}, {0: size})
    return torch.export.export(module, step(4, 0), dynamic_shapes=shapes)


def expected(inputs: list[tuple[Tensor, ...]], **attention: Any) -> Tensor:
    """What the last call gives if the method is applied to everything that was written."""
    q, pos = inputs[-1][0], inputs[-1][3]
    k, v = (torch.cat([one[index] for one in inputs], 2) for index in (1, 2))
    small = KVarNConfig.from_preset(SMALL["config"], num_sink_tokens=SMALL["num_sink_tokens"])
    k, v = fake_quantize(k, v, small)
    if not attention:
        attention["attn_mask"] = torch.arange(k.shape[2]) <= pos[:, None]
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **attention)
    return out.transpose(1, 2).flatten(2)
