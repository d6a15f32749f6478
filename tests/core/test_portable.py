"""The step without custom ops computes what `kvarn::step` does, and stores the same bits."""

from __future__ import annotations

import pytest
import torch

from kvarn_ops.config import KVarNConfig
from kvarn_ops.hadamard import hadamard
from kvarn_ops.layout import TileCache, allocate, capacity
from kvarn_ops.ops.portable import (
    PortableTarget,
    append_at_portable,
    attention_portable,
    step_portable,
)

B, H, Q, D, MOST = 2, 2, 4, 32, 70

CONFIGS = [
    KVarNConfig(group_size=32, num_sink_tokens=32),
    KVarNConfig(group_size=32, num_sink_tokens=0, tail_tokens=20, encoder="paper", key_bits=2),
    KVarNConfig(group_size=64, num_sink_tokens=8, key_bits=3, value_bits=3),
    KVarNConfig(group_size=32, num_sink_tokens=40, key_bits=8, value_bits=8, rotate_keys=False),
]


@pytest.mark.parametrize(("padded", "fast_decode"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("window", [0, 45])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.to_string())
def test_steps_of_any_length_agree(
    config: KVarNConfig, window: int, padded: bool, fast_decode: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    expected = allocate(config, B, H, D, 330, torch.float32, "cpu")
    got = TileCache(*(tensor.clone() for tensor in expected))
    rotation, options = hadamard(D), (None, D**-0.5, 0.0)
    for count in (40, 1, 1, 30, 3, MOST, 1, 17, 1, 60, 1, 1, 64, 1):
        k, v = torch.randn(2, B, H, count, D, generator=generator)
        q = torch.randn(B, Q, count, D, generator=generator)
        valid = torch.rand(B, count, generator=generator) > 0.3 if padded else None
        out, *stored = torch.ops.kvarn.step(
            q, k, v, valid, *expected, rotation, *options, True, config.to_string(), "reference",
            window,
        )  # fmt: skip
        result, got = step_portable(
            q, k, v, valid, got, rotation, *options, True, config, window,
            PortableTarget(MOST, fast_decode),
        )  # fmt: skip
        expected = TileCache(*stored)
        for name, a, b in zip(TileCache._fields, got, expected, strict=True):
            assert torch.equal(a, b), f"{name} after {count} tokens, {int(got.seq_lens[0])} in all"
        seen = torch.ones(B, count, dtype=torch.bool) if valid is None else valid
        torch.testing.assert_close(result.mT[..., seen[0]][0], out.mT[..., seen[0]][0])
    assert config.num_tiles(int(got.seq_lens.min())) >= 2


def test_too_many_tokens_give_nan_and_leave_the_tiles() -> None:
    config = CONFIGS[0]
    cache = allocate(config, B, H, D, 100, torch.float32, "cpu")
    limit = capacity(config, cache.k_codes.shape[2])
    k, v = torch.randn(2, B, H, limit, D)
    for count, full in ((limit, False), (1, True), (40, True)):
        q = torch.randn(B, Q, count, D)
        new = (q, k[:, :, :count], v[:, :, :count], None)
        tiles = [tensor.clone() for tensor in cache.packed]
        out, cache = step_portable(
            *new, cache, hadamard(D), None, 1.0, 0.0, True, config, 0, PortableTarget(limit, False)
        )
        assert bool(out.isnan().all()) == full
        same = all(torch.equal(a, b) for a, b in zip(tiles, cache.packed, strict=True))
        assert same == full


@pytest.mark.parametrize(("window", "masked"), [(0, None), (45, None), (0, "bool"), (0, "float")])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.to_string())
def test_tokens_at_given_positions_agree(
    config: KVarNConfig, window: int, masked: str | None
) -> None:
    """Appended, removed as far as the tail allows, and started again."""
    generator, length = torch.Generator().manual_seed(0), 330
    expected = allocate(config, B, H, D, length, torch.float32, "cpu")
    got = TileCache(*(tensor.clone() for tensor in expected))
    rotation, options, line = hadamard(D), (None, D**-0.5, 0.0), config.to_string()
    high, high_got = torch.zeros(2, B, dtype=torch.int64)
    back = config.tail_tokens
    counts = [40, 1, 1, 30, MOST, 1, 60, 1]
    starts = [sum(counts[:index]) for index in range(len(counts))]
    for start, count in [*zip(starts, counts, strict=True), (204 - back, 3), (0, 60), (60, 50)]:
        k, v = torch.randn(2, B, H, count, D, generator=generator)
        q = torch.randn(B, Q, count, D, generator=generator)
        position = torch.arange(start, start + count)
        high, *stored = torch.ops.kvarn.append_at(
            k, v, position, high, *expected, rotation, line, "reference", length
        )
        expected, target = TileCache(*stored), PortableTarget(None, True)
        high_got, got = append_at_portable(
            k, v, position, high_got, got, rotation, config, length, target
        )
        for name, a, b in zip(TileCache._fields, got, expected, strict=True):
            assert torch.equal(a, b), f"{name} after {count} tokens at {start}"
        assert torch.equal(high, high_got)
        mask = None
        if masked is not None:
            mask = torch.rand(B, 1, count, length, generator=generator) > 0.3
            mask = mask if masked == "bool" else mask.float()
        out = torch.ops.kvarn.attention(
            q, *expected, rotation, *options, True, line, "reference", window, mask
        )
        result = attention_portable(q, got, rotation, *options, True, config, window, mask, target)
        torch.testing.assert_close(result, out)


@pytest.mark.parametrize("start", [41, 20, -1, 330])
def test_impossible_positions_give_nan_until_a_new_sequence(start: int) -> None:
    config, target = CONFIGS[0], PortableTarget(None, False)
    cache = allocate(config, B, H, D, 330, torch.float32, "cpu")
    rotation, high = hadamard(D), torch.zeros(B, dtype=torch.int64)

    def append(start: int, count: int) -> None:
        nonlocal high, cache
        k, v = torch.randn(2, B, H, count, D)
        position = torch.arange(start, start + count)
        high, cache = append_at_portable(k, v, position, high, cache, rotation, config, 330, target)

    def attended() -> torch.Tensor:
        options = (rotation, None, 1.0, 0.0, True, config, 0, None, target)
        return attention_portable(torch.randn(B, Q, 1, D), cache, *options)

    append(0, 40)
    assert attended().isfinite().all()
    append(start, 1)
    assert attended().isnan().all()
    append(0, 5)
    assert attended().isfinite().all()
