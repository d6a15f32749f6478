"""`step_shared_`: a cache that reads tiles of another is the cache that holds them itself."""

from __future__ import annotations

import pytest
import torch

import kvarn_ops  # noqa: F401  (registers the ops)
from kvarn_ops import KVarNConfig
from kvarn_ops.errors import InputError
from kvarn_ops.layout import PackedTiles, TileCache
from kvarn_ops.ops.samples import filled_cache

CONFIG = KVarNConfig(group_size=32, num_sink_tokens=32, tail_tokens=16)
SHARED = 3
DIM, HEADS, Q_HEADS = 64, 2, 6


def split(cache: TileCache, sources: int) -> tuple[PackedTiles, TileCache]:
    """The first tiles of every (B / sources)-th row, and the cache without them."""
    copies = cache.k_codes.shape[0] // sources
    shared = PackedTiles(*(tensor[::copies].clone() for tensor in cache.tiles(0, SHARED)))
    total = cache.k_codes.shape[2]
    own = PackedTiles(*(tensor.clone() for tensor in cache.tiles(SHARED, total - SHARED)))
    shift = SHARED * CONFIG.group_size
    rest = {name: tensor.clone() for name, tensor in cache._asdict().items()}
    for name in ("k_tail", "v_tail"):
        rest[name] = torch.roll(rest[name], -shift, dims=2)
    rest["seq_lens"] -= shift
    return shared, TileCache(**(rest | own._asdict()))


def batch_of_copies(sources: int, copies: int) -> tuple[TileCache, torch.Tensor]:
    """`sources * copies` rows; the copies of a row have the same stored tokens."""
    cache, rotation = filled_cache(CONFIG, [230 + 20 * i for i in range(sources)], "cpu",
                                   num_kv_heads=HEADS, head_dim=DIM, max_cache_len=512)  # fmt: skip
    return TileCache(*(tensor.repeat_interleave(copies, dim=0) for tensor in cache)), rotation


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("count", [1, 5, 90])
@pytest.mark.parametrize(("sources", "copies"), [(1, 1), (1, 3), (2, 1), (2, 4)])
def test_shared_tiles_count_as_own(sources: int, copies: int, count: int, backend: str) -> None:
    cache, rotation = batch_of_copies(sources, copies)
    rows = sources * copies
    torch.manual_seed(0)
    q = torch.randn(rows, Q_HEADS, count, DIM)
    k, v = torch.randn(2, rows, HEADS, count, DIM)
    valid = torch.ones(rows, count, dtype=torch.bool) if count > 1 else None
    if valid is not None:
        valid[-1, 1] = False
    sinks = torch.randn(Q_HEADS)
    tail = (rotation, sinks, 0.2, 20.0, True, CONFIG.to_string(), backend)
    shared, own = split(cache, sources)
    frozen = [tensor.clone() for tensor in shared]
    wanted = torch.ops.kvarn.step_(q, k, v, valid, *cache, *tail)
    found = torch.ops.kvarn.step_shared_(q, k, v, valid, *shared, *own, *tail)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(shared, frozen, strict=True)), (
        "shared tiles changed"
    )
    # What was appended is what the undivided cache stores.
    for name, one, other in zip(TileCache._fields, split(cache, sources)[1], own, strict=True):
        assert torch.equal(one, other), name


def test_every_shared_tile_is_read() -> None:
    cache, rotation = batch_of_copies(1, 2)
    q = torch.randn(2, Q_HEADS, 1, DIM)
    k, v = torch.randn(2, 2, HEADS, 1, DIM)
    tail = (rotation, None, 0.2, 0.0, True, CONFIG.to_string(), "aten")
    shared, own = split(cache, 1)

    def out() -> torch.Tensor:
        own.seq_lens.fill_(134)
        return torch.ops.kvarn.step_shared_(q, k, v, None, *shared, *own, *tail)

    before = out()
    for tile in range(SHARED):
        shared.v_codes[0, :, tile] ^= 255
        assert not torch.allclose(out(), before), f"tile {tile} is not read"
        shared.v_codes[0, :, tile] ^= 255


@pytest.mark.parametrize("broken", ["rows", "width", "sinks"])
def test_tiles_that_do_not_fit_are_refused(broken: str) -> None:
    cache, rotation = batch_of_copies(1, 3)
    shared, own = split(cache, 1)
    if broken == "rows":
        shared = PackedTiles(*(tensor.repeat_interleave(2, dim=0) for tensor in shared))
    elif broken == "width":
        shared = shared._replace(k_codes=shared.k_codes[..., :-2])
    else:
        own.seq_lens[1] = 3
    q, (k, v) = torch.randn(3, Q_HEADS, 1, DIM), torch.randn(2, 3, HEADS, 1, DIM)
    before = [tensor.clone() for tensor in own]
    with pytest.raises(InputError):
        torch.ops.kvarn.step_shared_(
            q, k, v, None, *shared, *own, rotation, None, 0.2, 0.0, True, CONFIG.to_string(), "aten"
        )
    assert all(torch.equal(a, b) for a, b in zip(own, before, strict=True)), "the cache changed"
