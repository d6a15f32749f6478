"""`KVarNCache` as an object: reuse, reset, crop, rows, other caches."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import kvarn_ops
from kvarn_ops.errors import CacheCropError, CacheError
from kvarn_ops.hf import adapter
from tiny_models import (
    assert_same_state,
    cache_state,
    patched,
    random_ids,
    run,
    small_cache,
    teacher_forced,
    tiny_model,
)

PRESET = "k8v8_g32"


@pytest.fixture(scope="module")
def model() -> Any:
    return patched()


def close(found: Tensor, wanted: Tensor, limit: float = 1e-3) -> None:
    error = (found - wanted).abs().max()
    assert error < limit, f"logits differ by {error}"


# Reuse


def test_a_second_turn_equals_a_fresh_cache(model: Any) -> None:
    options = {"max_new_tokens": 30, "do_sample": False}
    cache = small_cache(model, 300)
    first = model.generate(random_ids(1, 50), past_key_values=cache, **options)
    turn = torch.cat([first, random_ids(1, 40, seed=1)], dim=1)
    again = model.generate(turn, past_key_values=cache, **options)
    assert int(cache.get_seq_length()) == again.shape[1] - 1

    # Same tokens in the same forwards: the last token of a turn is fed with the next turn.
    fresh = small_cache(model, 300)
    run(model, first[:, :50], fresh)
    for position in range(50, first.shape[1] - 1):
        run(model, first[:, position : position + 1], fresh)
    logits = run(model, turn[:, first.shape[1] - 1 :], fresh)[:, -1]
    for position in range(turn.shape[1], again.shape[1]):
        assert int(logits.argmax()) == int(again[0, position]), f"token {position} differs"
        logits = run(model, again[:, position : position + 1], fresh)[:, -1]


def test_reset_equals_fresh(model: Any) -> None:
    cache = small_cache(model)
    ids = random_ids(2, 90)
    wanted = teacher_forced(model, ids, cache, 50)
    state, address = cache_state(cache), cache.layers[0].tiles.k_codes.data_ptr()
    run(model, random_ids(2, 100, seed=1), cache)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert torch.equal(teacher_forced(model, ids, cache, 50), wanted)
    assert_same_state(cache_state(cache), state)
    assert cache.layers[0].tiles.k_codes.data_ptr() == address, "reset moved the memory"


@pytest.mark.parametrize("chunk", [1, 33, 64])
def test_chunked_prefill_is_close_to_one_shot(model: Any, chunk: int) -> None:
    ids = random_ids(2, 150)
    whole = run(model, ids, small_cache(model))
    cache = small_cache(model)
    parts = [run(model, part, cache) for part in ids.split(chunk, dim=1)]
    found = torch.cat(parts, dim=1)
    close(found[:, :40], whole[:, :40], 1e-4)  # nothing is packed yet
    error = (found - whole).norm() / whole.norm()  # later chunks see tiles, one shot does not
    assert 0 < error < 0.01


def test_generate_in_chunks_equals_chunks_by_hand(model: Any) -> None:
    ids = random_ids(2, 100)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(ids, prefill_chunk_size=33, output_logits=True, **options)
    assert isinstance(out.past_key_values, kvarn_ops.KVarNCache)
    cache = small_cache(model)
    for part in ids.split(33, dim=1):
        logits = run(model, part, cache)
    close(out.logits[0], logits[:, -1], 1e-5)


# Independence


def test_two_caches_and_two_models_do_not_touch_each_other(model: Any) -> None:
    other = patched("llama", "k4v4_g32", seed=1)
    ids = [random_ids(2, 100, seed=seed) for seed in range(3)]
    users = [(model, PRESET), (model, PRESET), (other, "k4v4_g32")]
    alone = [
        teacher_forced(user, ids[i], small_cache(user, preset=preset), 30)
        for i, (user, preset) in enumerate(users)
    ]
    caches = [small_cache(user, preset=preset) for user, preset in users]
    found: list[list[Tensor]] = [[], [], []]
    for start, stop in [(0, 30)] + [(p, p + 1) for p in range(30, 100)]:
        for i, (user, _) in enumerate(users):  # interleaved, one step each
            found[i].append(run(user, ids[i][:, start:stop], caches[i]))
    for i, steps in enumerate(found):
        assert torch.equal(torch.cat(steps, dim=1), alone[i]), f"cache {i} saw another one"


def test_a_cache_may_differ_from_the_patch(model: Any) -> None:
    """The cache decides what is stored: config and length are its own."""
    cache = small_cache(model, preset="k2v2_g64", num_sink_tokens=0)
    run(model, random_ids(1, 130), cache)
    assert cache.kvarn_config.preset == "k2v2_g64"
    assert [int(layer.tiles.seq_lens[0]) for layer in cache.layers] == [130, 130]


def test_a_cache_made_from_an_equal_config_object_works(model: Any) -> None:
    config = type(model.config)(**model.config.to_dict())
    cache = kvarn_ops.KVarNCache(config, 128, PRESET, num_sink_tokens=8)
    ids = random_ids(1, 60)
    assert torch.equal(run(model, ids, cache), run(model, ids, small_cache(model)))


# Other caches on a patched model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3_text"])
def test_other_caches_compute_what_they_did_before(family: str) -> None:
    model, dense = patched(family), tiny_model(family)
    ids, mask = random_ids(2, 60), torch.ones(2, 60, dtype=torch.int64)
    mask[0, :20] = 0

    def answers(of: Any) -> list[Tensor]:
        found = [run(of, ids, None), run(of, ids, None, attention_mask=mask)]
        static = StaticCache(config=of.config, max_cache_len=80)
        for cache in (DynamicCache(config=of.config), static):
            found.append(run(of, ids[:, :50], cache, attention_mask=mask[:, :50]))
            found += [run(of, ids[:, p : p + 1], cache) for p in range(50, 60)]
        with torch.no_grad():
            found.append(of(ids).logits)
        for choice in ("static", "dynamic"):
            options = {"cache_implementation": choice, "disable_compile": True}
            found.append(of.generate(ids, max_new_tokens=5, do_sample=False, **options))
        found.append(of.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))
        return found

    for index, (found, wanted) in enumerate(zip(answers(model), answers(dense), strict=True)):
        assert torch.equal(found, wanted), f"answer {index} changed by the patch"


def test_another_cache_is_mentioned_once(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    adapter._mention_other_cache.cache_clear()
    ids = random_ids(1, 10)
    with caplog.at_level(logging.WARNING, logger="kvarn_ops"):
        run(model, ids, None)
        run(model, ids, small_cache(model))
        model.generate(ids, max_new_tokens=3)
        assert not caplog.records, "warned although no other cache was used"
        for _ in range(2):
            run(model, ids, DynamicCache(config=model.config))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "DynamicCache" in record.getMessage()


@pytest.mark.parametrize("name", ["hybrid", "sliding_window"])
def test_the_cache_named_by_old_checkpoints_is_replaced(name: str) -> None:
    """Gemma checkpoints carry `cache_implementation: hybrid` in generation_config.json."""
    model = patched("gemma3_text")
    model.generation_config.cache_implementation = name
    out = model.generate(random_ids(1, 20), max_new_tokens=3, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, kvarn_ops.KVarNCache)


# Crop


@pytest.mark.parametrize(("tail", "count"), [(20, 1), (20, 20), (32, 32), (70, 70)])
@pytest.mark.parametrize("length", [30, 105, 130])
def test_crop_is_as_if_the_tokens_had_never_come(
    model: Any, length: int, tail: int, count: int
) -> None:
    count = min(count, length - 1)
    ids, later = random_ids(2, length), random_ids(2, 50, seed=9)
    cache = small_cache(model, tail_tokens=tail)
    wanted = small_cache(model, tail_tokens=tail)
    run(model, ids[:, : length - count], cache)
    run(model, ids[:, : length - count], wanted)
    for position in range(length - count, length):
        run(model, ids[:, position : position + 1], cache)
    cache.crop(-count)
    assert int(cache.get_seq_length()) == length - count
    for layer, other in zip(cache.layers, wanted.layers, strict=True):
        assert torch.equal(layer.tiles.seq_lens, other.tiles.seq_lens)
        tiles = layer.config.num_tiles(length - count)
        for one, two in zip(layer.tiles[:6], other.tiles[:6], strict=True):
            assert torch.equal(one[:, :, :tiles], two[:, :, :tiles]), "a kept tile changed"
    found = [run(model, later[:, :7], cache)]
    found += [run(model, token, cache) for token in later[:, 7:].split(1, dim=1)]
    again = [run(model, later[:, :7], wanted)]
    again += [run(model, token, wanted) for token in later[:, 7:].split(1, dim=1)]
    for step, (one, two) in enumerate(zip(found, again, strict=True)):
        assert torch.equal(one, two), f"step {step} after the crop remembers what was removed"


def test_a_deeper_crop_is_refused_and_changes_nothing(model: Any) -> None:
    cache = small_cache(model, tail_tokens=20)
    run(model, random_ids(2, 100), cache)
    state = cache_state(cache)
    for count in (21, 100, 101):
        with pytest.raises(CacheCropError, match="tail_tokens"):
            cache.crop(-count)
    with pytest.raises(CacheError, match="negative"):
        cache.crop(5)
    cache.crop(0)
    assert_same_state(cache_state(cache), state)
    short = small_cache(model, tail_tokens=20)
    run(model, random_ids(2, 10), short)
    with pytest.raises(CacheCropError, match="holds 10"):
        short.crop(-11)


def test_repeated_crops_stop_before_they_reach_packed_tokens(model: Any) -> None:
    ids, token = random_ids(1, 128), torch.tensor([[7]])
    cache, wanted = small_cache(model, tail_tokens=20), small_cache(model, tail_tokens=20)
    run(model, ids, cache)
    for _ in range(3):
        cache.crop(-20)
    with pytest.raises(CacheCropError, match="earlier crops"):
        cache.crop(-20)
    assert int(cache.get_seq_length()) == 68
    run(model, ids[:, :68], wanted)
    close(run(model, token, cache), run(model, token, wanted), 1e-4)


# Rows


def test_rows_can_be_reordered_repeated_and_selected(model: Any) -> None:
    ids, step = random_ids(3, 70), random_ids(3, 1, seed=4)
    for name, argument, rows in (
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
        ("batch_select_indices", torch.tensor([2, 1]), [2, 1]),
        ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
    ):
        cache, wanted = small_cache(model), small_cache(model)
        run(model, ids, cache)
        run(model, ids[rows], wanted)
        getattr(cache, name)(argument)
        close(run(model, step[rows], cache), run(model, step[rows], wanted), 1e-3)
        assert {layer.batch_size for layer in cache.layers} == {len(rows)}


def test_beam_search_keeps_rows_and_caches_together(model: Any) -> None:
    ids = random_ids(2, 50)
    options = {"num_beams": 3, "max_new_tokens": 20, "do_sample": False}
    out = model.generate(ids, **options, return_dict_in_generate=True, output_scores=True)
    assert isinstance(out.past_key_values, kvarn_ops.KVarNCache)
    # The score of the best beam is the mean log-probability of its text, computed from scratch.
    for row, text in enumerate(out.sequences):
        cache = small_cache(model)
        logits = teacher_forced(model, text[None, :-1], cache, 50)[0, 49:]
        score = logits.log_softmax(-1).gather(1, text[50:, None]).mean()
        assert abs(float(score - out.sequences_scores[row])) < 0.01


# Assisted decoding


@pytest.mark.transformers("5.17", "caches there cannot take back a number of tokens")
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_assisted_text_is_the_greedy_text(family: str) -> None:
    model = patched(family)
    ids = random_ids(1, 60).repeat(1, 2)  # repetition, so that prompt lookup finds drafts
    options = {"max_new_tokens": 60, "do_sample": False, "return_dict_in_generate": True}
    wanted = model.generate(ids, **options).sequences
    looked_up = model.generate(ids, prompt_lookup_num_tokens=5, **options)
    assert isinstance(looked_up.past_key_values, kvarn_ops.KVarNCache)
    assert torch.equal(looked_up.sequences, wanted)
    drafted = model.generate(ids, assistant_model=tiny_model(family, seed=0), **options)
    assert torch.equal(drafted.sequences, wanted)
