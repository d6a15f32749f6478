"""`kvarn_ops.KVCache`: what `update` returns, what `attend` computes, positions and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kvarn_ops
from kvarn_ops import CacheCropError, CacheError, InputError, KVCache
from kvarn_ops.config import KVarNConfig

B, H, Q, D, T = 2, 2, 6, 32, 250
SMALL = KVarNConfig(group_size=32, num_sink_tokens=32, tail_tokens=16)


def make(config: KVarNConfig = SMALL, **options) -> KVCache:
    return KVCache(B, H, D, T, config, **options)


def tokens(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, B, H, count, D, generator=generator)
    return k, v


def positions(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count)


def fill(cache: KVCache, k: torch.Tensor, v: torch.Tensor, steps: list[int]) -> None:
    start = 0
    for count in steps:
        part = slice(start, start + count)
        cache.append(k[:, :, part], v[:, :, part], input_pos=positions(start, count))
        start += count
    assert start == k.shape[2]


@pytest.mark.parametrize("length", [1, 31, 32, 80, 81, 200, 250])
def test_update_returns_what_the_method_defines_and_zeros_beyond(length: int) -> None:
    k, v = tokens(length)
    k_hat, v_hat = make().update(k, v, input_pos=positions(0, length))
    assert k_hat.shape == v_hat.shape == (B, H, T, D)
    for got, wanted in zip((k_hat, v_hat), kvarn_ops.fake_quantize(k, v, SMALL), strict=True):
        torch.testing.assert_close(got[:, :, :length], wanted)
        assert not got[:, :, length:].any()


def test_any_split_into_updates_gives_the_same_cache() -> None:
    k, v = tokens(200)
    whole, pieces = make(), make()
    fill(whole, k, v, [200])
    fill(pieces, k, v, [3, 100, 1, 1, 95])
    for a, b in zip(whole.dequantized(), pieces.dequantized(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["reference", "aten"])
@pytest.mark.parametrize("kind", ["causal", "bool", "float", "heads", "short", "hidden"])
@pytest.mark.parametrize("count", [1, 5])
def test_attend_is_attention_over_what_update_returns(backend: str, kind: str, count: int) -> None:
    k, v = tokens(200)
    cache = make(backend=backend)
    fill(cache, k, v, [150, 49, 1])
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(B, Q, count, D, generator=generator)
    seen = positions(0, T) <= positions(200 - count, count)[:, None]  # [S, T]
    mask = seen[None, None]
    if kind == "heads":
        mask = mask & (torch.rand(B, Q, count, T, generator=generator) > 0.3)
    elif kind == "hidden":
        mask = mask & (torch.arange(B) > 0)[:, None, None, None]
    dense = torch.where(mask, 0.0, -torch.inf)
    if kind == "float":
        dense = dense + torch.randn(1, 1, count, T, generator=generator)
        mask = dense
    elif kind == "short":
        dense = dense.masked_fill(positions(0, T) >= 170, -torch.inf)
        mask = mask[..., :170]
    k_hat, v_hat = cache.dequantized()
    wanted = F.scaled_dot_product_attention(q, k_hat, v_hat, attn_mask=dense, enable_gqa=True)
    got = cache.attend(q) if kind == "causal" else cache.attend(q, mask=mask, is_causal=False)
    torch.testing.assert_close(got, wanted.nan_to_num(0.0), rtol=1e-4, atol=1e-4)


def test_positions_start_continue_and_crop_a_sequence() -> None:
    k, v = tokens(120)
    cache = make()
    fill(cache, k, v, [100, 20])
    cache.append(k[:, :, 110:], v[:, :, 110:], input_pos=positions(110, 10))  # as before: a crop
    straight = make()
    fill(straight, k, v, [120])
    for a, b in zip(cache.dequantized(), straight.dequantized(), strict=True):
        torch.testing.assert_close(a, b)
    k2, v2 = tokens(40, seed=2)
    second = cache.update(k2, v2, input_pos=positions(0, 40))
    first = make().update(k2, v2, input_pos=positions(0, 40))
    for a, b in zip(second, first, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("start", "count", "error", "says"),
    [
        (121, 1, CacheError, "gap"),
        (100, 1, CacheCropError, "tail_tokens"),
        (120, 131, CacheError, "max_cache_len"),
        (-1, 1, CacheError, "positions -1"),
    ],
)
def test_a_position_that_cannot_be_raises_and_changes_nothing(
    start: int, count: int, error: type[Exception], says: str
) -> None:
    k, v = tokens(120)
    cache = make()
    fill(cache, k, v, [120])
    before = [tensor.clone() for tensor in cache.buffers()]
    with pytest.raises(error, match=says):
        cache.append(*tokens(count), input_pos=positions(start, count))
    for tensor, kept in zip(cache.buffers(), before, strict=True):
        assert torch.equal(tensor, kept)


def test_positions_that_are_not_consecutive_are_refused() -> None:
    with pytest.raises(InputError, match="consecutive"):
        make().append(*tokens(2), input_pos=torch.tensor([0, 2]))


def test_repeated_crops_are_exact_until_they_raise() -> None:
    config = KVarNConfig(group_size=32, num_sink_tokens=0, tail_tokens=16)
    k, v = tokens(200)
    cache = make(config)
    fill(cache, k, v, [200])
    exact = []
    for start in range(190, 100, -10):
        part = slice(start, start + 1)
        try:
            cache.append(k[:, :, part], v[:, :, part], input_pos=positions(start, 1))
        except CacheCropError:
            break
        straight = make(config)
        fill(straight, k[:, :, : start + 1], v[:, :, : start + 1], [start + 1])
        for a, b in zip(cache.dequantized(), straight.dequantized(), strict=True):
            torch.testing.assert_close(a, b)
        exact.append(start)
    assert 0 < len(exact) < 9, exact


def test_the_check_without_a_wait_refuses_what_the_check_with_an_error_refuses() -> None:
    """On a GPU a position is checked on the device, by other code."""
    from kvarn_ops.ops.position import check_start, checked_start

    for config in (SMALL, KVarNConfig(group_size=32, num_sink_tokens=0, tail_tokens=40)):
        cache = make(config)
        for length in (0, 20, 33, 100, 159, 250):
            for high in {length, min(length + 25, T), min(length + 60, T)}:
                cache.seq_lens.fill_(length)
                cache.high_water.fill_(high)
                for start in range(-1, T + 1, 3):
                    state = (cache.high_water, T, config)
                    try:
                        check_start(start, 1, cache.seq_lens, *state)
                        wanted = start
                    except CacheError:
                        wanted = None
                    got = checked_start(torch.tensor(start), 1, cache.tiles, *state)
                    case = f"{config.to_string()} length {length} high {high} start {start}"
                    if wanted is None:
                        limit = config.num_sink_tokens + config.tail_tokens
                        full = limit + cache.tiles.k_codes.shape[2] * config.group_size
                        assert int(got[0]) >= full + config.group_size, case
                    else:
                        assert got.tolist() == [start] * B, case


def test_reset_empties_in_place() -> None:
    cache = make()
    addresses = [tensor.data_ptr() for tensor in cache.buffers()]
    cache.append(*tokens(100))
    cache.reset()
    assert [tensor.data_ptr() for tensor in cache.buffers()] == addresses
    assert not any(x.any() for x in cache.dequantized())
    assert not cache.high_water.any()


def test_casting_the_module_keeps_the_stored_format() -> None:
    k, v = tokens(200)
    cache = make()
    fill(cache, k, v, [200])
    before = cache.dequantized()
    cache.to(torch.bfloat16)
    assert cache.tiles.k_token_scale.dtype == torch.float16
    assert cache.rotation.dtype == torch.float32
    for got, wanted in zip(cache.dequantized(), before, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=1e-2)


def test_state_dict_stays_empty() -> None:
    assert not make().state_dict()


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"head_dim": 33}, {"max_cache_len": 0}])
def test_impossible_sizes_are_refused(sizes: dict[str, int]) -> None:
    good = {"batch_size": 1, "num_kv_heads": 1, "head_dim": 32, "max_cache_len": 64}
    with pytest.raises(InputError):
        KVCache(**(good | sizes))


def test_compiled_decode_reads_tiles_in_place_and_never_recompiles(fresh_dynamo) -> None:
    """`append` and `attend` in one graph: positions are tensors, and no cache is copied."""
    from torch._dynamo.utils import ReinplaceCounters, counters

    k, v = tokens(160)
    eager, cache = make(), make()
    fill(eager, k[:, :, :90], v[:, :, :90], [90])
    fill(cache, k[:, :, :90], v[:, :, :90], [90])

    @torch.compile(fullgraph=True)
    def step(q, k, v, mask, input_pos):
        cache.append(k, v, input_pos=input_pos)
        return cache.attend(q, mask=mask[:, :, input_pos], is_causal=False)

    causal = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    generator = torch.Generator().manual_seed(1)
    ReinplaceCounters.clear()
    counters.clear()
    with torch.inference_mode():
        for start in range(90, 160):
            q = torch.randn(B, Q, 1, D, generator=generator)
            part, at = slice(start, start + 1), positions(start, 1)
            got = step(q, k[:, :, part], v[:, :, part], causal, at)
            eager.append(k[:, :, part], v[:, :, part], input_pos=at)
            torch.testing.assert_close(got, eager.attend(q), rtol=1e-4, atol=1e-4)
        with pytest.raises(CacheError, match="gap"):
            step(q, k[:, :, :1], v[:, :, :1], causal, positions(200, 1))
    assert counters["stats"]["unique_graphs"] == 1
    assert ReinplaceCounters.get_total_missed() == 0


def test_compiled_append_continues_without_positions(fresh_dynamo) -> None:
    k, v = tokens(70)
    eager, cache = make(), make()
    step = torch.compile(lambda k, v: cache.append(k, v), fullgraph=True)
    with torch.inference_mode():
        for start in range(70):
            part = slice(start, start + 1)
            step(k[:, :, part], v[:, :, part])
            eager.append(k[:, :, part], v[:, :, part])
    for a, b in zip(cache.tiles, eager.tiles, strict=True):
        assert torch.equal(a, b)
