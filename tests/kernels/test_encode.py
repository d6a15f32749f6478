"""What kernels store: codes, scales and equalizers of finished tiles against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernel_cases import CODES, EQUALIZERS, SCALES, make_problem, poison_unused, share_of_different
from kvarn_ops import KVarNConfig
from kvarn_ops.hadamard import hadamard
from kvarn_ops.layout import TileCache, allocate
from tiles import KINDS, make_tiles

TIES = 1e-4
HEADS = 2


def empty_cache(config: KVarNConfig, rows: int, head_dim: int, dtype: torch.dtype) -> TileCache:
    cache = allocate(config, rows, HEADS, head_dim, 512, dtype, "cpu")
    poison_unused(cache, config)
    return cache


def append(
    backend: str, cache: TileCache, k: torch.Tensor, v: torch.Tensor, config: KVarNConfig,
    device: torch.device, valid: torch.Tensor | None = None,
) -> TileCache:  # fmt: skip
    """The cache after the append, on the CPU; `cache` stays as it is."""
    tensors = [x.to(device) for x in (k, v, *cache)]
    rotation = hadamard(k.shape[-1], device=device)
    mask = None if valid is None else valid.to(device)
    after = torch.ops.kvarn.append(
        *tensors[:2], mask, *tensors[2:], rotation, config.to_string(), backend
    )
    return TileCache(*(x.cpu() for x in after))


def equalized(cache: TileCache, like: TileCache) -> TileCache:
    """`cache` with the equalizers of `like`: made by one side, so that both use the same."""
    return cache._replace(**{name: getattr(like, name) for name in EQUALIZERS})


def assert_same_tiles(found: TileCache, wanted: TileCache, scale_error: float = 2e-3) -> None:
    for field in CODES:
        assert share_of_different(getattr(found, field), getattr(wanted, field)) <= TIES, field
    for field in SCALES:
        a, b = getattr(found, field).float(), getattr(wanted, field).float()
        torch.testing.assert_close(a, b, rtol=scale_error, atol=scale_error, equal_nan=True)


@pytest.mark.parametrize("encoder", ["plus", "paper"])
@pytest.mark.parametrize(
    ("preset", "head_dim"),
    [("k2v2_g32", 64), ("k3v3_g64", 32), ("k4v4_g128", 128), ("k8v8_g32", 96), ("k2v3_g32", 160)],
)
def test_tiles_of_one_append(
    preset: str, head_dim: int, encoder: str, device: torch.device
) -> None:
    config = KVarNConfig.from_preset(preset, encoder=encoder, num_sink_tokens=8, tail_tokens=5)
    count = 8 + 5 + 2 * config.group_size + 3
    k, v = (make_tiles("token_spread", 1, HEADS, count, head_dim, seed=s) for s in (0, 1))
    cache = empty_cache(config, 1, head_dim, torch.float32)
    made = append("triton", cache, k, v, config, device)
    wanted = append("reference", equalized(cache, made), k, v, config, device)
    assert config.num_tiles(count) == 2
    assert_same_tiles(made, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("std", [1e-4, 1.0, 1e4])
def test_amplitudes_and_outliers(kind: str, std: float, device: torch.device) -> None:
    config = KVarNConfig.from_preset("k2v2_g32", num_sink_tokens=0)
    k, v = (make_tiles(kind, 1, HEADS, 32, 64, seed=s, std=std) for s in (2, 3))
    cache = empty_cache(config, 1, 64, torch.float32)
    made = append("triton", cache, k, v, config, device)
    wanted = append("reference", equalized(cache, made), k, v, config, device)
    assert_same_tiles(made, wanted)


@pytest.mark.parametrize("count", [1, 40, 100])
def test_equalizer_is_made_once_and_by_the_first_tile(count: int, device: torch.device) -> None:
    """Row 0 finishes its first tile, row 1 has one, row 2 finishes none."""
    before = [63, 120, 3]
    problem = make_problem("k4v2_g32", 64, before, count, device)
    wanted, found = problem.step("reference")[1], problem.step("triton")[1]
    for field in EQUALIZERS:
        kernel, reference = getattr(found, field).cpu(), getattr(wanted, field).cpu()
        # Two orders of summation: at most the last bit of fp16, of numbers up to 4.
        torch.testing.assert_close(kernel, reference, rtol=1e-3, atol=1e-3)
        old = getattr(problem.cache, field).cpu()
        assert torch.equal(kernel[1].view(torch.int16), old[1].view(torch.int16))
        assert (kernel[0].view(torch.int16) != 0).any()
        if before[2] + count < 64:
            assert (kernel[2].view(torch.int16) == 0).all()


def test_silent_and_broken_tiles(device: torch.device) -> None:
    """Zeros, NaN and Inf are stored as the reference stores them; other rows do not notice."""
    config = KVarNConfig.from_preset("k4v2_g32", num_sink_tokens=0)
    k, v = torch.randn(2, 4, HEADS, 32, 64)
    k[1], v[1] = 0.0, 0.0
    k[2, :, 3, 5], v[2, :, 4, 6] = torch.nan, torch.inf
    k[3, 0, 7] = 0.0
    cache = empty_cache(config, 4, 64, torch.float32)
    made = append("triton", cache, k, v, config, device)
    wanted = append("reference", equalized(cache, made), k, v, config, device)
    assert_same_tiles(made, wanted)
    k[2], v[2] = 1.0, 1.0
    other = append("triton", cache, k, v, config, device)
    for field in (*CODES, *SCALES):
        assert share_of_different(getattr(made, field)[0], getattr(other, field)[0]) == 0, field


@pytest.mark.parametrize("tail_tokens", [0, 20, 70])
def test_token_by_token_is_all_at_once(tail_tokens: int, device: torch.device) -> None:
    """The ring, its wrap-around and the lag, against one append of everything."""
    config = KVarNConfig.from_preset("k4v4_g32", num_sink_tokens=5, tail_tokens=tail_tokens)
    lengths = [5 + 32 + tail_tokens + 32, 9]
    total = max(lengths)
    k, v = torch.randn(2, 2, HEADS, total, 32)
    valid = torch.arange(total) < torch.tensor(lengths)[:, None]
    once = empty_cache(config, 2, 32, torch.float32)
    once = append("triton", once, k, v, config, device, valid)
    pieces = empty_cache(config, 2, 32, torch.float32)
    position = 0
    for size in (3, 1, 1, 30, 2, 31, 200):
        part = slice(position, position + size)
        if position >= total:
            break
        pieces = append(
            "triton", pieces, k[:, :, part], v[:, :, part], config, device, valid[:, part]
        )
        position += size
    assert pieces.seq_lens.tolist() == lengths
    for name, a, b in zip(TileCache._fields, pieces, once, strict=True):
        if name in EQUALIZERS or "tail" in name:
            continue
        assert share_of_different(a, b) == 0, name
    assert_same_ring(pieces, once, config)


def assert_same_ring(found: TileCache, wanted: TileCache, config: KVarNConfig) -> None:
    for row, length in enumerate(wanted.seq_lens.tolist()):
        first = config.num_tiles(length) * config.group_size
        body: Any = torch.arange(first, max(first, length - config.num_sink_tokens))
        slots = body % config.ring_len
        for name in ("k_tail", "v_tail"):
            a, b = getattr(found, name)[row, :, slots], getattr(wanted, name)[row, :, slots]
            assert torch.equal(a, b), name


def test_most_tiles_that_new_tokens_finish(device: torch.device) -> None:
    """S tokens finish at most ceil(S / G) tiles, and the launch has programs for all of them."""
    config = KVarNConfig.from_preset("k4v4_g32", num_sink_tokens=0)
    for before in range(0, 64, 7):
        for count in (1, 31, 32, 33, 64, 65):
            finished = config.num_tiles(before + count) - config.num_tiles(before)
            assert finished <= -(-count // 32)
    k, v = torch.randn(2, 1, HEADS, 31 + 33, 32)
    cache = empty_cache(config, 1, 32, torch.float32)
    cache = append("triton", cache, k[:, :, :31], v[:, :, :31], config, device)
    made = append("triton", cache, k[:, :, 31:], v[:, :, 31:], config, device)
    reference = equalized(empty_cache(config, 1, 32, torch.float32), made)
    assert_same_tiles(made, append("reference", reference, k, v, config, device))


def test_equalizer_of_a_silent_tile_counts_as_made(device: torch.device) -> None:
    """Its factors are 1, stored as -0.0: a fork must not make its own from a later tile."""
    config = KVarNConfig.from_preset("k4v4_g32", num_sink_tokens=0)
    k, v = torch.zeros(1, HEADS, 32, 32), torch.ones(1, HEADS, 32, 32)
    cache = empty_cache(config, 1, 32, torch.float32)
    made, wanted = (append(name, cache, k, v, config, device) for name in ("triton", "reference"))
    for field in EQUALIZERS:
        assert share_of_different(getattr(made, field), getattr(wanted, field)) == 0, field
        assert getattr(made, field).signbit().all()
