"""Caches around `generate`: the returned one in the next turn, others that are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import kvarn_ops
from kvarn_ops.errors import UnsupportedModelError
from tiny_models import patched, random_ids, run, small_cache, tiny_model

GREEDY = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def dense() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def model() -> Any:
    return patched()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral_sliding"])
def test_the_returned_cache_serves_the_next_turn(family: str) -> None:
    """It was made for the first turn; it grows, also where a sliding layer was cut short."""
    model, first = patched(family), random_ids(2, 6)
    big = small_cache(model, 400)
    texts = []
    for cache in (None, big):
        out = model.generate(first, past_key_values=cache, **GREEDY | {"max_new_tokens": 6})
        for turn in range(2):
            prompt = torch.cat([out.sequences, random_ids(2, 40, seed=turn)], dim=1)
            out = model.generate(prompt, past_key_values=out.past_key_values, **GREEDY)
        texts.append(out.sequences)
    assert torch.equal(texts[0], texts[1])


@pytest.mark.transformers("5.17", "generate wants the whole history there")
def test_the_next_turn_may_come_without_the_history(model: Any) -> None:
    first, later = model.generate(random_ids(2, 60), **GREEDY), random_ids(2, 40, seed=1)
    again = model.generate(random_ids(2, 60), **GREEDY)
    prompt = torch.cat([first.sequences, later], dim=1)
    wanted = model.generate(prompt, past_key_values=first.past_key_values, **GREEDY).sequences
    new = prompt[:, int(again.past_key_values.get_seq_length()) :]
    mask = torch.ones(prompt.shape)
    cache = again.past_key_values
    found = model.generate(new, past_key_values=cache, attention_mask=mask, **GREEDY).sequences
    assert torch.equal(found[:, -30:], wanted[:, -30:])


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"cache_implementation": "static"}, StaticCache),
        ({"cache_implementation": "dynamic"}, DynamicCache),
        ({"past_key_values": "mine"}, DynamicCache),
        ({"use_cache": False}, type(None)),
    ],
    ids=["static", "dynamic", "given", "none"],
)
def test_another_cache_runs_dense_as_asked(
    options: dict[str, Any], kind: type, model: Any, dense: Any
) -> None:
    outs = []
    for one in (model, dense):
        if "past_key_values" in options:
            options = {"past_key_values": DynamicCache(config=one.config)}
        outs.append(one.generate(random_ids(2, 60), output_logits=True, **options, **GREEDY))
    assert type(outs[0].past_key_values) is kind
    assert torch.equal(torch.stack(outs[0].logits), torch.stack(outs[1].logits))


@pytest.mark.transformers("5.0", "cache_implementation='paged' is unknown there")
@pytest.mark.parametrize("how", ["generate_batch", "paged"])
def test_continuous_batching_is_refused_while_patched(how: str) -> None:
    model = patched()
    calls = {
        "generate_batch": lambda: model.generate_batch([[5, 6, 7]], max_new_tokens=2),
        "paged": lambda: model.generate(random_ids(1, 5), cache_implementation="paged"),
    }
    with pytest.raises(UnsupportedModelError, match=r"unpatch\(model\)"):
        calls[how]()
    assert run(model, random_ids(1, 50), small_cache(model)).isfinite().all()
    kvarn_ops.unpatch(model)
    assert "init_continuous_batching" not in vars(model)
