"""One decode step of one attention layer: KVarN compiled and eager, and dense attention.

KVarN attends to its cache and stores the new token; dense attends to a cache of the same length
and stores nothing (its append is one small copy). Everything is random data in bfloat16. Dense with
`enable_gqa` is the yardstick; `packed_gqa` puts the query heads of a KV head side by side, the form
that transformers uses eagerly for one token.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from .._compat import maybe_dynamic
from ..config import KVarNConfig
from ..errors import InputError
from ..layout import TileCache, allocate
from ..ops.samples import filled_cache
from .timing import Contender

__all__ = ["CONTENDERS", "DENSE", "DENSE_PACKED", "KVARN", "KVARN_EAGER", "DecodeStep", "Shape"]

KVARN, KVARN_EAGER = "kvarn_compiled", "kvarn_eager"
DENSE, DENSE_PACKED = "dense_bf16", "dense_bf16_packed_gqa"
CONTENDERS = (KVARN, KVARN_EAGER, DENSE, DENSE_PACKED)
OUTPUT_BOUND = 1e-2  # of the largest output; the arithmetic is fp32, the output bfloat16
_ENCODED_TILES = 4  # repeated to fill a cache: encoding thousands takes longer than measuring
_HEADS = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer's attention."""

    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def parse(cls, batch: int, heads: str, head_dim: int) -> Shape:
        """From `--heads 16/4`: query heads / KV heads."""
        match = _HEADS.fullmatch(heads.strip())
        q_heads, kv_heads = map(int, match.groups()) if match else (0, 0)
        if not kv_heads or q_heads % kv_heads or batch < 1:
            raise InputError(
                f"--heads {heads}, --batch {batch}: give query heads / KV heads, the first a "
                "multiple of the second (16/4), and a batch of 1 or more."
            )
        return cls(batch, q_heads, kv_heads, head_dim)

    def __str__(self) -> str:
        return f"{self.batch} × {self.q_heads}/{self.kv_heads} × {self.head_dim}"


class DecodeStep:
    """Tensors of one step, and what is timed on them.

    Parameters
    ----------
    config : KVarNConfig
    shape : Shape
    context : int
        Tokens in the cache.
    device : torch.device
    compiled : callable
        From `compiled_step`.
    """

    def __init__(
        self,
        config: KVarNConfig,
        shape: Shape,
        context: int,
        device: torch.device,
        compiled: Callable[..., Tensor],
    ) -> None:
        self.config, self.shape, self.context = config, shape, context
        self._compiled = compiled
        self.backend = dispatch.resolve("auto", device)
        batch, heads, width = shape.batch, shape.kv_heads, shape.head_dim
        generator = torch.Generator().manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device, torch.bfloat16)

        self.q = randn(batch, shape.q_heads, 1, width)
        self.k, self.v = randn(batch, heads, 1, width), randn(batch, heads, 1, width)
        self.k_dense = randn(batch, heads, context, width)
        self.v_dense = randn(batch, heads, context, width)
        self.cache, self.rotation = random_cache(config, shape, context, device)
        for tensor in self.cache.packed:  # one compilation serves all contexts
            maybe_dynamic(tensor, 2)

    def bytes(self) -> tuple[int, int]:
        """Bytes of the dense cache of these tokens, and of the KVarN cache for them."""
        dense = self.k_dense.nbytes + self.v_dense.nbytes
        return dense, sum(tensor.nbytes for tensor in self.cache)

    def contenders(self) -> dict[str, Contender]:
        """What is timed; both KVarN forms are put back to `context` tokens before each call."""
        shape = self.shape
        grouped = self.q.view(shape.batch, shape.kv_heads, -1, shape.head_dim)
        k, v = self.k_dense, self.v_dense

        def back() -> None:
            self.cache.seq_lens.fill_(self.context)

        return {
            KVARN: Contender(lambda: self.step(self.backend, self._compiled), back),
            KVARN_EAGER: Contender(lambda: self.step(self.backend), back),
            DENSE: Contender(lambda: F.scaled_dot_product_attention(self.q, k, v, enable_gqa=True)),
            DENSE_PACKED: Contender(lambda: F.scaled_dot_product_attention(grouped, k, v)),
        }

    def step(self, backend: str, function: Callable[..., Tensor] | None = None) -> Tensor:
        """Attend and append once; `[B, H_q, 1, D]`."""
        run = function or torch.ops.kvarn.step_
        return run(*self._arguments(self.cache, backend))

    def expected(self) -> dict[str, Tensor]:
        """Outputs that the contenders must have: the reference on the CPU, dense in float64."""
        on_cpu = TileCache(*(tensor.to("cpu", copy=True) for tensor in self.cache))
        moved = [x.cpu() if isinstance(x, Tensor) else x
                 for x in self._arguments(on_cpu, "reference")]  # fmt: skip
        packed = torch.ops.kvarn.step_(*moved)
        q, k, v = (x.cpu().double() for x in (self.q, self.k_dense, self.v_dense))
        dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        grouped = dense.view(self.shape.batch, self.shape.kv_heads, -1, self.shape.head_dim)
        return {KVARN: packed, KVARN_EAGER: packed, DENSE: dense, DENSE_PACKED: grouped}

    def errors(self, expected: dict[str, Tensor]) -> dict[str, float]:
        """Run every contender once: its largest error over the largest expected output."""
        found = {}
        for name, contender in self.contenders().items():
            if contender.prepare is not None:
                contender.prepare()
            output: Any = contender.run()
            wanted = expected[name].double()
            difference = (output.cpu().double() - wanted).abs().amax()
            found[name] = (difference / wanted.abs().amax()).item()
        return found

    def _arguments(self, cache: TileCache, backend: str) -> tuple[Any, ...]:
        scale = self.shape.head_dim**-0.5
        rest = (self.rotation, None, scale, 0.0, True, self.config.to_string(), backend)
        return (self.q, self.k, self.v, None, *cache, *rest)


def compiled_step() -> Callable[..., Tensor]:
    """`kvarn::step_` under Inductor, as a patched and compiled model runs it."""
    from ..lowering.hooks import inductor_options

    def step(*arguments: Any) -> Tensor:
        return torch.ops.kvarn.step_(*arguments)

    return torch.compile(step, fullgraph=True, options=inductor_options())


def random_cache(
    config: KVarNConfig, shape: Shape, context: int, device: torch.device
) -> tuple[TileCache, Tensor]:
    """A cache of `context` random tokens per row, and its rotation matrix.

    A few tiles are encoded and copied to fill it: sizes and addresses are those of a real cache.
    """
    sizes = {"num_kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "dtype": torch.bfloat16}
    tiles = config.num_tiles(context)
    kept = min(tiles, _ENCODED_TILES)
    short = context - (tiles - kept) * config.group_size
    source, rotation = filled_cache(
        config, [short] * shape.batch, device, max_cache_len=short, **sizes
    )
    cache = allocate(
        config, shape.batch, shape.kv_heads, shape.head_dim, context + 1, torch.bfloat16, device
    )
    for name in ("k_sink", "v_sink", "k_tail", "v_tail"):
        getattr(cache, name).copy_(getattr(source, name))
    if kept:
        index = torch.arange(tiles, device=device) % kept
        for full, few in zip(cache.tiles(0, tiles), source.tiles(0, kept), strict=True):
            full.copy_(few.index_select(2, index))
    cache.seq_lens.fill_(context)
    return cache, rotation
