"""Assisted generation: the text is the greedy one, whatever was drafted and taken back."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvarn_ops
from kvarn_ops.errors import CacheCropError, CacheError
from kvarn_ops.hf.generation import _heuristic_draft
from tiny_models import assert_same_state, cache_state, patched, random_ids, small_cache, tiny_model
from tiny_tokenizers import letter_tokenizer, word_tokenizer

pytestmark = pytest.mark.transformers("5.17", "caches there cannot take back a number of tokens")

GREEDY = {"max_new_tokens": 90, "do_sample": False, "return_dict_in_generate": True}


def assistant(length: int = 20, schedule: str = "constant") -> Any:
    """The main model with noise on its head: drafts are right for a while, then wrong."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.add_(0.02 * torch.randn_like(model.lm_head.weight))
    model.generation_config.num_assistant_tokens = length
    model.generation_config.num_assistant_tokens_schedule = schedule
    return model


def greedy(ids: Any, tail: int, family: str = "llama") -> Any:
    """Text of a model that quantizes at the same age, one token at a time."""
    return patched(family, tail_tokens=tail).generate(ids, **GREEDY).sequences


class Crops(list):
    """Sizes of the crops of every KVarN layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from kvarn_ops.hf.layer import KVarNLayer

        crop = KVarNLayer.crop

        def counted(layer: KVarNLayer, count: int) -> None:
            crop(layer, count)
            self.append(-count)

        monkeypatch.setattr(KVarNLayer, "crop", counted)


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
@pytest.mark.parametrize("length", [5, 80])
def test_text_with_an_assistant(
    length: int, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops, model, ids = Crops(monkeypatch), patched(), random_ids(1, 60)
    out = model.generate(ids, assistant_model=assistant(length, schedule), **GREEDY)
    cache = out.past_key_values
    tail = cache.kvarn_config.tail_tokens
    assert length <= tail <= length + 30, "the tail does not fit the draft"
    assert 0 < max(crops) <= tail, "nothing was taken back: the test shows nothing"
    assert cache.layers[0].config.num_tiles(int(cache.layers[0].tiles.seq_lens[0])) >= 1
    assert torch.equal(out.sequences, greedy(ids, tail))


@pytest.mark.parametrize(
    ("family", "count"), [("llama", 5), ("llama", 150), ("llama", 400), ("gemma3_text", 40)]
)
def test_text_with_prompt_lookup(family: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    crops, model = Crops(monkeypatch), patched(family)
    ids = random_ids(1, 100).repeat(1, 2)
    out = model.generate(ids, prompt_lookup_num_tokens=count, **GREEDY)
    tail = out.past_key_values.kvarn_config.tail_tokens
    assert tail == min(count, 290), "drafts are tokens of the text"
    assert max(crops) >= min(count, 90), "no long draft was refused"
    assert torch.equal(out.sequences, greedy(ids, tail, family))


def test_a_larger_tail_of_the_patch_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = patched(tail_tokens=50), random_ids(1, 60).repeat(1, 2)
    out = model.generate(ids, prompt_lookup_num_tokens=5, **GREEDY)
    assert out.past_key_values.kvarn_config.tail_tokens == 50
    assert torch.equal(out.sequences, model.generate(ids, **GREEDY).sequences)


@pytest.mark.parametrize(
    ("main_is_patched", "schedule"), [(False, "constant"), (True, "heuristic")]
)
def test_a_patched_assistant(main_is_patched: bool, schedule: str) -> None:
    """Its cache is made for the first draft and grows with the text."""
    helper = kvarn_ops.patch(assistant(5, schedule), "k8v8_g32", num_sink_tokens=8)
    model = patched(tail_tokens=64) if main_is_patched else tiny_model()
    ids = random_ids(1, 60)
    out = model.generate(ids, assistant_model=helper, **GREEDY)
    assert isinstance(out.past_key_values, kvarn_ops.KVarNCache) is main_is_patched
    assert torch.equal(out.sequences, model.generate(ids, **GREEDY).sequences)


def test_an_assistant_with_another_tokenizer() -> None:
    letters = letter_tokenizer()
    model, helper = patched(vocab_size=len(letters)), patched(seed=1)
    ids = letters("w3 w4 w11 w5 w6 w77", return_tensors="pt").input_ids
    out = model.generate(
        ids,
        assistant_model=helper,
        tokenizer=letters,
        assistant_tokenizer=word_tokenizer(),
        **GREEDY,
    )
    tail = out.past_key_values.kvarn_config.tail_tokens
    wanted = patched(vocab_size=len(letters), tail_tokens=tail).generate(ids, **GREEDY)
    assert torch.equal(out.sequences, wanted.sequences)


def test_early_exit() -> None:
    model, ids = patched(), random_ids(1, 60)
    out = model.generate(ids, assistant_early_exit=1, **GREEDY)
    tail = out.past_key_values.kvarn_config.tail_tokens
    assert [layer.is_initialized for layer in out.past_key_values.layers] == [True, True]
    assert torch.equal(out.sequences, greedy(ids, tail))
    assert model.config.num_hidden_layers == 2


# Caches of the user


def test_a_cache_of_the_user_must_keep_the_draft() -> None:
    model, ids = patched(), random_ids(1, 60).repeat(1, 2)
    short, enough = small_cache(model, 400), small_cache(model, 400, tail_tokens=20)
    with pytest.raises(CacheCropError, match="tail_tokens=20") as error:
        model.generate(ids, prompt_lookup_num_tokens=20, past_key_values=short, **GREEDY)
    assert "tail_tokens=0" in str(error.value)
    assert not short.layers[0].is_initialized, "a refused cache was used"
    out = model.generate(ids, prompt_lookup_num_tokens=20, past_key_values=enough, **GREEDY)
    assert out.past_key_values is enough
    assert torch.equal(out.sequences, greedy(ids, 20))


def test_sliding_layers_of_a_usual_cache_cannot_take_drafts_back() -> None:
    model = patched("gemma3_text")
    cache = small_cache(model, tail_tokens=8)
    options = GREEDY | {"prompt_lookup_num_tokens": 5, "past_key_values": cache}
    with pytest.raises(CacheCropError, match="let generate make"):
        model.generate(random_ids(1, 60), **options)
    assert not cache.layers[1].is_initialized, "a refused cache was used"


def test_a_second_turn_with_an_assistant_is_refused() -> None:
    """transformers would feed the history again, and the model would read it twice."""
    model, ids = patched(), random_ids(1, 60).repeat(1, 2)
    options = GREEDY | {"prompt_lookup_num_tokens": 5}
    out = model.generate(ids, **options)
    state = cache_state(out.past_key_values)
    turn = torch.cat([out.sequences, ids], dim=1)
    with pytest.raises(CacheError, match="already holds 209 tokens"):
        model.generate(turn, past_key_values=out.past_key_values, **options)
    assert_same_state(cache_state(out.past_key_values), state)


@given(st.integers(1, 40), st.integers(0, 3000), st.floats(0.5, 1), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_no_schedule_drafts_more_than_the_bound(
    start: int, room: int, luck: float, seed: int
) -> None:
    chance, draft, left, longest = random.Random(seed), start, room, 0
    while left > 0:
        longest = max(longest, min(draft, left))
        right = chance.random() < luck
        left -= draft + 1 if right else 1 + chance.randrange(draft)
        draft = draft + 2 if right else max(1, draft - 1)
    assert longest <= _heuristic_draft(start, room)
