"""Saved caches: they come back the same, and nothing wrong, damaged or half written is read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import kvarn_ops
from kvarn_ops import KVarNCache
from kvarn_ops.errors import CacheError
from tiny_models import (
    assert_same_state,
    cache_state,
    random_ids,
    run,
    small_cache,
    teacher_forced,
    tiny_model,
)

PRESET = "k4v2_g32"


@pytest.fixture(scope="module")
def model() -> Any:
    return kvarn_ops.patch(tiny_model(), PRESET, num_sink_tokens=8)


def filled(model: Any, tokens: int = 150, length: int = 300, **fields: Any) -> Any:
    cache = small_cache(model, length, PRESET, **fields)
    run(model, random_ids(2, tokens), cache)
    return cache


def next_logits(model: Any, cache: Any, count: int = 40) -> Tensor:
    return teacher_forced(model, random_ids(2, count, seed=7), cache, 1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma2"])
@pytest.mark.parametrize("tokens", [3, 12, 150])
def test_a_loaded_cache_is_the_saved_one(family: str, tokens: int, tmp_path: Path) -> None:
    model = kvarn_ops.patch(tiny_model(family), PRESET, num_sink_tokens=8)
    cache = filled(model, tokens, tail_tokens=20)
    file = tmp_path / "prompt.safetensors"
    cache.save(file)
    loaded = KVarNCache.load(file, model.config)
    assert_same_state(cache_state(loaded), cache_state(cache))
    assert loaded.memory() == cache.memory()
    assert torch.equal(next_logits(model, loaded), next_logits(model, cache))


def test_a_fork_is_saved_whole(model: Any, tmp_path: Path) -> None:
    cache = filled(model)
    cache.fork(2).save(tmp_path / "fork")
    loaded = KVarNCache.load(tmp_path / "fork", model.config)
    cache.batch_repeat_interleave(2)
    assert_same_state(cache_state(loaded), cache_state(cache))


def test_a_cache_without_packed_layers_is_forked_and_saved_too(tmp_path: Path) -> None:
    model = kvarn_ops.patch(tiny_model("mistral_sliding"), PRESET, num_sink_tokens=8)
    cache = filled(model)
    wanted = next_logits(model, cache.fork())
    cache.save(tmp_path / "cache")
    assert torch.equal(
        next_logits(model, KVarNCache.load(tmp_path / "cache", model.config)), wanted
    )


def test_capacity_may_change_and_only_live_tokens_are_stored(model: Any, tmp_path: Path) -> None:
    small, large = filled(model, length=151), filled(model, length=4000)
    small.save(tmp_path / "small")
    large.save(tmp_path / "large")
    assert abs((tmp_path / "small").stat().st_size - (tmp_path / "large").stat().st_size) < 100
    loaded = KVarNCache.load(tmp_path / "small", model.config, max_cache_len=4000)
    assert_same_state(cache_state(loaded), cache_state(large))
    with pytest.raises(CacheError, match="150 tokens"):
        KVarNCache.load(tmp_path / "large", model.config, max_cache_len=149)


def test_crop_after_load_knows_earlier_crops(model: Any, tmp_path: Path) -> None:
    cache = filled(model, tail_tokens=20)
    cache.crop(-15)
    cache.save(tmp_path / "cropped")
    loaded = KVarNCache.load(tmp_path / "cropped", model.config)
    for one, other in zip(loaded.layers, cache.layers, strict=True):
        assert torch.equal(one._high_water, other._high_water)


def test_another_config_or_model_is_refused(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "cache"
    filled(model).save(file)
    same = kvarn_ops.KVarNConfig.from_preset(PRESET, num_sink_tokens=8)
    KVarNCache.load(file, model.config, config=same)
    with pytest.raises(CacheError, match=r"k4v2_g32.*not of k2v2_g32"):
        KVarNCache.load(file, model.config, config="k2v2_g32")
    with pytest.raises(CacheError, match="another model: num_hidden_layers is 2 there and 3 here"):
        KVarNCache.load(file, tiny_model(num_hidden_layers=3).config)
    with pytest.raises(CacheError, match="another model"):
        KVarNCache.load(file, tiny_model("qwen3").config)


def damaged(file: Path, kind: str) -> None:
    content = file.read_bytes()
    if kind == "half":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "one byte short":
        file.write_bytes(content[:-1])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_text("not a cache")
    elif kind == "other safetensors":
        save_file({"weight": torch.zeros(3)}, file)
    else:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        header, tensors = json.loads(metadata["kvarn_cache"]), load_file(file)
        if kind == "newer version":
            header["version"] = 99
        elif kind == "lengths beyond the end":
            tensors["layers.0.seq_lens"] += 1000
        elif kind == "another width":
            tensors["layers.1.k_codes"] = tensors["layers.1.k_codes"][..., :-2].contiguous()
        elif kind == "a tensor is missing":
            del tensors["layers.1.v_codes"]
        elif kind == "header without layers":
            del header["layers"]
        save_file(tensors, file, metadata={"kvarn_cache": json.dumps(header)})


@pytest.mark.parametrize(
    "kind",
    [
        *("half", "one byte short", "empty", "text", "other safetensors", "newer version"),
        *("lengths beyond the end", "another width", "a tensor is missing"),
        "header without layers",
    ],
)
def test_a_damaged_file_is_refused(model: Any, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "cache"
    filled(model).save(file)
    damaged(file, kind)
    with pytest.raises(CacheError, match="cache "):
        KVarNCache.load(file, model.config)


def test_a_save_that_fails_or_is_killed_leaves_the_old_file(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "cache"
    filled(model).save(file)
    before = file.read_bytes()
    script = """
        import os, signal, sys, torch
        import kvarn_ops, safetensors.torch
        from kvarn_ops.hf import cache_file
        from tiny_models import random_ids, run, small_cache, tiny_model

        whole = cache_file.save_file
        def half(tensors, name, metadata):
            whole(tensors, name, metadata=metadata)
            os.truncate(name, os.path.getsize(name) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        cache_file.save_file = half
        model = kvarn_ops.patch(tiny_model(), "k2v2_g32", num_sink_tokens=8)
        cache = small_cache(model, 300, "k2v2_g32")
        run(model, random_ids(1, 60), cache)
        cache.save(sys.argv[1])
    """
    helpers = Path(__file__).parents[1] / "helpers"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(file)],
        env=os.environ | {"PYTHONPATH": f"{helpers}{os.pathsep}{helpers.parents[1]}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert file.read_bytes() == before
    KVarNCache.load(file, model.config)


def test_a_failing_save_leaves_nothing_behind(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvarn_ops.hf import cache_file

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    cache = filled(model)
    monkeypatch.setattr(cache_file, "save_file", full)
    with pytest.raises(CacheError, match="No space left"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_wrong_paths_are_one_sentence(model: Any, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="does not exist"):
        KVarNCache.load(tmp_path / "nothing", model.config)
    with pytest.raises(CacheError, match="cannot write"):
        filled(model).save(tmp_path / "no" / "folder")
    with pytest.raises(CacheError, match="empty"):
        small_cache(model, 100, PRESET).save(tmp_path / "cache")
