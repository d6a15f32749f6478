"""Append: what is stored depends on the tokens only, not on how they came."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn_ops import CacheError, InputError, KVarNConfig
from kvarn_ops.hadamard import hadamard
from kvarn_ops.layout import TileCache, allocate, capacity
from kvarn_ops.reference.attention import read_row
from kvarn_ops.reference.fake import fake_quantize

HEADS, DIM, MAX_LEN = 2, 32, 200
ROTATION = hadamard(DIM)


def config_of(tail: int = 0, sinks: int = 16) -> KVarNConfig:
    return KVarNConfig(group_size=32, num_sink_tokens=sinks, tail_tokens=tail)


def append(cache: TileCache, k, v, config: KVarNConfig, valid=None) -> None:
    torch.ops.kvarn.append_(k, v, valid, *cache, ROTATION, config.to_string(), "aten")


def fresh(config: KVarNConfig, rows: int = 1, dtype=torch.float32) -> TileCache:
    return allocate(config, rows, HEADS, DIM, MAX_LEN, dtype, "cpu")


def live_state(cache: TileCache, config: KVarNConfig, row: int) -> list[torch.Tensor]:
    """Everything that a reader of the cache may use; dead slots are left out."""
    length = int(cache.seq_lens[row])
    tiles = config.num_tiles(length)
    packed = [tensor[row, :, :tiles] for tensor in cache[:6]]
    return [*packed, *read_row(cache, row, config, ROTATION)]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    tail=st.sampled_from([0, 7, 32, 50]),
    sinks=st.sampled_from([0, 16]),
    seed=st.integers(0, 99),
)
def test_state_does_not_depend_on_the_pieces(pieces, tail, sinks, seed) -> None:
    config = config_of(tail, sinks)
    total = min(sum(pieces), MAX_LEN)
    torch.manual_seed(seed)
    k, v = torch.randn(2, 1, HEADS, total, DIM)
    once, many = fresh(config), fresh(config)
    append(once, k, v, config)
    start = 0
    for piece in pieces:
        stop = min(start + piece, total)
        append(many, k[:, :, start:stop], v[:, :, start:stop], config)
        start = stop
    assert int(many.seq_lens[0]) == total
    for a, b in zip(live_state(once, config, 0), live_state(many, config, 0), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), tail=st.sampled_from([0, 32]))
def test_padding_anywhere_is_dropped(seed, tail) -> None:
    config = config_of(tail)
    torch.manual_seed(seed)
    rows, total = 3, 150
    k, v = torch.randn(2, rows, HEADS, total, DIM)
    valid = torch.rand(rows, total) < torch.rand(rows, 1)
    valid[1] = False
    batch = fresh(config, rows)
    for start, stop in ((0, 60), (60, 61), (61, total)):
        piece = slice(start, stop)
        append(batch, k[:, :, piece], v[:, :, piece], config, valid[:, piece])
    for row in range(rows):
        alone = fresh(config)
        keep = valid[row]
        append(alone, k[row : row + 1, :, keep], v[row : row + 1, :, keep], config)
        assert int(batch.seq_lens[row]) == int(keep.sum())
        wanted, got = live_state(alone, config, 0), live_state(batch, config, row)
        for a, b in zip(wanted, got, strict=True):
            assert torch.equal(a, b), f"row {row} is stored differently in a batch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", [0, 40])
def test_reading_back_gives_fake_quantize(dtype, tail) -> None:
    config = config_of(tail)
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, HEADS, 190, DIM).to(dtype)
    cache = fresh(config, dtype=dtype)
    append(cache, k, v, config)
    k_hat, v_hat = fake_quantize(k, v, config)
    k_read, v_read = read_row(cache, 0, config, ROTATION)
    torch.testing.assert_close(k_read, k_hat[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(v_read, v_hat[0], rtol=1e-5, atol=1e-5)


def test_nan_token_spoils_nobody_else() -> None:
    config = config_of()
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, HEADS, 150, DIM)
    clean, dirty = fresh(config, 2), fresh(config, 2)
    append(clean, k, v, config)
    k[0, 0, 20], v[0, 1, 100, 3] = torch.nan, torch.inf
    append(dirty, k, v, config)
    for a, b in zip(live_state(clean, config, 1), live_state(dirty, config, 1), strict=True):
        assert torch.equal(a, b), "another row changed"
    for tensor in live_state(dirty, config, 0):
        assert tensor.float().isfinite().all()


def bad_inputs():
    ok = torch.zeros(2, HEADS, 3, DIM)
    yield "int64 keys", ok.long(), ok, None, "float16, bfloat16 or float32"
    yield "float64 keys", ok.double(), ok.double(), None, "float64"
    yield "dtype of the cache", ok.half(), ok.half(), None, "the cache holds"
    yield "batch size", ok[:1], ok[:1], None, "batch size 1"
    yield "heads", ok[:, :1], ok[:, :1], None, "this cache takes"
    yield "head_dim", ok[..., :16], ok[..., :16], None, "this cache takes"
    yield "k and v differ", ok, ok[:, :, :2], None, "differ in shape"
    yield "valid is not bool", ok, ok, torch.ones(2, 3), "give bool"
    yield "valid of another shape", ok, ok, torch.ones(2, 4, dtype=torch.bool), "give bool"


@pytest.mark.parametrize(
    ("name", "k", "v", "valid", "message"),
    [pytest.param(*case, id=case[0]) for case in bad_inputs()],
)
def test_bad_input_raises_and_changes_nothing(name, k, v, valid, message) -> None:
    config = config_of()
    cache = fresh(config, 2)
    append(cache, torch.randn(2, HEADS, 90, DIM), torch.randn(2, HEADS, 90, DIM), config)
    before = [tensor.clone() for tensor in cache]
    with pytest.raises(InputError, match=message):
        append(cache, k, v, config, valid)
    for tensor, kept in zip(cache, before, strict=True):
        assert torch.equal(tensor, kept), name


def test_a_full_cache_says_the_size_it_needs_and_keeps_everything() -> None:
    config = config_of()
    cache = fresh(config)
    room = capacity(config, cache.k_codes.shape[2])
    k = torch.randn(1, HEADS, room, DIM)
    append(cache, k, k, config)
    before = [tensor.clone() for tensor in cache]
    with pytest.raises(CacheError, match=f"max_cache_len={room + 1}"):
        append(cache, k[:, :, :1], k[:, :, :1], config)
    for tensor, kept in zip(cache, before, strict=True):
        assert torch.equal(tensor, kept)
