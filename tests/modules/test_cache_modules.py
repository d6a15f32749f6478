"""Cache modules of many forms, packed: each call returns what the method defines, their own way."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvarn_ops
import own_caches
from kvarn_ops import CacheCropError, CacheError, InputError, UnsupportedModelError
from kvarn_ops.config import KVarNConfig
from own_caches import (
    CACHES,
    AngleTables,
    B,
    Case,
    Converts,
    CountsInside,
    D,
    H,
    IndexAssignment,
    T,
)

CONFIG = KVarNConfig(key_bits=8, value_bits=8, group_size=32, num_sink_tokens=8)
STEPS = [45, 1, 1, 60, *[1] * 40]  # 147 tokens, four tiles
cases = pytest.mark.parametrize("name", CACHES)


class Holder(nn.Module):
    """A model around a cache module."""

    def __init__(self, cache: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"cache": cache})
        self.tables = AngleTables()

    @property
    def cache(self) -> Any:
        return self.inner["cache"]


def patched(cache: nn.Module, **fields: Any) -> Holder:
    return kvarn_ops.patch(Holder(cache), CONFIG, **fields)


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, B, H, count, D, generator=generator)
    return k, v


def drive(case: Case, cache: Any, k: Tensor, v: Tensor, steps: list[int]) -> list[Any]:
    """All results of storing tokens in steps, copied."""
    results, start = [], 0
    for count in steps:
        part = slice(start, start + count)
        result = case.store(cache, k[:, :, part], v[:, :, part], start)
        results.append(type(result)(each.clone() for each in result))
        start += count
    return results


def pair(case: Case, result: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of a result as `[B, H, T, D]`."""
    first, second = (each if case.heads_first else each.transpose(1, 2) for each in result)
    return (first, second) if case.keys_first else (second, first)


def storages(module: nn.Module) -> list[int]:
    """Bytes of everything reachable as a buffer or attribute."""
    held = {}
    for part in module.modules():
        for value in [*part._buffers.values(), *vars(part).values()]:
            if isinstance(value, Tensor):
                held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return list(held.values())


@cases
def test_every_result_is_what_the_method_defines(name: str) -> None:
    case = CACHES[name]
    k, v = tokens(sum(STEPS))
    dense = drive(case, case.make(), k, v, STEPS)
    packed = drive(case, patched(case.make()).cache, k, v, STEPS)
    length = 0
    for count, got, wanted in zip(STEPS, packed, dense, strict=True):
        length += count
        assert type(got) is type(wanted)
        assert [each.shape for each in got] == [each.shape for each in wanted]
        now = (x[:, :, :length] for x in (k, v))
        for part, expected in zip(pair(case, got), kvarn_ops.fake_quantize(*now, CONFIG)):
            torch.testing.assert_close(part[:, :, :length], expected)
            assert not part[:, :, length:].any()
        if CONFIG.num_tiles(length) == 0:
            for part, exact in zip(pair(case, got), pair(case, wanted), strict=True):
                assert torch.equal(part[:, :, :length], exact[:, :, :length])


@cases
def test_the_dense_buffers_are_gone_until_unpatch(name: str) -> None:
    case = CACHES[name]
    holder = Holder(case.make())
    cache, kind, names = holder.cache, type(holder.cache), dir(holder.cache)
    attributes = set(vars(cache)), set(cache._buffers)
    dense = B * H * T * D * 4
    assert storages(holder).count(dense) == 2
    kvarn_ops.patch(holder, CONFIG)
    assert holder.cache is cache
    assert isinstance(cache, kind)
    assert max(storages(holder)) < dense / 2
    k, v = tokens(100)
    drive(case, cache, k, v, [100])
    assert kvarn_ops.unpatch(holder) is holder
    assert type(cache) is kind
    assert (set(vars(cache)), set(cache._buffers), dir(cache)) == (*attributes, names)
    assert storages(holder).count(dense) == 2
    again, fresh = (drive(case, each, k, v, [60, 40]) for each in (cache, case.make()))
    for got, wanted in zip(again, fresh, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_positions_start_over_go_back_and_leave_no_gap() -> None:
    case, cache = CACHES["renamed"], patched(CACHES["renamed"].make(), tail_tokens=16).cache
    k, v = tokens(150)
    first = drive(case, cache, k, v, [150])[-1]
    case.store(cache, *(x[:, :, :5] + 1 for x in (k, v)), 140)
    again = case.store(cache, k[:, :, 140:], v[:, :, 140:], 140)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(CacheCropError):
        case.store(cache, k[:, :, :1], v[:, :, :1], 90)
    with pytest.raises(CacheError, match="gap"):
        case.store(cache, k[:, :, :1], v[:, :, :1], 160)
    start = case.store(cache, k[:, :, :20], v[:, :, :20], 0)
    assert torch.equal(pair(case, start)[0][:, :, :20], k[:, :, :20])
    assert not pair(case, start)[0][:, :, 20:].any()


def test_what_a_cache_counts_and_clears_goes_on_working() -> None:
    case, cache = CACHES["counts inside"], patched(CountsInside()).cache
    k, v = tokens(70)
    first = drive(case, cache, k, v, [69, 1])[-1]
    assert cache.filled == 70
    cache.clear()
    assert cache.filled == 0
    again = drive(case, cache, k, v, [69, 1])[-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(CacheError, match=r"drop_row\(\).*unpatch"):
        cache.drop_row(0)


def test_buffers_read_from_outside_are_dense_copies_and_may_not_be_assigned() -> None:
    case, cache = CACHES["tokens first"], patched(CACHES["tokens first"].make()).cache
    k, v = tokens(60)
    keys, _ = drive(case, cache, k, v, [60])[-1]
    assert cache.cache_k.shape == (B, T, H, D)
    assert torch.equal(cache.cache_k[:, :60], keys)
    cache = patched(IndexAssignment()).cache
    cache.k_cache = torch.zeros(B, H, T, D)
    with pytest.raises(CacheError, match=r"assigned.*unpatch"):
        cache.update(torch.arange(4), k[:, :, :4], v[:, :, :4])


def test_another_dtype_is_converted_only_where_the_module_did() -> None:
    k, v = tokens(100)
    keys, values = patched(Converts()).cache.update(k, v, torch.arange(100))
    assert keys.dtype == values.dtype == torch.float32
    wanted, _ = kvarn_ops.fake_quantize(k.bfloat16(), v.bfloat16(), CONFIG)
    torch.testing.assert_close(keys[:, :, :100], wanted, rtol=2**-7, atol=2**-7)
    cache = patched(IndexAssignment(torch.bfloat16)).cache
    with pytest.raises(InputError, match=r"float32.*bfloat16"):
        cache.update(torch.arange(100), k, v)


def test_arguments_whose_effect_is_unknown_are_refused() -> None:
    cache = patched(CACHES["may count"].make()).cache
    k, v = tokens(4)
    cache.update(k, v, None, 1.0)
    for call, error in (
        (lambda: cache.update(k, v, scale=2.0), InputError),
        (lambda: cache.update(k, v, at=torch.arange(4).expand(B, 4)), InputError),
        (lambda: cache.update(k, other=v), TypeError),
        (lambda: cache.update(k), TypeError),
        (lambda: cache.update(k, v, None, 1.0, None), TypeError),
        (lambda: cache.update(k, v, k=k), TypeError),
    ):
        with pytest.raises(error):
            call()
    assert cache.end == 4


@pytest.mark.parametrize("name", ["index assignment", "counts inside", "tokens first"])
def test_copies_and_pickles_stand_on_their_own(name: str) -> None:
    case, holder = CACHES[name], patched(CACHES[name].make())
    k, v = tokens(100)
    drive(case, holder.cache, k, v, [80])
    wanted = None
    for other in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder)), holder):
        result = case.store(other.cache, k[:, :, 80:], v[:, :, 80:], 80)
        wanted = result if wanted is None else wanted
        assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))
        kvarn_ops.unpatch(other)
        assert type(other.cache) is case.make


def test_a_state_dict_keeps_its_keys_and_shapes() -> None:
    plain, holder = Holder(IndexAssignment(persistent=True)), None
    before = plain.state_dict()
    holder = kvarn_ops.patch(plain, CONFIG)
    k, v = tokens(60)
    keys, _ = holder.cache.update(torch.arange(60), k, v)
    after = holder.state_dict()
    assert {name: x.shape for name, x in after.items()} == {n: x.shape for n, x in before.items()}
    assert torch.equal(after["inner.cache.k_cache"], keys)
    holder.load_state_dict(before)  # contents of a cache are no weights
    assert torch.equal(holder.cache.k_cache, keys)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_casts_after_the_patch(dtype: torch.dtype) -> None:
    k, v = (x.to(dtype) for x in tokens(100))
    first = patched(IndexAssignment(dtype)).cache.update(torch.arange(100), k, v)
    second = patched(IndexAssignment()).to(dtype).cache.update(torch.arange(100), k, v)
    for each in (first, second):
        assert each[0].dtype == dtype
        torch.testing.assert_close(each, first)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("Shifts", "just the new keys and values"),
        ("Rounds", "just the new keys and values"),
        ("KeysTwice", "just the new keys and values"),
        ("ReturnsTheNew", "does not return a pair of the buffers"),
        ("Adds", "just the new keys and values"),
        ("LooksAtWidth", "needs the width of the heads"),
        ("InForward", "Tried: forward"),
    ],
)
def test_what_is_nearly_a_cache_is_refused_with_what_was_tried(kind: str, match: str) -> None:
    model = Holder(getattr(own_caches, kind)())
    before = storages(model)
    with pytest.raises(UnsupportedModelError, match=match) as error:
        kvarn_ops.patch(model, CONFIG)
    assert "inner.cache" in str(error.value)
    assert storages(model) == before
    assert kvarn_ops.patch(model, CONFIG, strict=False) is model
    assert kvarn_ops.explain(model).config is None


def test_a_window_stays_dense_by_design() -> None:
    model = nn.ModuleList([own_caches.Window(), IndexAssignment()])
    kvarn_ops.patch(model, CONFIG)
    window, whole = kvarn_ops.explain(model).layers
    assert (window.packed, whole.packed) == (False, True)
    assert window.reason.startswith("dense by design")
    assert type(model[0]) is own_caches.Window


def test_a_cache_that_holds_tokens_without_positions_must_be_emptied_first() -> None:
    cache = CountsInside()
    cache(*tokens(5))
    with pytest.raises(UnsupportedModelError, match="continues at token 5: empty the cache"):
        kvarn_ops.patch(Holder(cache), CONFIG)
    cache.clear()
    kvarn_ops.patch(Holder(cache), CONFIG)


def test_tables_are_no_caches() -> None:
    with pytest.raises(UnsupportedModelError, match="no module that keeps keys and values"):
        kvarn_ops.patch(nn.Sequential(AngleTables(), nn.Conv2d(8, 8, 8)))
