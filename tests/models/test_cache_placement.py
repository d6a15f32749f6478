"""Where a cache lives: `to_device` and finished tiles in CPU memory.

Without a second device, moves go to the meta device and transfers are watched where they are made.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvarn_ops
from kvarn_ops.layout import PackedTiles
from tiny_models import patched, random_ids, run, small_cache, teacher_forced

PRESET = "k4v4_g32"


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", ["plain", "fork", "offloaded"])
def test_everything_moves_but_offloaded_tiles(family: str, kind: str) -> None:
    model = patched(family, PRESET)
    cache = small_cache(model, 200, PRESET, offload_tiles=kind == "offloaded")
    run(model, random_ids(1, 150), cache)
    cache = cache.fork(2) if kind == "fork" else cache
    sizes = cache.memory()
    assert cache.to_device("meta") is cache
    on_cpu, moved = cache.memory(device="cpu"), cache.memory(device="meta")
    if kind != "fork":  # it leaves the memory that it shared with its source
        assert cache.memory() == sizes
    packed = ("codes", "scales")
    for name in packed:
        wanted = sizes[name] if kind == "offloaded" else 0
        assert on_cpu[name] == wanted, name
    assert not any(on_cpu[name] for name in sizes if name not in (*packed, "total"))
    assert moved["sinks"] == sizes["sinks"]
    assert moved["tail"] == sizes["tail"]


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_offloaded_tiles_are_fetched_in_chunks_and_not_kept(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = patched(preset=PRESET), random_ids(2, 380)
    wanted = teacher_forced(model, ids, small_cache(model, 400, PRESET, backend=backend), 300)
    fetched: list[PackedTiles] = []

    def fetch(self: PackedTiles, device: torch.device) -> PackedTiles:
        for tensor in (tensor for tiles in fetched for tensor in tiles):
            tensor.fill_(255 if tensor.dtype == torch.uint8 else torch.nan)  # no longer in use
        fetched[:] = [PackedTiles(*(tensor.to(device, copy=True) for tensor in self))]
        return fetched[0]

    monkeypatch.setattr(PackedTiles, "on", fetch)
    cache = small_cache(model, 400, PRESET, backend=backend, offload_tiles=True)
    assert torch.equal(teacher_forced(model, ids, cache, 300), wanted)
    assert fetched, "nothing was read through the transfer"
    if backend == "aten":
        assert fetched[0].k_codes.shape[2] <= 16, "more than a chunk of tiles is on the device"


def test_an_offloaded_cache_is_not_compiled_by_generate() -> None:
    model = patched(preset=PRESET)
    cache = small_cache(model, 200, PRESET, offload_tiles=True)
    assert not cache.is_compileable
    out = model.generate(
        random_ids(1, 100), past_key_values=cache, max_new_tokens=50, do_sample=False
    )
    assert torch.equal(out, model.generate(random_ids(1, 100), max_new_tokens=50, do_sample=False))


def test_an_offloaded_cache_forks_and_loads(tmp_path: Any) -> None:
    model = patched(preset=PRESET)
    plain, moved = (small_cache(model, 300, PRESET, offload_tiles=flag) for flag in (False, True))
    for cache in (plain, moved):
        run(model, random_ids(1, 150), cache)
    moved.save(tmp_path / "cache")
    loaded = kvarn_ops.KVarNCache.load(tmp_path / "cache", model.config, offload_tiles=True)
    assert loaded.layers[0].offload_tiles
    more = random_ids(2, 40, seed=1)
    wanted = teacher_forced(model, more, plain.fork(2), 1)
    assert torch.equal(teacher_forced(model, more, moved.fork(2), 1), wanted)
    assert torch.equal(teacher_forced(model, more, loaded.fork(2), 1), wanted)


@pytest.mark.gpu
def test_on_a_gpu_finished_tiles_are_in_pinned_memory() -> None:
    model, ids = patched(preset=PRESET).to("cuda"), random_ids(2, 380).to("cuda")
    wanted = teacher_forced(model, ids, small_cache(model, 400, PRESET, device="cuda"), 300)
    cache = small_cache(model, 400, PRESET, device="cuda", offload_tiles=True)
    torch.testing.assert_close(teacher_forced(model, ids, cache, 300), wanted)
    assert cache.layers[0].tiles.k_codes.is_pinned()
    assert cache.memory(device="cuda")["codes"] == 0


@pytest.mark.gpu
def test_a_cache_goes_to_a_gpu_and_back() -> None:
    model, ids = patched(preset=PRESET), random_ids(1, 150)
    cache, other = (small_cache(model, 300, PRESET) for _ in range(2))
    for one in (cache, other):
        run(model, ids, one)
    more = random_ids(1, 40, seed=1)
    assert torch.equal(
        teacher_forced(model, more, cache.to_device("cuda").to_device("cpu"), 1),
        teacher_forced(model, more, other, 1),
    )
