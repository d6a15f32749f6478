"""A small decoder with a KV cache of its own, as many projects write it, with KVarN and without.

Nothing in the model knows of kvarn_ops: a cache module keeps keys and values in two dense buffers,
writes new tokens at `input_pos` and returns the whole buffers, which attention reads under a mask.

Example
-------
    python examples/gpt_fast_style.py                # random weights, seconds
    python examples/gpt_fast_style.py --compile --prompt 600 --new 100
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    vocab_size: int = 256
    num_layers: int = 2
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    ffn_dim: int = 384
    rope_base: float = 10_000.0
    native_gqa: bool = False  # attention repeats the heads, else `repeat_interleave` does

    @property
    def dim(self) -> int:
        return self.num_q_heads * self.head_dim


class KVCache(nn.Module):
    """Two dense buffers `[B, H, T, D]`; every update returns both, whole."""

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        max_seq_length: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        shape = (batch_size, num_heads, max_seq_length, head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype), persistent=False)

    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        # input_pos: [S], k_val and v_val: [B, H, S, D]
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, input_pos] = k_val
        v_out[:, :, input_pos] = v_val
        return k_out, v_out


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).type_as(x) * (
            self.weight
        )


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE on `[B, S, H, D]` with cosines and sines `[2, S, D / 2]`."""
    cos, sin = angles.unsqueeze(2)
    even, odd = x.float().chunk(2, -1)
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1).type_as(x)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        heads = config.num_q_heads + 2 * config.num_kv_heads
        self.qkv = nn.Linear(config.dim, heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.kv_cache: KVCache | None = None

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        c = self.config
        heads = self.qkv(x).unflatten(-1, (-1, c.head_dim))  # [B, S, H_q + 2 H_kv, D]
        q, k, v = heads.split([c.num_q_heads, c.num_kv_heads, c.num_kv_heads], dim=2)
        q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.kv_cache is not None:
            k, v = self.kv_cache.update(input_pos, k, v)
        if c.native_gqa:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        else:
            k = k.repeat_interleave(c.num_q_heads // c.num_kv_heads, dim=1)
            v = v.repeat_interleave(c.num_q_heads // c.num_kv_heads, dim=1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = RMSNorm(config.dim)
        self.ffn_norm = RMSNorm(config.dim)
        self.up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, mask, input_pos)
        gate, up = self.up(self.ffn_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.max_seq_length = 0

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        """Give each layer an empty cache, and make the mask and the angles of that length."""
        c, place = self.config, self.embed.weight
        self.max_seq_length = max_seq_length
        for layer in self.layers:
            layer.attention.kv_cache = KVCache(
                max_batch_size, c.num_kv_heads, max_seq_length, c.head_dim, place.dtype
            ).to(place.device)
        causal = torch.ones(max_seq_length, max_seq_length, dtype=torch.bool).tril()
        rates = c.rope_base ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        turns = torch.outer(torch.arange(max_seq_length), rates)
        angles = torch.stack([turns.cos(), turns.sin()])  # [2, T, D / 2]
        self.register_buffer("causal_mask", causal.to(place.device), persistent=False)
        self.register_buffer("angles", angles.to(place.device), persistent=False)

    def forward(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        """Logits `[B, S, vocab]` of tokens `[B, S]` at positions `[S]`."""
        mask = self.causal_mask[None, None, input_pos]
        angles = self.angles[:, input_pos]
        x = self.embed(idx)
        for layer in self.layers:
            x = layer(x, angles, mask, input_pos)
        return self.head(self.norm(x))


def random_model(config: Config | None = None, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model in eval mode whose weights come from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Transformer(config or Config()).to(dtype).eval()


@torch.no_grad()
def generate(model: nn.Module, prompt: Tensor, new_tokens: int, step: nn.Module | None = None):
    """Greedy text `[B, S + new_tokens]`; `step` runs the single tokens (a compiled model)."""
    step = model if step is None else step
    device = prompt.device
    logits = model(prompt, torch.arange(prompt.shape[1], device=device))
    tokens = [prompt, logits[:, -1:].argmax(-1)]
    position = torch.tensor([prompt.shape[1]], device=device)
    for _ in range(new_tokens - 1):
        logits = step(tokens[-1], position)
        tokens.append(logits[:, -1:].argmax(-1))
        position += 1
    return torch.cat(tokens, dim=1)


def held_bytes(model: nn.Module) -> int:
    """Bytes of all floating and packed buffers that are one per layer: the caches."""
    storages = {
        buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes()
        for layer in model.layers
        for buffer in layer.buffers()
    }
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="k4v2_g128")
    parser.add_argument("--prompt", type=int, default=500, help="tokens of the random prompt")
    parser.add_argument("--new", type=int, default=40, help="tokens to generate")
    parser.add_argument("--context", type=int, default=4096, help="tokens the caches have room for")
    parser.add_argument("--compile", action="store_true", help="compile the decode step")
    options = parser.parse_args()

    import kvarn_ops

    prompt = torch.randint(Config.vocab_size, (1, options.prompt))
    texts = []
    for name in ("dense", options.preset):
        model = random_model()
        model.setup_caches(max_batch_size=1, max_seq_length=options.context)
        if name != "dense":
            kvarn_ops.patch(model, name)
        step = torch.compile(model, fullgraph=True) if options.compile else model
        generate(model, prompt, 2, step)  # compiles
        start = time.perf_counter()
        texts.append(generate(model, prompt, options.new, step))
        rate = options.new / (time.perf_counter() - start)
        print(f"{name:10s} {rate:7.1f} tokens/s, caches of {held_bytes(model) / 2**20:.2f} MiB")
    same = (texts[0] == texts[1])[:, options.prompt :].float().mean().item()
    print(f"{same:.0%} of the tokens are the same (random weights: not a measure of quality)")


if __name__ == "__main__":
    main()
