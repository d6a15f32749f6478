"""Forks: continuations of one prompt that store its finished tiles once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvarn_ops
from kvarn_ops.errors import CacheCropError, CacheError, InputError
from tiny_models import random_ids, run, small_cache, storages_of, tiny_model

PRESET = "k8v8_g32"  # a rounding tie that falls the other way costs little


@pytest.fixture(scope="module")
def model() -> Any:
    return kvarn_ops.patch(tiny_model("llama"), PRESET, num_sink_tokens=8)


def filled(model: Any, ids: Tensor, **fields: Any) -> Any:
    cache = small_cache(model, 400, PRESET, **fields)
    run(model, ids, cache)
    return cache


def steps(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Logits of feeding `ids` `[rows, n]` a token at a time."""
    return torch.cat([run(model, ids[:, i : i + 1], cache) for i in range(ids.shape[1])], dim=1)


@pytest.mark.parametrize("tail_tokens", [0, 40])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_fork_goes_on_as_the_cache_would(model: Any, rows: int, tail_tokens: int) -> None:
    prompt = random_ids(rows, 150)
    fork = filled(model, prompt, tail_tokens=tail_tokens).fork(3)
    alone = filled(model, prompt.repeat_interleave(3, dim=0), tail_tokens=tail_tokens)
    more = random_ids(rows * 3, 80, seed=1)  # several tiles are finished
    torch.testing.assert_close(
        steps(model, fork, more), steps(model, alone, more), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_dense_layers_are_forked_too(family: str) -> None:
    model = kvarn_ops.patch(tiny_model(family), PRESET, num_sink_tokens=8)
    prompt, more = random_ids(1, 100), random_ids(2, 40, seed=1)
    cache = filled(model, prompt)
    fork = cache.fork(2)
    alone = filled(model, prompt.repeat_interleave(2, dim=0))
    wanted = steps(model, alone, more)
    torch.testing.assert_close(steps(model, fork, more), wanted, rtol=0, atol=1e-3)
    # The fork left the windows of the first cache alone.
    again, wanted = steps(model, cache, more[:1]), steps(model, filled(model, prompt), more[:1])
    torch.testing.assert_close(again, wanted, rtol=0, atol=1e-3)


def test_forks_and_their_source_do_not_disturb_each_other(model: Any) -> None:
    prompt = random_ids(1, 150)
    turns = [random_ids(1, 70, seed=seed) for seed in (1, 2, 3)]
    alone = [steps(model, filled(model, prompt), turn) for turn in turns]
    source = filled(model, prompt)
    caches = [source, source.fork(), source.fork()]
    found: list[list[Tensor]] = [[], [], []]
    for position in range(70):
        for cache, turn, logits in zip(caches, turns, found, strict=True):
            logits.append(run(model, turn[:, position : position + 1], cache))
    for logits, wanted in zip(found, alone, strict=True):
        torch.testing.assert_close(torch.cat(logits, 1), wanted, rtol=0, atol=1e-3)


def test_the_prompt_is_stored_once(model: Any) -> None:
    source = filled(model, random_ids(1, 380))  # 11 tiles of 32
    forks = [source.fork() for _ in range(4)]
    one = source.memory()
    together = source.memory(*forks)
    reachable = storages_of([source, *forks])
    assert together["total"] == sum(reachable.values())
    # Each fork adds its sinks and tail, and at least two tiles, and none of the finished ones.
    config, layers = source.kvarn_config, len(source.layers)
    own = layers * 2 * config.bytes_per_token(32, 2) * config.group_size
    assert together["codes"] + together["scales"] == one["codes"] + one["scales"] + 4 * own
    assert together["sinks"] == 5 * one["sinks"]
    batch = source.fork(4).memory(source)
    assert batch["codes"] + batch["scales"] == one["codes"] + one["scales"] + 4 * own


def test_a_fork_outlives_its_source(model: Any) -> None:
    prompt, more = random_ids(1, 150), random_ids(1, 40, seed=1)
    wanted = steps(model, filled(model, prompt), more)
    source = filled(model, prompt)
    fork = source.fork()
    source.reset()
    run(model, random_ids(1, 200, seed=9), source)  # would overwrite the shared tiles
    del source
    torch.testing.assert_close(steps(model, fork, more), wanted, rtol=0, atol=1e-3)


def test_reset_gives_a_fork_room_of_its_own(model: Any) -> None:
    prompt = random_ids(1, 390, seed=4)
    fork = filled(model, random_ids(1, 150)).fork()
    fork.reset()
    wanted = filled(model, prompt)
    torch.testing.assert_close(
        run(model, prompt, fork), run(model, prompt, small_cache(model, 400, PRESET))
    )
    more = random_ids(1, 5, seed=5)
    torch.testing.assert_close(steps(model, fork, more), steps(model, wanted, more))


def test_crop_works_to_tail_tokens_and_never_into_shared_tokens(model: Any) -> None:
    prompt, more = random_ids(1, 170), random_ids(1, 40, seed=1)  # 170 = 8 + 5 * 32 + 2
    source = filled(model, prompt, tail_tokens=40)
    fork = source.fork()
    for cache in (source, fork):
        cache.crop(-40)
    wanted = filled(model, prompt[:, :130], tail_tokens=40)
    expected = steps(model, wanted, more)
    torch.testing.assert_close(steps(model, fork, more), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(steps(model, source, more), expected, rtol=0, atol=1e-3)
    for cache in (source, fork):
        cache.crop(-40)
        with pytest.raises(CacheCropError, match="fork"):
            cache.crop(-40)


def test_rows_of_a_fork_can_be_selected_and_reordered(model: Any) -> None:
    prompt = random_ids(2, 150)
    more = random_ids(6, 30, seed=1)
    fork, alone = filled(model, prompt).fork(3), filled(model, prompt.repeat_interleave(3, dim=0))
    for rows in ([1, 0, 2, 5, 3, 4], [0, 0, 5, 4], [2, 3], [1, 1, 1]):
        index = torch.tensor(rows)
        if len(rows) == 6:
            fork.reorder_cache(index)
            alone.reorder_cache(index)
        else:
            fork.batch_select_indices(index)
            alone.batch_select_indices(index)
        turn = more[: len(rows)]
        found, wanted = steps(model, fork, turn), steps(model, alone, turn)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def test_reordering_the_source_leaves_forks_alone(model: Any) -> None:
    prompt, more = random_ids(2, 150), random_ids(2, 30, seed=1)
    wanted = steps(model, filled(model, prompt), more)
    source = filled(model, prompt)
    fork = source.fork()
    source.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(steps(model, fork, more), wanted, rtol=0, atol=1e-3)
    swapped = steps(model, source, more.flip(0)).flip(0)
    torch.testing.assert_close(swapped, wanted, rtol=0, atol=1e-3)


def test_a_fork_of_a_fork(model: Any) -> None:
    prompt, turn, more = random_ids(1, 150), random_ids(2, 70, seed=1), random_ids(4, 40, seed=2)
    fork = filled(model, prompt).fork(2)
    steps(model, fork, turn)
    alone = filled(model, prompt.repeat(2, 1))
    steps(model, alone, turn)
    alone.batch_repeat_interleave(2)
    found = steps(model, fork.fork(2), more)
    torch.testing.assert_close(found, steps(model, alone, more), rtol=0, atol=1e-3)


def test_generate_continues_a_fork(model: Any) -> None:
    prompt = random_ids(1, 150)
    options = {"max_new_tokens": 40, "do_sample": False}
    wanted = model.generate(prompt, **options)
    fork = filled(model, prompt[:, :-1]).fork(2)
    found = model.generate(prompt.repeat(2, 1), past_key_values=fork, **options)
    # The same but for one forward: the last prompt token is fed by itself.
    assert torch.equal(found[0], found[1])
    assert (found[0] == wanted[0]).float().mean() > 0.9


def test_beams_and_samples_start_from_a_fork(model: Any) -> None:
    prompt, options = random_ids(1, 150), {"max_new_tokens": 40, "num_return_sequences": 3}
    source = filled(model, prompt[:, :-1])

    def generate(cache: Any, **fields: Any) -> Tensor:
        torch.manual_seed(0)
        return model.generate(prompt, past_key_values=cache, **options, **fields)

    for fields in ({"num_beams": 3, "do_sample": False}, {"do_sample": True}):
        alone = filled(model, prompt[:, :-1].repeat(3, 1))
        found, wanted = generate(source.fork(3), **fields), generate(alone, **fields)
        assert torch.equal(found, wanted), fields


def test_a_fork_may_have_another_capacity(model: Any) -> None:
    prompt, more = random_ids(1, 150), random_ids(1, 30, seed=1)
    source = small_cache(model, 150, PRESET)
    run(model, prompt, source)
    with pytest.raises(CacheError, match="room"):
        run(model, more, source.fork())
    fork = source.fork(max_cache_len=180)
    wanted = steps(model, filled(model, prompt), more)
    torch.testing.assert_close(steps(model, fork, more), wanted, rtol=0, atol=1e-3)
    with pytest.raises(CacheError, match="150"):
        source.fork(max_cache_len=100)


def test_padded_rows_can_be_forked(model: Any) -> None:
    ids = random_ids(2, 150)
    mask = torch.ones_like(ids)
    mask[0, :60] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    caches = []
    for copies in (1, 2):
        cache = small_cache(model, 400, PRESET)
        rows = (tensor.repeat_interleave(copies, dim=0) for tensor in (ids, mask, positions))
        row_ids, row_mask, row_positions = rows
        run(model, row_ids, cache, attention_mask=row_mask, position_ids=row_positions)
        caches.append(cache)
    fork, alone = caches[0].fork(2), caches[1]
    more, offset = random_ids(4, 40, seed=1), torch.tensor([90, 90, 150, 150])[:, None]
    for i in range(40):
        token = more[:, i : i + 1]
        found = run(model, token, fork, position_ids=offset + i)
        wanted = run(model, token, alone, position_ids=offset + i)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def test_short_prompts_share_nothing_and_work(model: Any) -> None:
    for length in (0, 5, 30):
        cache = small_cache(model, 200, PRESET)
        if length:
            run(model, random_ids(1, length), cache)
        fork = cache.fork(2)
        more = random_ids(2, 60, seed=1)
        alone = small_cache(model, 200, PRESET)
        if length:
            run(model, random_ids(1, length).repeat(2, 1), alone)
        torch.testing.assert_close(
            steps(model, fork, more), steps(model, alone, more), rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("copies", [0, -1, 1.5, True])
def test_a_number_of_copies_that_is_none_is_refused(model: Any, copies: Any) -> None:
    with pytest.raises(InputError, match="copies"):
        small_cache(model).fork(copies)
