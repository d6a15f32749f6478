"""The step without custom ops computes what `kvarn::step` does, and stores the same bits."""

from __future__ import annotations

import pytest
import torch

from kvarn_ops.config import KVarNConfig
from kvarn_ops.hadamard import hadamard
from kvarn_ops.layout import TileCache, allocate, capacity
from kvarn_ops.ops.portable import PortableTarget, step_portable

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
