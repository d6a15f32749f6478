"""Attention and step: the fast form against the written-out one, and both against float64."""

from __future__ import annotations

import math

import pytest
import torch

from kvarn_ops import InputError, KVarNConfig
from kvarn_ops.layout import TileCache
from kvarn_ops.ops.samples import filled_cache
from kvarn_ops.reference.attention import read_row

SMALL = dict(group_size=32, num_sink_tokens=32)


def step(cache, rotation, config, q, k, v, valid=None, sinks=None, softcap=0.0, causal=True,
         backend="aten", twin=True):  # fmt: skip
    op = torch.ops.kvarn.step if twin else torch.ops.kvarn.step_
    scale = q.shape[-1] ** -0.5
    line = config.to_string()
    return op(q, k, v, valid, *cache, rotation, sinks, scale, softcap, causal, line, backend)


def float64_attention(q, keys, values, visible, sinks, softcap):
    """Plain attention of one row `[H, S, D]` in float64."""
    group = q.shape[0] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(group, 0) for x in (keys, values))
    scores = q.double() @ keys.mT / math.sqrt(q.shape[-1])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.where(visible, scores, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None, None]
    return torch.where(total > 0, weights @ values / total.clamp_min(1e-300), 0.0)


CASES = [
    # preset, head_dim, (q heads, kv heads), lengths, new tokens, softcap, sinks, causal
    ("k4v2", 64, (4, 2), [200, 33], 1, 0.0, False, True),
    ("k2v2", 64, (8, 2), [200, 0], 1, 0.0, False, True),
    ("k3v3", 32, (2, 2), [250, 100], 1, 5.0, True, True),
    ("k8v4", 128, (3, 1), [129, 128], 1, 0.0, True, True),
    ("k2v3", 80, (6, 2), [200, 64], 5, 0.0, False, True),
    ("k4v4", 96, (4, 4), [10, 200], 40, 30.0, True, True),
    ("k3v2", 192, (7, 1), [0, 0], 33, 0.0, True, True),
    ("k8v8", 112, (4, 2), [150, 90], 6, 0.0, False, False),
    ("k4v2", 576, (2, 1), [140, 20], 2, 0.0, False, True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-d{c[1]}-q{c[4]}")
@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("padded", [False, True])
def test_step_against_float64(case, backend, padded) -> None:
    preset, dim, (q_heads, kv_heads), lengths, count, softcap, with_sinks, causal = case
    config = KVarNConfig.from_preset(preset + "_g32", num_sink_tokens=32, tail_tokens=20)
    cache, rotation = filled_cache(config, lengths, "cpu", num_kv_heads=kv_heads, head_dim=dim,
                                   max_cache_len=300)  # fmt: skip
    torch.manual_seed(1)
    q = torch.randn(2, q_heads, count, dim)
    k, v = torch.randn(2, 2, kv_heads, count, dim)
    sinks = torch.randn(q_heads) if with_sinks else None
    valid = None
    if padded:
        valid = torch.ones(2, count, dtype=torch.bool)
        valid[0, : count // 2 + 1] = False
    out = step(cache, rotation, config, q, k, v, valid, sinks, softcap, causal, backend)[0]
    for row in range(2):
        old_k, old_v = read_row(cache, row, config, rotation)
        among_new = torch.ones(count, count, dtype=torch.bool)
        among_new = among_new.tril() if causal else among_new
        if valid is not None:
            among_new = among_new & valid[row]
        visible = torch.cat([torch.ones(count, old_k.shape[1], dtype=torch.bool), among_new], -1)
        keys, values = torch.cat([old_k, k[row]], 1), torch.cat([old_v, v[row]], 1)
        expected = float64_attention(q[row], keys, values, visible, sinks, softcap)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("count", [1, 4, 50])
def test_attention_after_append_is_step_when_no_tile_was_finished(count) -> None:
    config = KVarNConfig(**SMALL, tail_tokens=64)
    cache, rotation = filled_cache(config, [130, 35], "cpu")
    torch.manual_seed(2)
    q, (k, v) = torch.randn(2, 4, count, 64), torch.randn(2, 2, 2, count, 64)
    out, *after = step(cache, rotation, config, q, k, v)
    tiles = [config.num_tiles(n) for n in (130 + count, 35 + count)]
    assert count > 30 or tiles == [config.num_tiles(130), config.num_tiles(35)]
    for backend in ("aten", "reference"):
        again = torch.ops.kvarn.attention(
            q, *after, rotation, None, 0.125, 0.0, True, config.to_string(), backend
        )
        if tiles == [config.num_tiles(130), config.num_tiles(35)]:
            torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-5)
        assert again.isfinite().all()


def test_rows_do_not_depend_on_their_batch() -> None:
    config = KVarNConfig(**SMALL)
    cache, rotation = filled_cache(config, [220, 40, 0], "cpu")
    q, (k, v) = torch.randn(3, 4, 1, 64), torch.randn(2, 3, 2, 1, 64)
    together = step(cache, rotation, config, q, k, v)[0]
    for row in range(3):
        one = slice(row, row + 1)
        alone = step(TileCache(*(t[one] for t in cache)), rotation, config, q[one], k[one], v[one])
        torch.testing.assert_close(alone[0], together[one], rtol=1e-5, atol=1e-6)


def test_fully_masked_queries_give_zeros() -> None:
    config = KVarNConfig(**SMALL)
    cache, rotation = filled_cache(config, [0, 0], "cpu")
    q, (k, v) = torch.randn(2, 4, 6, 64), torch.randn(2, 2, 2, 6, 64)
    valid = torch.tensor([[False, False, True, True, True, True], [False] * 6])
    for backend in ("aten", "reference"):
        out = step(cache, rotation, config, q, k, v, valid, backend=backend)[0]
        assert (out[0, :, :2] == 0).all(), "queries before the first token see nothing"
        assert (out[1] == 0).all(), "a row of padding sees nothing"
        assert (out[0, :, 2:] != 0).all()


def test_every_stored_byte_matters() -> None:
    config = KVarNConfig(**SMALL)
    cache, rotation = filled_cache(config, [200], "cpu")
    q, (k, v) = torch.randn(1, 4, 1, 64), torch.randn(2, 1, 2, 1, 64)
    out = step(cache, rotation, config, q, k, v)[0]
    live = config.num_tiles(200)
    for name in ("k_codes", "v_codes"):
        flipped = cache._replace(**{name: getattr(cache, name).clone()})
        getattr(flipped, name)[0, 1, live - 1, 5, 3] ^= 0x5A
        assert not torch.equal(step(flipped, rotation, config, q, k, v)[0], out), name
        dead = cache._replace(**{name: getattr(cache, name).clone()})
        getattr(dead, name)[0, 1, live] ^= 0x5A
        assert torch.equal(step(dead, rotation, config, q, k, v)[0], out), f"{name}: dead tile read"


def test_stale_nan_in_the_tail_is_not_read() -> None:
    config = KVarNConfig(**SMALL)
    cache, rotation = filled_cache(config, [32 + 64], "cpu")
    cache.k_tail.fill_(torch.nan)  # every tail token has been quantized: the ring is dead
    cache.v_tail.fill_(torch.nan)
    q, (k, v) = torch.randn(1, 4, 1, 64), torch.randn(2, 1, 2, 1, 64)
    for backend in ("aten", "reference"):
        assert step(cache, rotation, config, q, k, v, backend=backend)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 20])
def test_low_precision_is_as_good_as_dense_low_precision(dtype, count) -> None:
    config = KVarNConfig(**SMALL)
    cache, rotation = filled_cache(config, [200, 70], "cpu", dtype=dtype)
    q = torch.randn(2, 4, count, 64).to(dtype)
    k, v = torch.randn(2, 2, 2, count, 64).to(dtype)
    out = step(cache, rotation, config, q, k, v)[0]
    assert out.dtype == dtype
    for row in range(2):
        old_k, old_v = read_row(cache, row, config, rotation)
        keys, values = torch.cat([old_k, k[row].float()], 1), torch.cat([old_v, v[row].float()], 1)
        visible = torch.ones(count, keys.shape[1], dtype=torch.bool).tril(old_k.shape[1])
        exact = float64_attention(q[row].float(), keys, values, visible, None, 0.0)
        dense = torch.nn.functional.scaled_dot_product_attention(
            q[row : row + 1], keys[None].to(dtype), values[None].to(dtype), visible,
            enable_gqa=True,
        )  # fmt: skip
        error, allowed = ((x.double() - exact).abs().max() for x in (out[row], dense[0]))
        assert error <= 2 * allowed + 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(q=a["q"].long()), "float16"),
        (lambda a: a.update(q=a["q"][:, :3]), "multiple of 2"),
        (lambda a: a.update(q=a["q"][..., :32]), "multiple of 2"),
        (lambda a: a.update(sinks=torch.zeros(3)), "one logit per query head"),
        (lambda a: a.update(k=a["k"].double(), v=a["v"].double()), "float64"),
    ],
)
def test_bad_input_raises_before_anything_is_stored(change, message) -> None:
    config = KVarNConfig(**SMALL)
    cache, rotation = filled_cache(config, [95, 40], "cpu")
    k, v = torch.randn(2, 2, 2, 1, 64)
    arguments = {"q": torch.randn(2, 4, 1, 64), "k": k, "v": v}
    change(arguments)
    before = [tensor.clone() for tensor in cache]
    with pytest.raises(InputError, match=message):
        step(cache, rotation, config, **arguments, twin=False)
    for tensor, kept in zip(cache, before, strict=True):
        assert torch.equal(tensor, kept)


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize(("count", "window"), [(1, 5), (1, 100), (1, 1000), (40, 17), (40, 90)])
@pytest.mark.parametrize("padded", [False, True])
def test_sliding_window_against_float64(count, window, padded, backend) -> None:
    """A query sees its own position and the `window - 1` before it, in cache and new tokens."""
    config = KVarNConfig(**SMALL, tail_tokens=20)
    lengths = [200, 33]
    cache, rotation = filled_cache(config, lengths, "cpu", num_kv_heads=2, head_dim=64)
    torch.manual_seed(1)
    q, (k, v) = torch.randn(2, 4, count, 64), torch.randn(2, 2, 2, count, 64)
    valid = torch.ones(2, count, dtype=torch.bool)
    if padded and count > 1:
        valid[0, ::3] = False
    out = torch.ops.kvarn.step(
        q, k, v, valid if padded else None, *cache, rotation, None, 0.125, 0.0, True,
        config.to_string(), backend, window,
    )[0]  # fmt: skip
    for row, length in enumerate(lengths):
        old_k, old_v = read_row(cache, row, config, rotation)
        kept = valid[row]
        keys = torch.cat([old_k, k[row][:, kept]], 1)
        values = torch.cat([old_v, v[row][:, kept]], 1)
        place = length + torch.arange(int(kept.sum()))[:, None]
        other = torch.arange(keys.shape[1])
        visible = (other <= place) & (other > place - window)
        expected = float64_attention(q[row][:, kept], keys, values, visible, None, 0.0)
        torch.testing.assert_close(out[row][:, kept].double(), expected, rtol=1e-4, atol=2e-5)


def test_empty_cache_with_a_window_shorter_than_the_prompt() -> None:
    config = KVarNConfig(**SMALL)
    cache, rotation = filled_cache(config, [0], "cpu", num_kv_heads=2, head_dim=64)
    q, (k, v) = torch.randn(1, 4, 50, 64), torch.randn(2, 1, 2, 50, 64)
    rest = (None, *cache, rotation, None, 0.125, 0.0, True, config.to_string())
    fast = torch.ops.kvarn.step(q, k, v, *rest, "aten", 8)[0]
    written_out = torch.ops.kvarn.step(q, k, v, *rest, "reference", 8)[0]
    torch.testing.assert_close(fast, written_out, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fast, torch.ops.kvarn.step(q, k, v, *rest, "aten")[0], atol=1e-3)


@pytest.mark.parametrize(("window", "causal"), [(-1, True), (8, False)])
def test_window_that_makes_no_sense(window, causal) -> None:
    config = KVarNConfig(**SMALL)
    cache, rotation = filled_cache(config, [40], "cpu", num_kv_heads=2, head_dim=64)
    q, (k, v) = torch.randn(1, 4, 1, 64), torch.randn(2, 1, 2, 1, 64)
    before = [x.clone() for x in cache]
    with pytest.raises(InputError, match="window"):
        torch.ops.kvarn.step_(q, k, v, None, *cache, rotation, None, 0.125, 0.0, causal,
                              config.to_string(), "aten", window)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, cache, strict=True))
